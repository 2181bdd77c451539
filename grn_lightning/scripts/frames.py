"""Samples into files without a detour: decoded a few frames at a time, never as one long clip."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from grn_lightning.media.images import encode_png, to_uint8
from grn_lightning.media.video import encode_gif, write_mp4
from grn_lightning.pipelines import GeneratorPipeline
from grn_lightning.scripts.pictures import shrink

# Pixels of what is shown beside the real thing; smaller ones stay as they are. A GIF of more would
# need more memory than decoding does.
_PICTURE_SIDE, _CLIP_SIDE = 256, 128
_MAX_GIF_FPS = 50  # more than viewers play


class Written(NamedTuple):
    """The files of one sample."""

    files: list[Path]
    """The best one first."""
    preview: Tensor
    """uint8 `(f, 3, h, w)`, its shorter side at most 256 pixels, of a clip 128."""


def write_sample(
    stem: Path,
    elements: Tensor,
    pipeline: GeneratorPipeline,
    *,
    fps: float,
    note: str | None = None,
) -> Written:
    """Decode one sample and write it: a picture as PNG, a clip as MP4 with a small GIF beside.

    Values are clamped and rounded to 8 bits; PNG keeps them exactly.

    Args:
        stem: Path without an extension; existing files are not overwritten.
        elements: `(1, c, *grid)` from a pipeline.
        pipeline: Decodes them, some latent frames at a time.
        fps: Frames per second of clips.
        note: Text that travels in the files.
    """
    is_picture = elements.ndim == 4 or elements.shape[2] == 1
    side = _PICTURE_SIDE if is_picture else _CLIP_SIDE
    small: list[Tensor] = []

    def frames() -> Iterator[Tensor]:
        for chunk in pipeline.decode_chunks(elements):
            pixels = to_uint8(chunk[0].transpose(0, 1)).cpu()  # (f, 3, h, w)
            small.append(shrink(pixels, short_side=side))
            yield pixels

    # Not `with_suffix`: a prompt may end in something that looks like one.
    png, mp4, gif = (stem.with_name(stem.name + suffix) for suffix in (".png", ".mp4", ".gif"))
    if is_picture:
        [pixels] = frames()
        _write_new(png, encode_png(pixels[0], note=note))
        return Written([png], small[0])
    write_mp4(mp4, frames(), fps=fps, note=note)
    preview = torch.cat(small)
    _write_new(gif, encode_gif(preview, fps=min(fps, _MAX_GIF_FPS), note=note))
    return Written([mp4, gif], preview)


def _write_new(file: Path, data: bytes) -> None:
    with file.open("xb") as stream:
        stream.write(data)
