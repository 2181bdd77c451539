"""Table and drawing of `grn bench quantizers`."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grn_lightning.scripts.bench_parts import Spread, cell
from grn_lightning.scripts.quantizer_records import ArmResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HUES = ("#3d83f0", "#e8762c", "#19a078", "#b565d8", "#8a8f98", "#cc9a06", "#c0392b", "#2c3e50")
_CONTINUOUS = "none"
_SIDE_STEP = 1.035  # ratio on the logarithmic axis between arms of one budget


@dataclass(frozen=True)
class Row:
    """An arm with its seeds."""

    arm: str
    """Its name."""
    num_rounds: int
    """Rounds of its budget."""
    results: tuple[ArmResult, ...]
    """By seed."""

    def spread(self, value: Callable[[ArmResult], float | None]) -> Spread | None:
        """Return mean and deviation of a number; None where it is not defined."""
        values = [value(result) for result in self.results]
        known = tuple(v for v in values if v is not None)
        return Spread(known) if len(known) == len(values) else None

    def gap(self, to: "Row | None") -> Spread | None:
        """Return the difference in PSNR to another row with the same seeds, seed by seed."""
        if to is None:
            return None
        psnr = {result.seed: result.psnr for result in to.results}
        pairs = [(r.psnr, psnr[r.seed]) for r in self.results if r.seed in psnr]
        return Spread(tuple(ours - theirs for ours, theirs in pairs)) if pairs else None


def rows_of(results: Sequence[ArmResult]) -> list[Row]:
    """Group results by budget and arm, best reconstruction first within a budget."""
    groups: dict[tuple[int, str], list[ArmResult]] = defaultdict(list)
    for result in results:
        groups[result.num_rounds, result.arm].append(result)
    rows = [
        Row(arm, rounds, tuple(sorted(group, key=lambda r: r.seed)))
        for (rounds, arm), group in groups.items()
    ]
    return sorted(rows, key=lambda row: (row.num_rounds, -statistics.fmean(_psnr(row))))


def _psnr(row: Row) -> list[float]:
    return [result.psnr for result in row.results]


def markdown(rows: Sequence[Row]) -> str:
    """Return the table; numbers are mean ± standard deviation over seeds."""
    header = (
        "arm",
        "M",
        "codes x values",
        "bits/pixel",
        "PSNR (dB)",
        "to none (dB)",
        "SSIM",
        "rFID",
        "usage",
        "entropy",
        "ms/step",
        "seeds",
    )
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for row in rows:
        first = row.results[0]
        same = [r for r in rows if r.arm == _CONTINUOUS and r.num_rounds == row.num_rounds]
        gap = row.gap(same[0]) if same and row.arm != _CONTINUOUS else None
        has_codes = first.code_channels > 0
        cells = (
            row.arm,
            str(row.num_rounds),
            f"{first.code_channels} x {first.alphabet_size}" if has_codes else "continuous",
            f"{first.bits_per_pixel:.4g}" if first.bits_per_pixel is not None else "-",
            cell(row.spread(lambda r: r.psnr), 2),
            cell(gap, 2),
            cell(row.spread(lambda r: r.ssim), 4),
            cell(row.spread(lambda r: r.fid), 2),
            cell(row.spread(lambda r: r.usage), 2),
            cell(row.spread(lambda r: r.entropy), 2),
            cell(row.spread(lambda r: r.step_milliseconds), 0),
            ", ".join(str(r.seed) for r in row.results),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def alarms(rows: Sequence[Row]) -> list[str]:
    """Return what looked collapsed, with the arm and the seed."""
    return [
        f"{row.arm}, M={row.num_rounds}, seed {result.seed}: {text}"
        for row in rows
        for result in row.results
        for text in result.alarms
    ]


def _scatter(
    axes: "Axes",
    rows: Sequence[Row],
    hues: dict[str, str],
    value: Callable[[ArmResult], float | None],
) -> None:
    """Draw a dot per seed and a bar at the mean; arms of equal bits stand side by side."""
    arms = sorted(hues)
    for row in rows:
        spread, hue = row.spread(value), hues[row.arm]
        assert spread is not None
        bits = row.results[0].bits_per_pixel
        if bits is None:
            axes.axhline(spread.mean, color=hue, linestyle="--", linewidth=1, label=row.arm)
            continue
        x = bits * _SIDE_STEP ** (arms.index(row.arm) - (len(arms) - 1) / 2)
        is_first = row is next(r for r in rows if r.arm == row.arm)
        axes.plot([x] * len(spread.values), spread.values, "o", color=hue, markersize=4, alpha=0.6)
        label = row.arm if is_first else None
        axes.plot([x], [spread.mean], "_", color=hue, markersize=16, mew=2.5, label=label)


def _rounds_line(axes: "Axes", rows: Sequence[Row], hues: dict[str, str]) -> None:
    """Draw the PSNR of HBQ's models, mean over seeds, over the rounds that are decoded."""
    for row in rows:
        bits, curves = row.results[0].bits_per_pixel, [r.psnr_by_rounds for r in row.results]
        rounds = [int(way) for way in curves[0] if way.isdecimal()]
        if bits is None or not rounds:
            continue
        y = [statistics.fmean(curve[str(m)] for curve in curves) for m in rounds]
        x = [bits * m / row.num_rounds for m in rounds]
        label = f"{row.arm} M={row.num_rounds}, decoded from 1..{rounds[-1]} rounds"
        axes.plot(x, y, "-", color=hues[row.arm], linewidth=1, alpha=0.7, label=label)


def _bits_axis(axes: "Axes", rows: Sequence[Row]) -> None:
    """Number the budgets, and their halves and doubles, which are other rounds of HBQ."""
    budgets = {row.results[0].bits_per_pixel for row in rows if row.results[0].code_channels}
    known = sorted(bits for bits in budgets if bits is not None)
    axes.set(xscale="log", xlabel="bits per pixel (arms of one budget stand side by side)")
    if not known:
        return
    largest = max(known)  # nearly equal budgets, as of FSQ, share a tick
    ticks = [largest * 2.0**power for power in range(-4, 2)]
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(min(known) / 5, largest * 2.3)


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw PSNR and the Frechet distance (or SSIM) over bits per pixel, and the time of an update.

    A dot is a seed. The line is HBQ's models decoded from 1, 2, ... rounds; the dashed line is the
    mean without a quantizer.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    quality, second, pace = figure.subplots(1, 3, width_ratios=(1.5, 1.1, 1))
    hues = {n: _HUES[k % len(_HUES)] for k, n in enumerate(sorted({row.arm for row in rows}))}
    _scatter(quality, rows, hues, lambda r: r.psnr)
    _rounds_line(quality, rows, hues)
    quality.set(ylabel="PSNR in dB, higher is better")
    has_fid = all(result.fid is not None for row in rows for result in row.results)
    _scatter(second, rows, hues, lambda r: r.fid if has_fid else r.ssim)
    second.set(ylabel="rFID, lower is better" if has_fid else "SSIM, higher is better")
    for axes in (quality, second):
        _bits_axis(axes, rows)
    for place, row in enumerate(reversed(rows)):
        times = [result.step_milliseconds for result in row.results]
        pace.barh(place, statistics.fmean(times), color=hues[row.arm], alpha=0.5)
        pace.plot(times, [place] * len(times), "o", color=hues[row.arm], markersize=4)
    pace.set_yticks(range(len(rows)), [f"{row.arm} M={row.num_rounds}" for row in reversed(rows)])
    pace.set(xlabel="milliseconds per update, data included")
    for axes in (quality, second, pace):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    quality.legend(frameon=False, fontsize=8)
    figure.savefig(file, format="png", dpi=120)
