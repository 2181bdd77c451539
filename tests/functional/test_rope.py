"""Rotary embedding: published extents and positions, rotations as complex products."""

import cmath
import math

import numpy as np
import pytest
import torch

from grn_lightning.functional.rope import (
    ASPECT_TEMPLATES,
    Rotary,
    apply_rotary,
    axis_frequencies,
    nearest_aspect_template,
    rope_1d,
    rope_2d_class,
    text_rotary,
    time_token_rotary,
    visual_extent,
    visual_rotary,
)

EXTENTS = {
    3.0: (225, 75),
    2.5: (205, 82),
    2.0: (183, 91),
    1.777: (173, 97),
    1.5: (159, 106),
    1.333: (149, 112),
    1.16: (139, 120),
    1.0: (129, 129),
    0.862: (120, 139),
    0.75: (112, 150),
    0.666: (106, 159),
    0.562: (97, 173),
    0.5: (91, 183),
    0.4: (82, 205),
    0.333: (74, 225),
}
PUBLISHED_SIDES = (16, 32, 40, 60, 64, 90)
RATIOS_ABOVE_ONE = (3, 5 / 2, 2, 16 / 9, 3 / 2, 4 / 3, 1.16)
EXACT_RATIOS = (*RATIOS_ABOVE_ONE, 1, *(1 / ratio for ratio in reversed(RATIOS_ABOVE_ONE)))


def published_grids():
    """Rows and columns of every published resolution, by aspect template."""
    for template, ratio in zip(ASPECT_TEMPLATES, EXACT_RATIOS, strict=True):
        for side in PUBLISHED_SIDES:
            w = math.sqrt(side * side / ratio)
            yield template, round(w * ratio), round(w)


def table_of(positions, pairs):
    """Cosines and sines of tokens at the given coordinates, one complex number at a time."""
    rows = []
    for token in positions:
        row = []
        for position, num_pairs in zip(token, pairs, strict=True):
            row += [cmath.exp(1j * position * 10000 ** (-p / num_pairs)) for p in range(num_pairs)]
        rows.append(row)
    turns = torch.tensor(rows, dtype=torch.complex128)
    return Rotary(turns.real.float(), turns.imag.float())


def spread(num_positions, extent):
    step = np.float32(extent / num_positions)
    return [int(np.rint(np.float32(i) * step)) for i in range(num_positions)]


def assert_same_table(found, expected):
    torch.testing.assert_close(found.cos, expected.cos)
    torch.testing.assert_close(found.sin, expected.sin)


# --------------------------------------------------------------------------- rotation


@pytest.mark.parametrize("per_sample", [False, True])
def test_rotation_is_the_product_of_complex_numbers(per_sample):
    x = torch.randn(2, 3, 5, 8)
    angles = torch.randn(2, 5, 4) if per_sample else torch.randn(5, 4)
    found = apply_rotary(x, angles.cos(), angles.sin())
    turns = torch.polar(torch.ones_like(angles), angles)
    turns = turns.unsqueeze(1) if per_sample else turns
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * turns)
    torch.testing.assert_close(found, expected.flatten(-2))


def test_rotation_preserves_the_norm_of_every_pair():
    x = torch.randn(2, 3, 12, 16)
    found = apply_rotary(x, *rope_2d_class(3, 4, head_dim=16))
    norms = x.unflatten(-1, (8, 2)).norm(dim=-1)
    torch.testing.assert_close(found.unflatten(-1, (8, 2)).norm(dim=-1), norms)


def test_scores_depend_on_relative_position_only():
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)

    def score(position_q, position_k):
        q_turned = apply_rotary(q, *rope_1d(torch.tensor([position_q]), dim=32))
        k_turned = apply_rotary(k, *rope_1d(torch.tensor([position_k]), dim=32))
        return (q_turned * k_turned).sum()

    for shift in (1, 37, 600):
        torch.testing.assert_close(score(5 + shift, 2 + shift), score(5, 2), rtol=1e-5, atol=1e-5)
    assert not torch.isclose(score(5, 2), score(2, 5))


def test_rotation_returns_the_precision_of_its_input_but_computes_in_that_of_the_table():
    x, table = torch.randn(1, 2, 6, 8).bfloat16(), rope_1d(torch.arange(6), dim=8)
    found = apply_rotary(x, *table)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, apply_rotary(x.float(), *table).bfloat16(), rtol=0, atol=0)


def test_position_zero_does_not_rotate():
    x = torch.randn(1, 2, 3, 8)
    found = apply_rotary(x, *rope_1d(torch.zeros(3), dim=8))
    torch.testing.assert_close(found, x, rtol=0, atol=0)


# --------------------------------------------------------------------------- one and two axes


def test_frequencies_fall_geometrically_from_one():
    frequencies = axis_frequencies(42, base=1e4)
    expected = torch.tensor([10000 ** (-i / 21) for i in range(21)], dtype=torch.float64)
    torch.testing.assert_close(frequencies, expected)


@pytest.mark.parametrize(("h", "w"), [(4, 4), (3, 5)])
def test_class_table_turns_half_a_head_with_the_row_and_half_with_the_column(h, w):
    expected = table_of([(i, k) for i in range(h) for k in range(w)], (4, 4))
    assert_same_table(rope_2d_class(h, w, head_dim=16), expected)


# --------------------------------------------------------------------------- three axes


@pytest.mark.parametrize("template", ASPECT_TEMPLATES)
def test_extents_are_the_published_ones(template):
    assert visual_extent(template) == EXTENTS[template]


def test_every_published_grid_finds_its_template_and_fits():
    for template, h, w in published_grids():
        assert nearest_aspect_template(h, w) == template
        extent_h, extent_w = visual_extent(template)
        assert h <= extent_h
        assert w <= extent_w


@pytest.mark.parametrize(
    ("head_dim", "pairs"), [(128, (21, 21, 22)), (48, (8, 8, 8)), (6, (1, 1, 1))]
)
def test_text_and_time_tokens_turn_with_time_only(head_dim, pairs):
    expected = table_of([(j, 0, 0) for j in (*range(7), 512)], pairs)
    text, time_token = text_rotary(7, head_dim), time_token_rotary(head_dim)
    assert_same_table(text, Rotary(*(table[:7] for table in expected)))
    assert_same_table(time_token, Rotary(*(table[7:] for table in expected)))


@pytest.mark.parametrize(
    ("grid", "template"),
    [((1, 16, 16), 1.0), ((3, 12, 21), 0.562), ((2, 5, 3), 1.5), ((2, 2, 2), 1.0)],
)
@pytest.mark.parametrize(("head_dim", "pairs"), [(128, (21, 21, 22)), (32, (5, 5, 6))])
def test_visual_tokens_stand_behind_the_text_and_spread_over_the_extent(
    grid, template, head_dim, pairs
):
    f, h, w = grid
    rows, columns = spread(h, EXTENTS[template][0]), spread(w, EXTENTS[template][1])
    positions = [(600 + i, row, column) for i in range(f) for row in rows for column in columns]
    found = visual_rotary(f, h, w, head_dim=head_dim, aspect_template=template)
    assert_same_table(found, table_of(positions, pairs))


def test_positions_round_half_to_even():
    # 129 / 2 = 64.5 goes to 64.
    rows = visual_rotary(1, 2, 1, head_dim=6, aspect_template=1.0).cos[:, 1]
    torch.testing.assert_close(rows, torch.tensor([1.0, math.cos(64)]))


def test_positions_are_products_in_float32():
    """Some published grids differ by one between float32 and float64."""
    num_different = 0
    for template, *sizes in published_grids():
        for size, extent in zip(sizes, visual_extent(template), strict=True):
            exact = [round(i * extent / size) for i in range(size)]
            num_different += sum(a != b for a, b in zip(spread(size, extent), exact, strict=True))
    assert num_different > 0


def test_all_resolutions_of_a_shape_share_their_coordinates():
    coarse = visual_rotary(1, 16, 16, head_dim=24).cos.view(16, 16, -1)
    fine = visual_rotary(1, 64, 64, head_dim=24).cos.view(64, 64, -1)
    torch.testing.assert_close(coarse, fine[::4, ::4])


def test_a_template_is_chosen_by_the_shape_unless_given():
    chosen = visual_rotary(1, 12, 21, head_dim=24)
    assert_same_table(chosen, visual_rotary(1, 12, 21, head_dim=24, aspect_template=0.562))


def test_a_clip_that_continues_stands_where_the_whole_clip_stood():
    whole = visual_rotary(5, 3, 3, head_dim=24)
    rest = visual_rotary(2, 3, 3, head_dim=24, frame_offset=3)
    assert_same_table(rest, Rotary(*(table[27:] for table in whole)))


def test_refusals_name_what_is_allowed():
    with pytest.raises(ValueError, match="must fit into 129 x 129 positions, got 130 x 130"):
        visual_rotary(1, 130, 130, head_dim=24)
    with pytest.raises(ValueError, match="template 3.0 must fit into 225 x 75 positions"):
        visual_rotary(1, 76, 76, head_dim=24, aspect_template=3.0)
    with pytest.raises(ValueError, match="template 0.333 must fit into 74 x 225 positions"):
        visual_rotary(1, 75, 75, head_dim=24, aspect_template=0.333)
    with pytest.raises(ValueError, match=r"aspect_template must be one of 3\.0, 2\.5.* got 1\.78"):
        visual_rotary(1, 4, 4, head_dim=24, aspect_template=1.78)
    with pytest.raises(ValueError, match="text length must be at most 512"):
        text_rotary(513, 24)
    for head_dim in (4, 7):
        with pytest.raises(
            ValueError, match=f"head_dim must be even and at least 6.* got {head_dim}"
        ):
            time_token_rotary(head_dim)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 4.* got 6"):
        rope_2d_class(2, 2, head_dim=6)
    with pytest.raises(ValueError, match="dim must be even and positive, got 3"):
        axis_frequencies(3)
