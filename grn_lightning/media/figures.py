"""Small figures: lines, areas and bars as pictures that are still readable at 360 pixels.

Every function returns one picture with one message. Matplotlib is imported when the first one is
drawn.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

_SIZE = (4.8, 3.0)  # inches
_DPI = 100
_HUES = ("#3b6fb6", "#d1495b", "#3aa76d", "#a06bb8", "#c98a1b", "#6b7280")
_MAX_TICKS = 20  # labels below bars; of more, every so many-th
_FEW_BARS = 6  # fewer are not made wider
_MAX_NAMED = 6  # lines with an entry in the legend; more are thin and have none


def _figure(title: str, x_label: str, y_limits: tuple[float, float] | None) -> tuple[Any, Any]:
    """Return an empty figure and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label)
    if y_limits is not None:
        axes.set_ylim(*y_limits)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2, linewidth=0.6)
    return figure, axes


def _picture(figure: Any) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def line_figure(
    lines: Mapping[str, Tensor],
    *,
    title: str,
    x_label: str,
    x: Tensor | None = None,
    y_limits: tuple[float, float] | None = None,
    mean: bool = False,
    reference: Mapping[str, Tensor] | None = None,
) -> Image.Image:
    """Draw lines over one axis.

    Args:
        lines: `(n,)` float each, by name; NaN ends a line.
        title: What is shown, with its unit.
        x_label: What the horizontal axis means.
        x: `(n,)`; None counts from 1.
        y_limits: Ends of the vertical axis; None fits the values.
        mean: Add the mean of the lines where they go on, in black.
        reference: Further lines to compare with, dashed.

    Raises:
        ValueError: If there is no line.
    """
    if not lines:
        raise ValueError("a figure of lines needs at least one line, got none.")
    figure, axes = _figure(title, x_label, y_limits)
    length = len(next(iter(lines.values())))
    across = range(1, length + 1) if x is None else x.tolist()
    many = len(lines) > _MAX_NAMED
    style = {"linewidth": 0.9, "alpha": 0.55} if mean or many else {"linewidth": 1.6}
    marker = "." if length < 40 else ""
    for number, (name, values) in enumerate(lines.items()):
        hue = _HUES[number % len(_HUES)]
        label = None if many else name
        axes.plot(across, values.tolist(), color=hue, label=label, marker=marker, **style)
    if mean:
        together = torch.stack([values.cpu().float() for values in lines.values()]).nanmean(0)
        axes.plot(across, together.tolist(), color="#202020", linewidth=2.0, label="mean")
    for name, values in (reference or {}).items():
        axes.plot(
            across, values.tolist(), color="#202020", linewidth=0.9, linestyle="--", label=name
        )
    if len(lines) > 1 or mean or reference:
        axes.legend(fontsize=7, frameon=False)
    return _picture(figure)


def area_figure(
    shares: Mapping[str, Tensor], colours: Mapping[str, str], *, title: str, x_label: str
) -> Image.Image:
    """Draw shares that add up to one as areas upon each other.

    Args:
        shares: `(n,)` float in [0, 1] each, by name.
        colours: Of every name.
        title: What is shown.
        x_label: What the horizontal axis means; it counts from 1.
    """
    figure, axes = _figure(title, x_label, (0.0, 1.0))
    across = range(1, len(next(iter(shares.values()))) + 1)
    values = [part.tolist() for part in shares.values()]
    axes.stackplot(across, *values, labels=list(shares), colors=[colours[name] for name in shares])
    axes.legend(fontsize=7, loc="center right")
    return _picture(figure)


def bar_figure(
    groups: Mapping[str, Tensor],
    labels: Sequence[str],
    *,
    title: str,
    x_label: str,
    y_limits: tuple[float, float] | None = None,
    middle: float | None = None,
    whole: bool = False,
) -> Image.Image:
    """Draw bars side by side.

    Args:
        groups: `(n,)` float each, by name; bars of one group have one colour.
        labels: `n` names below the bars.
        title: What is shown, with its unit.
        x_label: What the labels are.
        y_limits: Ends of the vertical axis; None fits the values.
        middle: Height of a dashed line to compare with.
        whole: The heights are counts: mark whole numbers only.

    Raises:
        ValueError: If there is not a label for every bar of a group.
    """
    for name, values in groups.items():
        if len(values) != len(labels):
            raise ValueError(
                f"'{name}' needs {len(labels)} bars, one per label, got {len(values)}."
            )
    figure, axes = _figure(title, x_label, y_limits)
    width = 0.8 / len(groups)
    for number, (name, values) in enumerate(groups.items()):
        shift = (number - (len(groups) - 1) / 2) * width
        left = [place + shift for place in range(len(values))]
        axes.bar(left, values.tolist(), width, color=_HUES[number % len(_HUES)], label=name)
    if whole:
        axes.yaxis.get_major_locator().set_params(integer=True)
    if middle is not None:
        axes.axhline(middle, color="#202020", linewidth=0.9, linestyle="--")
    every = -(-len(labels) // _MAX_TICKS)
    axes.set_xticks(range(0, len(labels), every), labels[::every])
    room = max(len(labels), _FEW_BARS) / 2
    axes.set_xlim((len(labels) - 1) / 2 - room, (len(labels) - 1) / 2 + room)
    axes.grid(axis="x", visible=False)
    if len(groups) > 1:
        axes.legend(fontsize=7, frameon=False)
    return _picture(figure)
