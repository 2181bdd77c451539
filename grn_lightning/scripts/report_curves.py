"""Curves of a run's event files, drawn as light SVG that takes the colours of the page."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

_GUIDANCE = {"scalars": 0, "images": 1, "tensors": 1, "histograms": 1}  # 0 reads all
_MAX_POINTS = 300  # of a line; more are not seen
_WIDE_RANGE = 30.0  # from this ratio of largest to smallest on, a loss is drawn on a log scale
_INK = "#010203"  # stands for the text colour of the page
_HUES = ("#3d83f0", "#e8762c", "#19a078", "#b565d8", "#8a8f98", "#cc9a06")  # on white and on black
_SIZE = (4.2, 2.7)  # inches; text of 9 points is readable where the drawing fills a phone

_ACCURACY_BY_TIME = "val_accuracy/t"
_ACCURACY_BY_ROUND = "val_accuracy/round"
_NUM_BINS = 10  # of t, see `functional.losses.accuracy_by_time`


@dataclass(frozen=True)
class Series:
    """Values of one tag over a training."""

    steps: np.ndarray
    """Optimizer steps, `(n,)`."""
    minutes: np.ndarray
    """Minutes since the run began, `(n,)`."""
    values: np.ndarray
    """`(n,)`."""


@dataclass(frozen=True)
class History:
    """All scalars of one run, and its last pictures and texts."""

    series: dict[str, Series]
    """By tag."""
    started: float
    """Time of the first event, in seconds since 1970."""
    seconds: float
    """From the first event to the last."""
    pictures: dict[str, bytes] = field(default_factory=dict)
    """The last picture of every tag, PNG or GIF."""
    texts: dict[str, str] = field(default_factory=dict)
    """The last text of every tag."""


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    label: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    strength: float = 1.0
    """Opacity in (0, 1]."""
    hue: int | None = None
    """Which colour; None takes the next one."""


@dataclass(frozen=True)
class Chart:
    """A drawing and what it says."""

    title: str
    svg: str


def read_history(folder: Path) -> History | None:
    """Read the event files in or below a run's folder; None if there are none with scalars."""
    files = sorted(folder.rglob("events.out.tfevents.*"), key=lambda file: len(file.parts))
    if not files:
        return None
    events = EventAccumulator(str(files[0].parent), size_guidance=_GUIDANCE).Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    if not scalars:
        return None
    start = events.FirstEventTimestamp()
    series = {
        tag: Series(
            steps=np.array([point.step for point in points]),
            minutes=np.array([(point.wall_time - start) / 60 for point in points]),
            values=np.array([point.value for point in points]),
        )
        for tag, points in scalars.items()
    }
    end = max(point.wall_time for points in scalars.values() for point in points)
    return History(series, start, end - start, *_last_of(events))


def _last_of(events: EventAccumulator) -> tuple[dict[str, bytes], dict[str, str]]:
    """Return the last picture and the last text of every tag."""
    tags = events.Tags()
    pictures = {tag: events.Images(tag)[-1].encoded_image_string for tag in tags["images"]}
    texts = {
        tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in tags["tensors"]
        if tag.endswith("/text_summary")
    }
    return pictures, texts


def thin_out(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average neighbours until a line has few enough points."""
    group = -(-len(x) // _MAX_POINTS)
    cuts = range(0, len(x), group)
    return (
        np.array([x[cut : cut + group].mean() for cut in cuts]),
        np.array([y[cut : cut + group].mean() for cut in cuts]),
    )


def _is_wide(lines: Sequence[Line]) -> bool:
    values = np.concatenate([np.asarray(line.y, float) for line in lines])
    values = values[np.isfinite(values)]
    return len(values) > 0 and values.min() > 0 and values.max() / values.min() > _WIDE_RANGE


def draw_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_range: tuple[float, float] | None = None,
    may_be_log: bool = False,
) -> Chart:
    """Draw lines as an SVG element without colours, fonts or a background of its own.

    Args:
        title: What is shown, with its unit; it stands above the drawing.
        lines: At least one.
        x_label: What the horizontal axis means.
        y_range: Ends of the vertical axis; None fits the values.
        may_be_log: Take a log scale where values span more than a decade and a half.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}
    style |= {f"{part}.color": _INK for part in ("text", "xtick", "ytick")}
    style |= {"axes.edgecolor": _INK, "axes.labelcolor": _INK}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        for number, line in enumerate(lines):
            x, y = thin_out(np.asarray(line.x, float), np.asarray(line.y, float))
            axes.plot(
                x,
                y,
                color=_HUES[(number if line.hue is None else line.hue) % len(_HUES)],
                alpha=line.strength,
                label=line.label,
                linewidth=1.4,
                marker="o" if len(x) < 12 else "",
                markersize=3,
            )
        axes.set(xlabel=x_label, ylim=y_range)
        axes.set_yscale("log" if may_be_log and _is_wide(lines) else "linear")
        axes.grid(color=_INK, alpha=0.15, linewidth=0.6)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return Chart(title, _as_element(buffer.getvalue(), title))


def _as_element(svg: str, title: str) -> str:
    """Make an SVG file an element of a page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every drawing
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("xlink:href", "href").replace(_INK, "currentColor")
    label = title.replace("&", "and").replace('"', "").replace("<", "")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


# --- which curves ---------------------------------------------------------------------------------


def _over_steps(
    history: History, title: str, tags: dict[str, str], *, may_be_log: bool = False
) -> list[Chart]:
    known = {label: history.series[tag] for label, tag in tags.items() if tag in history.series}
    lines = [Line(label, s.steps, s.values) for label, s in known.items()]
    if not lines:
        return []
    return [draw_chart(title, lines, x_label="optimizer steps", may_be_log=may_be_log)]


def _over_minutes(
    history: History, title: str, tags: dict[str, str], y_range: tuple[float, float] | None = None
) -> list[Chart]:
    known = {label: history.series[tag] for label, tag in tags.items() if tag in history.series}
    lines = [Line(label, s.minutes, s.values) for label, s in known.items()]
    if not lines:
        return []
    return [draw_chart(title, lines, x_label="minutes of training", y_range=y_range)]


def _accuracy_by_time(history: History) -> list[Chart]:
    """Held-out accuracy over t at the first, the middle and the last validation."""
    bins = {
        (number + 0.5) / _NUM_BINS: history.series[f"{_ACCURACY_BY_TIME}{number / _NUM_BINS:.1f}"]
        for number in range(_NUM_BINS)
        if f"{_ACCURACY_BY_TIME}{number / _NUM_BINS:.1f}" in history.series
    }
    steps = sorted({int(step) for series in bins.values() for step in series.steps})
    if not steps:
        return []
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    lines = []
    for number, step in enumerate(chosen):
        points = {t: s.values[s.steps == step] for t, s in bins.items() if step in s.steps}
        lines.append(
            Line(
                label=f"after {step + 1} steps",
                x=list(points),
                y=[float(values[-1]) for values in points.values()],
                strength=(number + 1) / len(chosen),
                hue=0,
            )
        )
    title = "Share of right elements, held-out samples, by time t"
    return [draw_chart(title, lines, x_label="t (0 noise, 1 data)")]


def _accuracy_by_round(history: History) -> list[Chart]:
    """Held-out accuracy of every round of the quantizer over the training."""
    tags = sorted(
        (tag for tag in history.series if tag.startswith(_ACCURACY_BY_ROUND)),
        key=lambda tag: int(tag.removeprefix(_ACCURACY_BY_ROUND)),
    )
    named = {f"round {tag.removeprefix(_ACCURACY_BY_ROUND)}": tag for tag in tags}
    return _over_steps(history, "Share of right bits, held-out samples, by round", named)


def charts_of(history: History, *, judged_how: str = "") -> list[Chart]:
    """Draw what a run has logged: loss, PSNR, accuracy by time, and judges over time.

    Args:
        history: Its scalars.
        judged_how: Protocol of the judges during the training.
    """
    judged = [tag.removeprefix("val/") for tag in history.series if re.match(r"val/[^/]+\[", tag)]
    losses = {"training": "train/loss", "held out": "val/loss"}
    shares = {"digit right": "val/digit_accuracy", "direction right": "val/direction_accuracy"}
    how = f" ({judged_how})" if judged_how else ""
    return [
        *_over_steps(history, "Loss", losses, may_be_log=True),
        *_over_steps(history, "PSNR of held-out samples, dB", {"PSNR": "val/psnr"}),
        *_accuracy_by_time(history),
        *_accuracy_by_round(history),
        *_over_minutes(history, f"Share of samples judged right{how}", shares, (0.0, 1.03)),
        *(
            chart
            for tag in judged
            for chart in _over_minutes(history, f"{tag} of samples{how}", {tag: f"val/{tag}"})
        ),
    ]
