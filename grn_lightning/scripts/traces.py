"""Pictures of a refinement: an animation of its steps, and its curves.

The animation shows the complete sample of every step, decoded, above the map of its elements: what
the step has filled, kept, erased or left blank. A position is a square in which every element has a
place; where squares are too small for that, its colour is the mean of its elements.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from grn_lightning.media.images import to_picture, to_uint8
from grn_lightning.pipelines import GeneratorPipeline
from grn_lightning.samplers.trace import SampleTrace, Trace
from grn_lightning.scripts.pictures import as_frames, write_clip

COLOURS = {"filled": "#3aa76d", "kept": "#3b6fb6", "erased": "#d1495b", "blank": "#e4e4e4"}
"""What a step did to an element, in the order of the masks."""

_PAPER, _INK = "white", "#202020"
_CELL = 96  # pixels of the longer side of a frame, at least
_GAP, _LINE, _FONT_SIZE = 10, 18, 13
_MAX_FRAMES = 5  # of a clip, side by side
_MIN_ELEMENT = 2  # pixels of an element's place, at least
_STEPS_PER_SECOND = 4.0
_HOLD = 6  # so many times the last step is shown


def _palette() -> Tensor:
    return torch.tensor([ImageColor.getrgb(colour) for colour in COLOURS.values()])


def element_map(masks: Sequence[Tensor], cell: int) -> Tensor:
    """Paint the four masks of one latent frame.

    Args:
        masks: Four bool `(c, h, w)`, in the order of `COLOURS`; each element is in one.
        cell: Pixels per position, down and across.

    Returns:
        uint8 `(3, h * cell, w * cell)`.
    """
    kinds = torch.stack([mask.int() for mask in masks]).argmax(0)  # (c, h, w)
    pixels = _palette()[kinds].float()  # (c, h, w, 3)
    num_elements, height, width = kinds.shape
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


def _enlarged(image: Tensor, factor: int) -> Tensor:
    return image.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def _columns(num_latents: int) -> list[int]:
    """Return which latent frames are shown."""
    count = min(num_latents, _MAX_FRAMES)
    return torch.linspace(0, num_latents - 1, count).round().long().tolist()


class _Painter:
    """Paints the steps of one trace."""

    def __init__(self, trace: SampleTrace, pipeline: GeneratorPipeline, label: str):
        self.trace, self.pipeline, self.label = trace, pipeline, label
        grid = trace.codes.shape[2:]
        self.columns = _columns(grid[0] if len(grid) == 3 else 1)
        sizes = pipeline.tokenizer.config
        self.stride = sizes.temporal_stride
        longest = max(grid[-2:]) * sizes.spatial_stride
        self.factor = math.ceil(_CELL / longest)
        self.cell = sizes.spatial_stride * self.factor
        self.font = ImageFont.load_default(size=_FONT_SIZE)

    def paint(self, step: int) -> Image.Image:
        """Return the picture of a step."""
        codes = self.trace.codes[step : step + 1].to(self.pipeline.device)
        clip = to_uint8(self.pipeline.detokenize(codes)[0].cpu()).transpose(0, 1)  # (f, 3, h, w)
        shown = [_enlarged(clip[n * self.stride], self.factor) for n in self.columns]
        maps = [self._map(step, n) for n in self.columns]
        height, width = shown[0].shape[-2:]
        total = max(_GAP + (width + _GAP) * len(shown), self._least_width())
        page = Image.new("RGB", (total, 4 * _GAP + 2 * height + 3 * _LINE), _PAPER)
        pen = ImageDraw.Draw(page)
        for n, pair in enumerate(zip(shown, maps, strict=True)):
            for row, picture in enumerate(pair):
                left, top = _GAP + n * (width + _GAP), _GAP + 2 * _LINE + row * (height + _GAP)
                page.paste(to_picture(picture), (left, top))
        pen.text((_GAP, _GAP // 2), self.label, _INK, self.font)
        pen.text((_GAP, _GAP // 2 + _LINE), self._title(step), _INK, self.font)
        self._legend(pen, step, 2 * _LINE + 3 * _GAP + 2 * height)
        return page

    def _map(self, step: int, latent: int) -> Tensor:
        masks = [mask[step] for mask in self.trace.masks]
        frame = [mask[:, latent] if mask.ndim == 4 else mask for mask in masks]
        return element_map(frame, self.cell)

    def _title(self, step: int) -> str:
        one = self.trace
        return (
            f"step {step + 1} of {one.num_steps}   t = {float(one.t[step]):.2f}   "
            f"entropy {float(one.entropy[step]):.2f}   changed {100 * float(one.flips[step]):.0f} %"
        )

    def _legend(self, pen: ImageDraw.ImageDraw, step: int, top: int) -> None:
        left = _GAP
        for name, share in self.trace.shares.items():
            pen.rectangle((left, top + 3, left + 10, top + 13), fill=COLOURS[name])
            text = f"{name} {100 * float(share[step]):.0f} %"
            pen.text((left + 15, top), text, _INK, self.font)
            left += self._legend_width(name)

    def _legend_width(self, name: str) -> int:
        return 15 + round(self.font.getlength(f"{name} 100 %")) + _GAP

    def _least_width(self) -> int:
        title = round(
            self.font.getlength("step 50 of 50   t = 0.00   entropy 0.00   changed 100 %")
        )
        return _GAP + max(sum(map(self._legend_width, COLOURS)), title + _GAP)


def write_animation(
    stem: Path, trace: SampleTrace, pipeline: GeneratorPipeline, *, label: str
) -> list[Path]:
    """Write the steps of a refinement as MP4 and GIF.

    Args:
        stem: Path without an extension.
        trace: What an observer has remembered of one sample.
        pipeline: Decodes the complete samples.
        label: What was asked for.
    """
    painter = _Painter(trace, pipeline, label)
    pages = [painter.paint(step) for step in range(trace.num_steps)]
    frames = as_frames(pages + pages[-1:] * _HOLD)
    return write_clip(stem, frames, fps=_STEPS_PER_SECOND)


def write_curves(file: Path, traces: Sequence[SampleTrace], labels: Sequence[str]) -> Path:
    """Draw entropies and changes by step, and what became of the elements of the first sample.

    Args:
        file: PNG to write.
        traces: One per sample.
        labels: Their names.
    """
    from matplotlib.figure import Figure  # slow to import, and rarely needed

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for trace, label in zip(traces, labels, strict=True):
        steps = range(1, trace.num_steps + 1)
        axes[0].plot(steps, trace.entropy, marker=".", label=label)
        axes[1].plot(steps, trace.flips, marker=".", label=label)
    first = traces[0]
    steps = range(1, first.num_steps + 1)
    shares = [first.shares[name] for name in COLOURS]
    axes[2].stackplot(steps, *shares, labels=COLOURS, colors=COLOURS.values())
    titles = (
        "entropy of the prediction",
        "share of elements that change",
        "elements, first sample",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylim(0, 1)
    axes[0].legend(fontsize=7)
    axes[2].legend(fontsize=7, loc="center right")
    figure.savefig(file, dpi=80)
    return file


def write_traces(
    folder: Path, traces: Trace, pipeline: GeneratorPipeline, labels: Sequence[str]
) -> list[Path]:
    """Write an animation of every sample that was traced, and their curves.

    Args:
        folder: Where to; nothing is written if nothing was traced.
        traces: What an observer has remembered.
        pipeline: Decodes the complete samples.
        labels: What was asked for, sample by sample.
    """
    shown = dict(zip(traces, labels, strict=False))
    files = []
    for number, label in shown.items():
        stem = folder / f"{number:05d}-steps"
        files += write_animation(stem, traces[number], pipeline, label=label)
    if shown:
        curves = [traces[number] for number in shown]
        files.append(write_curves(folder / "steps.png", curves, list(shown.values())))
    return files
