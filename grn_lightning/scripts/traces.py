"""Files of a refinement: an animation of its steps, and its curves."""

from collections.abc import Sequence
from pathlib import Path

from grn_lightning.media.refinement import COLOURS
from grn_lightning.pipelines import GeneratorPipeline
from grn_lightning.pipelines.inspection import trace_pages
from grn_lightning.samplers.trace import SampleTrace, Trace
from grn_lightning.scripts.pictures import as_frames, write_clip

_STEPS_PER_SECOND = 4.0
_HOLD = 6  # so many times the last step is shown


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
    pages = trace_pages(pipeline, trace, label=label)
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
