"""Pictures of the steps of a refinement: what became of every element, below what it decodes to.

An element of a step is filled, kept, erased or left blank (`samplers.trace`). A position is a
square in which every element has a place; where squares are too small for that, its colour is the
mean of its elements.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from grn_lightning.media.images import to_picture

COLOURS = {"filled": "#3aa76d", "kept": "#3b6fb6", "erased": "#d1495b", "blank": "#e4e4e4"}
"""What a step did to an element; the numbers of these states are their places here."""

_PAPER, _INK = "white", "#202020"
_CELL = 96  # pixels of the longer side of a frame, at least
_GAP, _LINE, _FONT_SIZE = 10, 18, 13
_MAX_FRAMES = 5  # of a clip, side by side
_MIN_ELEMENT = 2  # pixels of an element's place, at least


@dataclass(frozen=True)
class StepView:
    """What is shown of one step of one sample."""

    frames: Tensor
    """uint8 `(n, 3, h, w)`: the complete sample, decoded; the first frame of each latent frame."""
    states: Tensor
    """`(c, n, h', w')` integers: places in `COLOURS`, for the same latent frames."""
    text: str
    """A line above them."""


def element_map(states: Tensor, cell: int) -> Tensor:
    """Paint the states of one latent frame.

    Args:
        states: `(c, h, w)` integers, places in `COLOURS`.
        cell: Pixels per position, down and across.

    Returns:
        uint8 `(3, h * cell, w * cell)`.
    """
    palette = torch.tensor([ImageColor.getrgb(colour) for colour in COLOURS.values()])
    pixels = palette[states.long().cpu()].float()  # (c, h, w, 3)
    num_elements, height, width = states.shape
    side = math.ceil(math.sqrt(num_elements))
    place = (cell - 1) // side  # one pixel of paper between positions
    if place < _MIN_ELEMENT:
        mean = pixels.mean(0).permute(2, 0, 1).round().to(torch.uint8)
        return mean.repeat_interleave(cell, 1).repeat_interleave(cell, 2)
    board = torch.full((side * side, height, width, 3), 255.0)
    board[:num_elements] = pixels
    board = board.unflatten(0, (side, side)).permute(4, 2, 0, 3, 1)  # (3, h, side, w, side)
    board = board.repeat_interleave(place, 2).repeat_interleave(place, 4)
    picture = torch.full((3, height, cell, width, cell), 255.0)
    picture[:, :, : side * place, :, : side * place] = board
    return picture.flatten(3).flatten(1, 2).to(torch.uint8)


def shown_latents(num_latents: int) -> list[int]:
    """Return which latent frames of a clip are shown: the first, the last, some between them."""
    count = min(num_latents, _MAX_FRAMES)
    return torch.linspace(0, num_latents - 1, count).round().long().tolist()


def _enlarged(image: Tensor, factor: int) -> Tensor:
    return image.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def _columns_of(view: StepView) -> list[list[Image.Image]]:
    """Return the frames and maps of a step, `[[frame, map], ...]`, all of one size."""
    height, width = view.frames.shape[-2:]
    factor = math.ceil(_CELL / max(height, width))
    cell = factor * (height // view.states.shape[-2])
    return [
        [to_picture(_enlarged(frame, factor)), to_picture(element_map(states, cell))]
        for frame, states in zip(view.frames.cpu(), view.states.unbind(1), strict=True)
    ]


def step_page(view: StepView, *, label: str) -> Image.Image:
    """Lay out one step: what was asked for, the line of the step, frames, maps and a legend.

    Args:
        view: The step.
        label: What was asked for.

    Returns:
        A picture whose size depends on the sizes of frames and maps only.
    """
    font = ImageFont.load_default(size=_FONT_SIZE)
    columns = _columns_of(view)
    width, height = columns[0][0].size
    named = [15 + round(font.getlength(f"{name} 100 %")) + _GAP for name in COLOURS]
    title = round(font.getlength("step 50 of 50   t = 0.00   entropy 0.00   changed 100 %"))
    total = max(_GAP + (width + _GAP) * len(columns), _GAP + max(sum(named), title + _GAP))
    page = Image.new("RGB", (total, 4 * _GAP + 2 * height + 3 * _LINE), _PAPER)
    pen = ImageDraw.Draw(page)
    for n, pair in enumerate(columns):
        for row, picture in enumerate(pair):
            left, top = _GAP + n * (width + _GAP), _GAP + 2 * _LINE + row * (height + _GAP)
            page.paste(picture, (left, top))
    pen.text((_GAP, _GAP // 2), label, _INK, font)
    pen.text((_GAP, _GAP // 2 + _LINE), view.text, _INK, font)
    shares = [(view.states == number).float().mean() for number in range(len(COLOURS))]
    names = [
        f"{name} {100 * float(share):.0f} %" for name, share in zip(COLOURS, shares, strict=True)
    ]
    _legend(pen, font, names, named, top=2 * _LINE + 3 * _GAP + 2 * height)
    return page


def _legend(
    pen: ImageDraw.ImageDraw, font: Any, names: Sequence[str], widths: Sequence[int], *, top: int
) -> None:
    left = _GAP
    for name, width, colour in zip(names, widths, COLOURS.values(), strict=True):
        pen.rectangle((left, top + 3, left + 10, top + 13), fill=colour)
        pen.text((left + 15, top), name, _INK, font)
        left += width


def step_strip(views: Sequence[StepView], *, label: str) -> Image.Image:
    """Lay steps out from left to right: of each the middle frame, its map, and its line.

    Args:
        views: Steps of one sample; their lines should be short.
        label: What was asked for.
    """
    font = ImageFont.load_default(size=_FONT_SIZE)
    middle = views[0].frames.shape[0] // 2
    pairs = [_columns_of(view)[middle] for view in views]
    width, height = pairs[0][0].size
    named = [15 + round(font.getlength(name)) + 2 * _GAP for name in COLOURS]
    total = _GAP + max((width + _GAP) * len(views), sum(named))
    page = Image.new("RGB", (total, 4 * _GAP + 2 * height + 3 * _LINE), _PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((_GAP, _GAP // 2), label, _INK, font)
    for n, (view, pair) in enumerate(zip(views, pairs, strict=True)):
        left = _GAP + n * (width + _GAP)
        pen.text((left, _GAP // 2 + _LINE), view.text, _INK, font)
        for row, picture in enumerate(pair):
            page.paste(picture, (left, _GAP + 2 * _LINE + row * (height + _GAP)))
    _legend(pen, font, list(COLOURS), named, top=2 * _LINE + 3 * _GAP + 2 * height)
    return page
