"""Maps of elements: every element has its place and its colour."""

import pytest
import torch
from PIL import ImageColor

from grn_lightning.media.figures import area_figure, bar_figure, line_figure
from grn_lightning.media.refinement import COLOURS, element_map, shown_latents

RGB = [torch.tensor(ImageColor.getrgb(colour)) for colour in COLOURS.values()]


def test_every_element_has_its_place_and_colour() -> None:
    states = torch.randint(0, 4, (8, 2, 3))
    picture = element_map(states, 16)  # a board of 3 x 3 places of 5 pixels
    assert picture.shape == (3, 32, 48)
    for c, y, x in torch.ones(states.shape).nonzero().tolist():
        row, column = 16 * y + 5 * (c // 3), 16 * x + 5 * (c % 3)
        place = picture[:, row : row + 5, column : column + 5]
        assert (place == RGB[states[c, y, x]].view(3, 1, 1)).all()
    assert (picture[:, 15::16] == 255).all()


def test_small_squares_show_the_mean() -> None:
    picture = element_map(torch.tensor([0, 0, 1, 3]).view(4, 1, 1), 4)
    mean = torch.stack([RGB[n] for n in (0, 0, 1, 3)]).float().mean(0).round()
    assert (picture == mean.view(3, 1, 1)).all()


@pytest.mark.parametrize("num_latents", [1, 2, 5, 21])
def test_the_ends_of_a_clip_are_shown(num_latents: int) -> None:
    shown = shown_latents(num_latents)
    assert shown[0] == 0
    assert shown[-1] == num_latents - 1
    assert len(set(shown)) == len(shown) == min(num_latents, 5)


def test_an_area_has_the_colour_and_the_height_of_its_share() -> None:
    colours = {"low": "#3aa76d", "high": "#d1495b"}
    shares = {"low": torch.full((5,), 0.25), "high": torch.full((5,), 0.75)}
    picture = area_figure(shares, colours, title="t", x_label="x")
    column = [picture.getpixel((picture.width // 2, y)) for y in range(picture.height)]
    counts = [
        sum(
            max(abs(a - b) for a, b in zip(pixel, ImageColor.getrgb(colour), strict=True)) < 24
            for pixel in column
        )
        for colour in colours.values()
    ]
    assert counts[1] == pytest.approx(3 * counts[0], rel=0.1)


def test_bars_that_are_not_limited_are_seen_whole() -> None:
    """The tallest of counts 1, 2, 40 ends below the upper edge, the smallest is hardly seen."""
    picture = bar_figure({"n": torch.tensor([1, 2, 40])}, list("abc"), title="t", x_label="x")
    blue = ImageColor.getrgb("#3b6fb6")
    heights = {}
    for x in range(picture.width):
        count = sum(picture.getpixel((x, y)) == blue for y in range(picture.height))
        heights[count] = x
    assert max(heights) > 150
    assert any(0 < n <= max(heights) / 15 for n in heights)
    top = min(y for y in range(300) if picture.getpixel((heights[max(heights)], y)) == blue)
    assert top > 25  # below the title


def test_figures_without_what_they_need_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one line, got none"):
        line_figure({}, title="t", x_label="x")
    with pytest.raises(ValueError, match="'a' needs 2 bars, one per label, got 3"):
        bar_figure({"a": torch.ones(3)}, ["x", "y"], title="t", x_label="x")
