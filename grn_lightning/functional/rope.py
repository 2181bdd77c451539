"""Rotary position embedding: 1-D, 2-D for the class model, 3-D for the text model.

Source: RoFormer (Su et al., 2021) for the rotation; Generative Refinement Networks (arXiv
2604.13030) for how axes share a head. A head of width ``e`` is ``e / 2`` pairs of adjacent channels
``(2p, 2p + 1)``; a table holds the cosine and sine of every pair's angle at every position. Tables
are computed in float64 and returned in float32; text, time and visual tokens have separate tables,
so that a model can cache the one and rebuild the other.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

BASE = 1e4

NUM_TEXT_POSITIONS = 512
"""Text tokens stand at times 0..511."""
TIME_TOKEN_POSITION = 512
"""The token that carries t stands behind the text."""
VISUAL_POSITION = 600
"""The first latent frame; the published model reserves the times before it for one-dimensional
tokens."""

ASPECT_TEMPLATES = (
    *(3.0, 2.5, 2.0, 1.777, 1.5, 1.333, 1.16, 1.0),
    *(0.862, 0.75, 0.666, 0.562, 0.5, 0.4, 0.333),
)
"""Known ratios of height to width, cut to three decimals as the published model has them."""
_LONGEST_SIDE, _SHORTEST_SIDE = 225, 75  # of the coordinates at aspect ratio 3


class Rotary(NamedTuple):
    """Angles of rotation per position and channel pair, as cosine and sine."""

    cos: Float[Tensor, "l p"]
    sin: Float[Tensor, "l p"]


# --------------------------------------------------------------------------- rotation


def apply_rotary(
    x: Float[Tensor, "b n l e"],
    cos: Float[Tensor, "*batch l e//2"],
    sin: Float[Tensor, "*batch l e//2"],
) -> Float[Tensor, "b n l e"]:
    """Rotate every pair of adjacent channels ``(a, b)`` to ``(a cos - b sin, b cos + a sin)``.

    Args:
        x: Queries or keys.
        cos: Cosines, one table for all samples ``(l, e / 2)`` or one per sample ``(b, l, e / 2)``.
        sin: Sines, likewise.

    Returns:
        Rotated ``x`` in its own precision, computed in that of the table.

    Example:
        >>> quarter_turn = Rotary(torch.tensor([[0.0]]), torch.tensor([[1.0]]))
        >>> apply_rotary(torch.tensor([[[[1.0, 2.0]]]]), *quarter_turn)
        tensor([[[[-2.,  1.]]]])
    """
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)  # one angle for all heads
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


# --------------------------------------------------------------------------- one axis


def axis_frequencies(dim: int, *, base: float = BASE) -> Float[Tensor, " p"]:
    """Return the angle per unit of position of each channel pair, ``base ** (-2 p / dim)``.

    Args:
        dim: Channels that turn with this axis, even.
        base: Ratio of the fastest to the (not quite reached) slowest frequency.

    Returns:
        ``dim / 2`` frequencies from 1 downwards, float64.

    Raises:
        ValueError: If ``dim`` is not even and positive.
    """
    if dim < 2 or dim % 2:
        raise ValueError(
            f"rotary channels come in pairs: dim must be even and positive, got {dim}."
        )
    return base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def rope_1d(
    positions: Float[Tensor, " l"] | Integer[Tensor, " l"], *, dim: int, base: float = BASE
) -> Rotary:
    """Return the table of one axis.

    Args:
        positions: Coordinates along the axis, integer or not.
        dim: Channels that turn with this axis, even.
        base: See `axis_frequencies`.

    Returns:
        Cosines and sines ``(l, dim / 2)``, float32, on the device of ``positions``. Position 0
        does not rotate.

    Raises:
        ValueError: If ``dim`` is not even and positive.
    """
    frequencies = axis_frequencies(dim, base=base).to(positions.device)
    angles = torch.outer(positions.double(), frequencies)
    return Rotary(angles.cos().float(), angles.sin().float())


def _join_axes(*axes: Rotary) -> Rotary:
    """Give every axis its own channels, in the order of the arguments."""
    return Rotary(*(torch.cat(tables, dim=-1) for tables in zip(*axes, strict=True)))


# --------------------------------------------------------------------------- class model, 2-D


def rope_2d_class(h: int, w: int, *, head_dim: int) -> Rotary:
    """Return the table of the class model: half of a head turns with the row, half with the column.

    Args:
        h: Rows of the grid.
        w: Columns of the grid.
        head_dim: Width ``e`` of a head, a multiple of 4.

    Returns:
        Cosines and sines ``(h * w, e / 2)``, tokens in row-major order.

    Raises:
        ValueError: If ``head_dim`` is no multiple of 4.
    """
    if head_dim < 4 or head_dim % 4:
        raise ValueError(f"head_dim must be a multiple of 4, two pairs per axis, got {head_dim}.")
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    half = head_dim // 2
    return _join_axes(rope_1d(rows.flatten(), dim=half), rope_1d(columns.flatten(), dim=half))


# --------------------------------------------------------------------------- text model, 3-D


def _split_head(head_dim: int) -> tuple[int, int, int]:
    """Return the channels of time, height, width: a third of the pairs each, the rest to width."""
    num_pairs, is_odd = divmod(head_dim, 2)
    if is_odd or num_pairs < 3:
        raise ValueError(
            f"head_dim must be even and at least 6, one pair for each axis, got {head_dim}."
        )
    third = num_pairs // 3
    return 2 * third, 2 * third, 2 * (num_pairs - 2 * third)


def _rope_3d(time: Tensor, row: Tensor, column: Tensor, *, head_dim: int) -> Rotary:
    """Return the table of tokens at the given coordinates, each `(l,)`."""
    positions = (time, row, column)
    dims = _split_head(head_dim)
    return _join_axes(*(rope_1d(p, dim=d) for p, d in zip(positions, dims, strict=True)))


def text_rotary(length: int, head_dim: int) -> Rotary:
    """Return the table of a caption's tokens: time counts them, height and width do not turn.

    Args:
        length: Number of text tokens, at most 512.
        head_dim: Width ``e`` of a head, even, at least 6.

    Returns:
        Cosines and sines ``(length, e / 2)``.

    Raises:
        ValueError: If ``length`` exceeds the positions reserved for text, or ``head_dim`` is odd
            or too small.
    """
    if length > NUM_TEXT_POSITIONS:
        raise ValueError(
            f"text length must be at most {NUM_TEXT_POSITIONS}, the positions before the time "
            f"token, got {length}; cut the captions."
        )
    time = torch.arange(length)
    zero = torch.zeros_like(time)
    return _rope_3d(time, zero, zero, head_dim=head_dim)


def time_token_rotary(head_dim: int) -> Rotary:
    """Return the table of the one token that carries ``t``, which stands right behind the text.

    Args:
        head_dim: Width ``e`` of a head, even, at least 6.

    Returns:
        Cosines and sines ``(1, e / 2)``.

    Raises:
        ValueError: If ``head_dim`` is odd or too small.
    """
    zero = torch.zeros(1, dtype=torch.long)
    return _rope_3d(zero + TIME_TOKEN_POSITION, zero, zero, head_dim=head_dim)


def nearest_aspect_template(h: int, w: int) -> float:
    """Return the known aspect ratio nearest to ``h / w``.

    Args:
        h: Height, in any unit.
        w: Width, in the same unit.

    Returns:
        One of `ASPECT_TEMPLATES`; nearest by plain difference, as the published model assigns them.

    Example:
        >>> nearest_aspect_template(480, 848)
        0.562
    """
    return min(ASPECT_TEMPLATES, key=lambda template: abs(h / w - template))


def visual_extent(aspect_template: float) -> tuple[int, int]:
    """Return the range of coordinates ``(U, V)`` that a picture of this shape spans.

    It depends on the shape alone: a larger picture has finer coordinates, not larger ones. The
    area ``U * V`` is about that of 225 x 75, the extent at aspect ratio 3.

    Args:
        aspect_template: One of `ASPECT_TEMPLATES`.

    Returns:
        Extent of rows and of columns.

    Raises:
        ValueError: If the template is unknown.

    Example:
        >>> visual_extent(1.777)
        (173, 97)
    """
    if aspect_template not in ASPECT_TEMPLATES:
        known = ", ".join(str(template) for template in ASPECT_TEMPLATES)
        raise ValueError(f"aspect_template must be one of {known}, got {aspect_template}.")
    width = math.sqrt(_LONGEST_SIDE * _SHORTEST_SIDE / aspect_template)
    return int(aspect_template * width), int(width)


def _spread(num_positions: int, extent: int) -> Float[Tensor, " n"]:
    """Spread grid positions evenly over the extent, on integers.

    A product in float32, rounded half to even, because the published tables were made so; in
    float64 some positions would differ by one.
    """
    positions = torch.arange(num_positions, dtype=torch.float32)
    return (positions * (extent / num_positions)).round()


def visual_rotary(
    f: int,
    h: int,
    w: int,
    *,
    head_dim: int,
    aspect_template: float | None = None,
    frame_offset: int = 0,
) -> Rotary:
    """Return the table of the visual tokens of a clip (an image is a clip of one frame).

    Latent frame ``i`` stands at time ``600 + i``; rows and columns are spread over the extent of
    the aspect ratio, so that all resolutions of one shape share their coordinates.

    Args:
        f: Latent frames.
        h: Rows of the grid.
        w: Columns of the grid.
        head_dim: Width ``e`` of a head, even, at least 6.
        aspect_template: One of `ASPECT_TEMPLATES`; None takes the nearest to ``h / w``.
        frame_offset: Index of the first frame, for a clip that continues another.

    Returns:
        Cosines and sines ``(f * h * w, e / 2)``; the column runs fastest, the frame slowest.

    Raises:
        ValueError: If the grid has more rows or columns than the extent has integers, if the
            template is unknown, or if ``head_dim`` is odd or too small.
    """
    if aspect_template is None:
        aspect_template = nearest_aspect_template(h, w)
    extent_h, extent_w = visual_extent(aspect_template)
    if h > extent_h or w > extent_w:
        raise ValueError(
            f"a grid of aspect template {aspect_template} must fit into {extent_h} x {extent_w} "
            f"positions, got {h} x {w}; use a smaller picture or the template of its shape."
        )
    time = VISUAL_POSITION + frame_offset + torch.arange(f, dtype=torch.float32)
    grid = torch.meshgrid(time, _spread(h, extent_h), _spread(w, extent_w), indexing="ij")
    time, row, column = (axis.flatten() for axis in grid)
    return _rope_3d(time, row, column, head_dim=head_dim)
