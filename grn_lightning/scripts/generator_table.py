"""Table, protocol and drawing of `grn bench generators`."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grn_lightning.scripts.bench_parts import Spread, cell
from grn_lightning.scripts.generator_records import ARMS, ArmResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HUES = {"vq": "#e8762c", "hbq": "#3d83f0"}
_FINE = 0.45  # opacity of the part of stage 2


@dataclass(frozen=True)
class Row:
    """An arm with its seeds."""

    arm: str
    """Its name."""
    results: tuple[ArmResult, ...]
    """By seed."""

    def spread(self, value: Callable[[ArmResult], float | None]) -> Spread | None:
        """Return mean and deviation of a number; None where it is not defined."""
        values = [value(result) for result in self.results]
        known = tuple(v for v in values if v is not None)
        return Spread(known) if len(known) == len(values) else None


def rows_of(results: Sequence[ArmResult]) -> list[Row]:
    """Group results by arm, known arms in their order, others behind them by name."""
    groups: dict[str, list[ArmResult]] = defaultdict(list)
    for result in results:
        groups[result.arm].append(result)
    order = {name: place for place, name in enumerate(ARMS)}
    return [
        Row(arm, tuple(sorted(groups[arm], key=lambda r: r.seed)))
        for arm in sorted(groups, key=lambda arm: (order.get(arm, len(order)), arm))
    ]


def _millions(result: ArmResult) -> float:
    return sum(result.num_parameters) / 1e6


def _forwards(result: ArmResult) -> str:
    text = str(result.num_forwards)
    return f"{text} (+ {result.num_head_calls})" if result.num_head_calls else text


def markdown(rows: Sequence[Row]) -> str:
    """Return the table; numbers are mean ± standard deviation over seeds."""
    header = (
        "arm",
        "bits/picture",
        "of stage 1",
        "FID",
        "right digits (%)",
        "guidance",
        "ms/picture",
        "of decoding",
        "forwards (+ head)",
        "parameters (M)",
        "training (s)",
        "seeds",
    )
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for row in rows:
        scales = dict.fromkeys(f"{r.judged.guidance_scale:g}" for r in row.results)
        cells = (
            row.arm,
            cell(row.spread(lambda r: r.bits), 1),
            cell(row.spread(lambda r: r.coarse_bits), 1),
            cell(row.spread(lambda r: r.judged.fid), 2),
            cell(row.spread(lambda r: 100 * r.judged.accuracy), 1),
            ", ".join(scales),
            cell(row.spread(lambda r: 1000 * r.draw_seconds), 2),
            cell(row.spread(lambda r: 1000 * r.decode_seconds), 2),
            _forwards(row.results[0]),
            f"{_millions(row.results[0]):.2f}",
            cell(row.spread(lambda r: sum(r.train_seconds)), 0),
            ", ".join(str(r.seed) for r in row.results),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def protocol(rows: Sequence[Row]) -> list[str]:
    """Say how the numbers came about, and what bounds them."""
    first, shared = rows[0].results[0], rows[0].results[0].shared
    scales = ", ".join(f"{scale:g}" for scale in shared["guidance_scales"])
    lines = [
        f"Trained on {sum(first.num_samples)} samples per arm ({shared['max_steps']} updates of "
        f"{shared['batch_size']}), of which stage 1 of coarse-to-fine prediction has a share of "
        f"{shared['coarse_share']:g}; optimizer {shared['optim']['name']}, averaged weights.",
        f"Bits: held-out, given the class, without guidance; codes are stored in "
        f"{first.code_bits:g} bits. They compare arms of one tokenizer.",
        f"FID[digits-cnn,{first.judged.num_pictures},val] against "
        f"{first.reconstructed.num_pictures} held-out pictures, and digits read by the judge. "
        f"Guidance: the scale out of {scales} with the smallest FID on "
        f"{first.tried[0].num_pictures} pictures of another seed; the GRN takes "
        f"{shared['num_steps']} steps.",
        f"As many training pictures: FID {first.real.fid:.2f}, "
        f"{100 * first.real.accuracy:.1f} % right digits.",
    ]
    seen: dict[str, ArmResult] = {}
    for row in rows:
        seen.setdefault(row.results[0].plan["tokenizer"], row.results[0])
    for name, result in seen.items():
        bound = result.reconstructed
        lines.append(
            f"Held-out pictures after the tokenizer {name} ({result.tokenizer_hash[:12]}): FID "
            f"{bound.fid:.2f}, {100 * bound.accuracy:.1f} % right digits."
        )
    lines.append("Times are of the process on a CPU, batches as in training.")
    return lines


def _bars(
    axes: "Axes", rows: Sequence[Row], value: Callable[[ArmResult], float | None], alpha: float
) -> None:
    """Draw a bar at the mean of each arm."""
    for place, row in enumerate(rows):
        spread, hue = row.spread(value), _HUES[row.results[0].plan["tokenizer"]]
        if spread is not None:
            axes.barh(place, spread.mean, color=hue, alpha=alpha)


def _dots(axes: "Axes", rows: Sequence[Row], value: Callable[[ArmResult], float | None]) -> None:
    """Draw a dot per seed."""
    for place, row in enumerate(rows):
        spread, hue = row.spread(value), _HUES[row.results[0].plan["tokenizer"]]
        if spread is None:
            axes.text(0, place, "  not defined", va="center", fontsize=8, color="#666666")
            continue
        axes.plot(
            spread.values, [place] * len(spread.values), "o", color=hue, markersize=5, mec="white"
        )


def _bounds(axes: "Axes", rows: Sequence[Row], value: Callable[[ArmResult], float]) -> None:
    """Draw a tick at what the tokenizer of each arm allows."""
    for place, row in enumerate(rows):
        bound = statistics.fmean(value(result) for result in row.results)
        axes.plot([bound, bound], [place - 0.4, place + 0.4], color="#2c3e50", linewidth=1.5)


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw bits, Frechet distance, right digits and time, a bar per arm and a dot per seed.

    Hues are tokenizers; a paler part is stage 2, or decoding. A dark tick is the tokenizer's bound.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = list(reversed(rows))
    figure = Figure(figsize=(14, 0.5 * len(rows) + 1.6), layout="constrained")
    bits, fid, digits, pace = figure.subplots(1, 4, sharey=True)
    _bars(bits, rows, lambda r: r.bits, _FINE)
    _bars(bits, rows, lambda r: r.bits if r.coarse_bits is None else r.coarse_bits, _FINE)
    _dots(bits, rows, lambda r: r.bits)
    bits.set(xlabel="held-out bits per picture (darker: stage 1)")
    _bars(fid, rows, lambda r: r.judged.fid, _FINE)
    _dots(fid, rows, lambda r: r.judged.fid)
    _bounds(fid, rows, lambda r: r.reconstructed.fid)
    fid.set(xlabel="FID[digits-cnn], lower is better\n(tick: reconstructions)")
    _bars(digits, rows, lambda r: 100 * r.judged.accuracy, _FINE)
    _dots(digits, rows, lambda r: 100 * r.judged.accuracy)
    _bounds(digits, rows, lambda r: 100 * r.reconstructed.accuracy)
    digits.set(xlabel="right digits in %, higher is better\n(tick: reconstructions)", xlim=(0, 102))
    _bars(pace, rows, lambda r: 1000 * r.draw_seconds, _FINE)
    _bars(pace, rows, lambda r: 1000 * r.codes_seconds, _FINE)
    _dots(pace, rows, lambda r: 1000 * r.draw_seconds)
    pace.set(xlabel="milliseconds per picture (paler: decoding)")
    bits.set_yticks(range(len(rows)), [row.arm for row in rows])
    for axes in (bits, fid, digits, pace):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25, linewidth=0.6, axis="x")
        axes.spines[["top", "right"]].set_visible(False)
    names = dict.fromkeys(row.results[0].plan["tokenizer"] for row in rows)
    patches = [Patch(color=_HUES[name], alpha=0.7, label=f"codes of {name}") for name in names]
    figure.legend(handles=patches, loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    figure.savefig(file, format="png", dpi=120)
