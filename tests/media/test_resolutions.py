"""Sizes: the published table, number for number; aspects as people write them; durations."""

import math

import pytest

from grn_lightning.functional import ASPECT_TEMPLATES, nearest_aspect_template, visual_rotary
from grn_lightning.media.resolutions import (
    PRESETS,
    TEMPLATES,
    frames_for,
    latent_size,
    nearest_template,
    picture_size,
)

# Rows x columns of one latent frame, by height / width (cut to three decimals), one column for each
# preset; counted in the published code.
TABLE = """
3.0   28x9  55x18 69x23 104x35 111x37 156x52
2.5   25x10 51x20 63x25 95x38  101x40 142x57
2.0   23x11 45x23 57x28 85x42  91x45  127x64
1.777 21x12 43x24 53x30 80x45  85x48  120x68
1.5   20x13 39x26 49x33 73x49  78x52  110x73
1.333 18x14 37x28 46x35 69x52  74x55  104x78
1.16  17x15 34x30 43x37 65x56  69x59  97x84
1.0   16x16 32x32 40x40 60x60  64x64  90x90
0.862 15x17 30x34 37x43 56x65  59x69  84x97
0.75  14x18 28x37 35x46 52x69  55x74  78x104
0.666 13x20 26x39 33x49 49x73  52x78  73x110
0.562 12x21 24x43 30x53 45x80  48x85  68x120
0.5   11x23 23x45 28x57 42x85  45x91  64x127
0.4   10x25 20x51 25x63 38x95  40x101 57x142
0.333 9x28  18x55 23x69 35x104 37x111 52x156
"""
ROWS = [line.split() for line in TABLE.strip().splitlines()]


@pytest.mark.parametrize(
    ("row", "name"), list(zip(ROWS, TEMPLATES, strict=True)), ids=list(TEMPLATES)
)
def test_presets_and_templates_give_the_published_sizes(row: list[str], name: str) -> None:
    key, *sizes = row
    assert math.floor(TEMPLATES[name] * 1000) / 1000 == float(key)
    assert float(key) in ASPECT_TEMPLATES
    for preset, size in zip(PRESETS, sizes, strict=True):
        rows, columns = map(int, size.split("x"))
        assert latent_size(preset, name) == (rows, columns)
        assert picture_size(preset, name) == (16 * rows, 16 * columns)
        # A generator finds back to the template, and has a position for every row and column.
        assert nearest_aspect_template(rows, columns) == float(key)
        visual_rotary(1, rows, columns, head_dim=6)


def test_templates_name_width_before_height() -> None:
    for name, ratio in TEMPLATES.items():
        width, height = map(float, name.split(":"))
        assert height / width == pytest.approx(ratio)
        assert nearest_template(height, width) == name
        assert nearest_template(height, width, measure="difference") == name
    assert picture_size("0.41M", "16:9") == (480, 848)
    assert picture_size("0.41M", "848:480") == (480, 848)
    assert picture_size("0.06M") == (256, 256)


def test_a_picture_on_its_side_gets_the_template_on_its_side() -> None:
    """By ratio; the published difference breaks the symmetry."""
    sides = [(height, 1000) for height in range(350, 3000, 7)]

    def mirrored(name: str) -> str:
        width, height = name.split(":")
        return f"{height}:{width}"

    for height, width in sides:
        assert nearest_template(width, height) == mirrored(nearest_template(height, width))
    published = [
        nearest_template(w, h, measure="difference")
        == mirrored(nearest_template(h, w, measure="difference"))
        for h, w in sides
    ]
    assert 0.9 < sum(published) / len(published) < 1
    assert nearest_template(1225, 1000) == "1:1.16"
    assert nearest_template(547, 1000) == "16:9"
    assert nearest_template(171, 100) == "9:16"
    assert nearest_template(2240, 1000) == "2:5"
    assert nearest_template(2240, 1000, measure="difference") == "1:2"


@pytest.mark.parametrize(
    ("seconds", "options", "frames"),
    [
        (2, {}, 33),
        (5, {}, 81),
        (0.25, {}, 5),
        (0, {}, 1),
        (0.1, {}, 1),
        (0.13, {}, 5),
        (1, {"fps": 8}, 9),
        (2, {"fps": 4, "stride": 2}, 9),
        (13, {"max_frames": None}, 209),
    ],
)
def test_durations_become_frames_that_fit_the_stride(
    seconds: float, options: dict[str, float], frames: int
) -> None:
    assert frames_for(seconds, **options) == frames  # type: ignore[arg-type]


def test_sizes_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"preset '3M'; known are 0.06M, 0.25M, .*2M"):
        latent_size("3M", "1:1")
    with pytest.raises(ValueError, match=r"template '7:5'; known are 1:3, .*3:1"):
        latent_size("1M", "7:5")
    for aspect in ("square", "16:", "0:1", "16:9:1", "nan:1", "-1:-1"):
        with pytest.raises(ValueError, match="must be width:height, such as 16:9, got"):
            picture_size("1M", aspect)
    with pytest.raises(ValueError, match="between 6:1 and 1:6, got 7:1"):
        picture_size("1M", "7:1")
    with pytest.raises(ValueError, match=r"at most 5 at 16 frames per second \(81 frames\), got 6"):
        frames_for(6)
    with pytest.raises(ValueError, match="`seconds` must be at least 0"):
        frames_for(-1)
