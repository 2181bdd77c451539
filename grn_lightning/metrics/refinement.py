"""Drawn codes beside true ones of the same conditions, and alarms where the former have collapsed.

A generator that draws one thing whatever it is asked trains on without an error, and its loss may
even look well: what falls is the difference between samples, the entropy of codes, the balance of
bits.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from grn_lightning.functional import pairwise_difference
from grn_lightning.metrics.codes import CodeReport, CodeStatistics

_MIN_SAMPLES = 4  # fewer cannot show a collapse
_ADVICE = "look at the samples, and at the loss of both; then lower the learning rate"


class CodeComparison(NamedTuple):
    """Codes of drawn samples and of as many true ones."""

    drawn: CodeReport
    """How the drawn ones use their bits."""
    true: CodeReport
    """How the true ones do."""
    drawn_difference: float
    """Mean share of codes in which two drawn samples differ; NaN for a single sample."""
    true_difference: float
    """The same of the true ones."""
    num_samples: int
    """Of each kind."""

    @property
    def balance_gap(self) -> Tensor:
        """`(m,)` in [0, 1]: how far the shares of ones lie apart, by round."""
        pair = [report.ones_fraction.reshape(-1) for report in (self.drawn, self.true)]
        return (pair[0] - pair[1]).abs()

    @property
    def entropy_ratio(self) -> float:
        """Mean entropy of a channel's codes, drawn over true; NaN if the true ones have none."""
        drawn, true = (report.channel_entropy.mean() for report in (self.drawn, self.true))
        return float(drawn / true)

    @property
    def difference_ratio(self) -> float:
        """How much drawn samples differ from one another, over how much true ones do."""
        if self.true_difference == 0:
            return float("nan")
        return self.drawn_difference / self.true_difference


def compare_codes(drawn: Tensor, true: Tensor, *, num_rounds: int) -> CodeComparison:
    """Compare drawn codes with true ones.

    Args:
        drawn: `(b, d, *grid)` long in `[0, 2**num_rounds)`.
        true: The same of held-out samples, best of the same conditions.
        num_rounds: Bits of a code.

    Raises:
        ValueError: If they differ in shape.
    """
    if drawn.shape != true.shape:
        raise ValueError(
            f"drawn and true codes must have one shape, got {tuple(drawn.shape)} and "
            f"{tuple(true.shape)}."
        )
    reports, differences = [], []
    for codes in (drawn, true):
        statistics = CodeStatistics(num_channels=codes.shape[1], num_rounds=num_rounds)
        statistics.update(codes.cpu())
        reports.append(statistics.compute())
        is_pair = len(codes) > 1
        differences.append(float(pairwise_difference(codes)) if is_pair else float("nan"))
    return CodeComparison(
        drawn=reports[0],
        true=reports[1],
        drawn_difference=differences[0],
        true_difference=differences[1],
        num_samples=len(drawn),
    )


@dataclass(frozen=True, kw_only=True)
class RefinementAlarms:
    """Limits beyond which drawn samples are said to have collapsed; all are shares in [0, 1]."""

    max_balance_gap: float = 0.2
    """Distance between the shares of ones of drawn and true bits, in every round."""
    min_entropy_ratio: float = 0.5
    """Entropy of drawn codes over that of true ones."""
    min_difference_ratio: float = 0.5
    """Difference between drawn samples over that between true ones."""

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        issues = [
            f"{k} must be in [0, 1], got {v}" for k, v in vars(self).items() if not 0 <= v <= 1
        ]
        if issues:
            raise ValueError("RefinementAlarms: " + "; ".join(issues) + ".")

    def sentences(self, found: CodeComparison, entropy: Tensor | None = None) -> list[str]:
        """Return what looks wrong, a sentence each; nothing of codes with fewer than 4 samples.

        Args:
            found: Drawn codes beside true ones.
            entropy: Entropies of the prediction by step, in any shape, NaN where no step was taken.
        """
        texts = [] if entropy is None else self._broken(entropy)
        if found.num_samples < _MIN_SAMPLES:
            return texts
        gaps = enumerate(found.balance_gap.tolist())
        ones = found.drawn.ones_fraction.reshape(-1), found.true.ones_fraction.reshape(-1)
        texts += [
            f"bits of round {n} are ones in {float(ones[0][n]):.0%} of drawn codes and in "
            f"{float(ones[1][n]):.0%} of true ones (alarm beyond {self.max_balance_gap:.0%}); "
            f"{_ADVICE}."
            for n, gap in gaps
            if gap > self.max_balance_gap
        ]
        limits = {
            "codes of drawn samples carry {} of the entropy of true ones": (
                found.entropy_ratio,
                self.min_entropy_ratio,
            ),
            "drawn samples differ from one another {} as much as true ones": (
                found.difference_ratio,
                self.min_difference_ratio,
            ),
        }
        texts += [
            f"{text.format(f'{ratio:.0%}')} (alarm below {limit:.0%}); {_ADVICE}."
            for text, (ratio, limit) in limits.items()
            if ratio < limit
        ]
        return texts

    def _broken(self, entropy: Tensor) -> list[str]:
        """Say so if a sample has no entropy at its first step: the generator returned NaN."""
        first = entropy.reshape(entropy.shape[0], -1)[0]
        if torch.isfinite(first).all():
            return []
        return ["the generator returned NaN; look at its weights and its precision."]
