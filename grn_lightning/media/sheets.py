"""Sheets to look at: captioned pictures in a grid, clips in a grid that plays, clips as strips.

Small pictures are enlarged by a whole factor without smoothing, so that a pixel stays a pixel and
a caption has room. Captions are set in PIL's own font where it has the letters (ASCII), else in the
DejaVu Sans that comes with matplotlib, which has Latin, Greek and Cyrillic ones; others are boxes.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from grn_lightning.media.images import to_picture

_CELL = 144  # pixels; pictures are enlarged until the longer side has at least this many
_STRIP_CELL = 72  # idem for the frames of a film strip, of which many stand side by side
_GAP = 14  # between cells and around the sheet
_STRIP_GAP = 2  # between the frames of a strip
_CAPTION_GAP = 3  # between a picture and its caption
_FONT_SIZE = 14
_MAX_LINES = 3
_PAPER, _INK = "white", "#202020"

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _font_for(labels: Sequence[str]) -> _Font:
    if all(label.isascii() for label in labels):
        return ImageFont.load_default(size=_FONT_SIZE)
    import matplotlib  # slow to import, and rarely needed here

    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), _FONT_SIZE - 1)  # a wider face


def _enlarged(image: Tensor, cell: int) -> Tensor:
    """Repeat pixels of ``(3, h, w)`` until the longer side has at least ``cell`` of them."""
    factor = math.ceil(cell / max(image.shape[-2:]))
    return image.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def _wrap(text: str, font: _Font, width: int) -> list[str]:
    """Break a caption into lines of at most ``width`` pixels; the last may end in an ellipsis."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines += [""] if lines[-1] else []
        for letter in word:  # a word wider than its cell may break anywhere
            lines += [""] if lines[-1] and font.getlength(lines[-1] + letter) > width else []
            lines[-1] += letter
    if len(lines) > _MAX_LINES:
        last = lines[_MAX_LINES - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: _MAX_LINES - 1], last + "…"]
    return lines


def _layout(
    pictures: Sequence[Image.Image], labels: Sequence[str] | None, columns: int
) -> Image.Image:
    """Set pictures in rows, each with its caption below; rows are as high as they need to be."""
    texts = labels or [""] * len(pictures)
    font, line_height = _font_for(texts), _FONT_SIZE + 3
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    captions = [_wrap(text, font, width) for text in texts]
    rows = [captions[n : n + columns] for n in range(0, len(captions), columns)]
    tops = [_GAP]
    for row in rows:
        num_lines = max(len(lines) if lines[0] else 0 for lines in row)
        caption_height = _CAPTION_GAP + num_lines * line_height if num_lines else 0
        tops.append(tops[-1] + height + caption_height + _GAP)
    full_width = _GAP + (width + _GAP) * min(columns, len(pictures))
    sheet = Image.new("RGB", (full_width, tops[-1]), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for n, (picture, lines) in enumerate(zip(pictures, captions, strict=True)):
        left, top = _GAP + (width + _GAP) * (n % columns), tops[n // columns]
        sheet.paste(picture, (left, top))
        for k, line in enumerate(lines):
            pen.text((left, top + height + _CAPTION_GAP + k * line_height), line, _INK, font)
    return sheet


def _checked_columns(count: int, labels: Sequence[str] | None, columns: int | None) -> int:
    if count == 0:
        raise ValueError("a sheet needs at least one picture, got none.")
    if labels is not None and len(labels) != count:
        raise ValueError(f"labels must hold one text per picture: {count}, got {len(labels)}.")
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}.")
    return columns or math.ceil(math.sqrt(count))


def contact_sheet(
    images: Tensor | Sequence[Tensor],
    labels: Sequence[str] | None = None,
    *,
    columns: int | None = None,
) -> Image.Image:
    """Lay pictures out in a grid with captions below.

    Args:
        images: uint8 ``(n, 3, h, w)``, or pictures ``(3, h, w)`` that may differ in size.
        labels: One caption per picture; long ones take up to three lines.
        columns: Pictures in a row; None makes the grid about square.

    Raises:
        ValueError: If there is no picture, or not one label per picture.
    """
    columns = _checked_columns(len(images), labels, columns)
    return _layout([to_picture(_enlarged(image, _CELL)) for image in images], labels, columns)


def clip_sheet(
    clips: Tensor, labels: Sequence[str] | None = None, *, columns: int | None = None
) -> list[Image.Image]:
    """Lay clips out in a grid with captions below; the pictures returned play all of them at once.

    Args:
        clips: uint8 ``(n, f, 3, h, w)``.
        labels: One caption per clip.
        columns: Clips in a row; None makes the grid about square.

    Returns:
        ``f`` pictures of equal size.

    Raises:
        ValueError: If there is no clip, or not one label per clip.
    """
    return [contact_sheet(frames, labels, columns=columns) for frames in clips.unbind(1)]


def film_strip(clips: Tensor, labels: Sequence[str] | None = None) -> Image.Image:
    """Lay the frames of each clip side by side, one clip in a row with its caption below.

    Args:
        clips: uint8 ``(n, f, 3, h, w)``.
        labels: One caption per clip.

    Raises:
        ValueError: If there is no clip, or not one label per clip.
    """
    _checked_columns(len(clips), labels, None)
    rows = []
    for clip in clips:
        frames = [_enlarged(frame, _STRIP_CELL) for frame in clip]
        gap = torch.full((3, frames[0].shape[1], _STRIP_GAP), 255, dtype=torch.uint8)
        strip = [part for frame in frames for part in (frame, gap)][:-1]
        rows.append(to_picture(torch.cat(strip, dim=-1)))
    return _layout(rows, labels, 1)
