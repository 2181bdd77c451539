"""Teacher-forced accuracy of a generator by time of the process and by round of the quantizer."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class RoundAccuracyResult(NamedTuple):
    """Means over all samples of all devices; NaN for bins of time without a sample."""

    loss: Tensor
    """`(n,)`: mean cross-entropy per element, in nats."""
    accuracy: Tensor
    """`(n,)` in [0, 1]: share of right elements."""
    by_round: Tensor
    """`(n, m)` in [0, 1]: share of right bits; round 0 is the most significant."""
    num_samples: Tensor
    """`(n,)`: samples in each bin of time."""

    @property
    def mean_by_round(self) -> Tensor:
        """`(m,)`: share of right bits, mean over the bins that have samples."""
        return self.by_round.nanmean(0)


class RoundAccuracy(Metric):
    """Sums in float64, so that neither ranks nor batch sizes change a mean.

    Args:
        num_rounds: Rounds `m` of the quantizer.
        num_bins: Equal bins of t in [0, 1].
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    sums: Tensor

    def __init__(self, *, num_rounds: int, num_bins: int = 10):
        super().__init__()
        if num_rounds < 1 or num_bins < 1:
            raise ValueError(
                f"num_rounds and num_bins must be at least 1, got {num_rounds} and {num_bins}."
            )
        self.num_rounds, self.num_bins = num_rounds, num_bins
        zeros = torch.zeros(num_bins, 3 + num_rounds, dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")

    def update(
        self, loss: Tensor, accuracy: Tensor, by_round: Tensor, t: Tensor, weights: Tensor
    ) -> None:
        """Add samples.

        Args:
            loss: `(b,)` mean cross-entropy of each sample's elements.
            accuracy: `(b,)` share of right elements.
            by_round: `(b, m)` share of right bits.
            t: `(b,)` times in [0, 1].
            weights: `(b,)`; samples of weight 0 are left out, all others count once.
        """
        rows = torch.cat(
            [torch.ones_like(loss)[:, None], loss[:, None], accuracy[:, None], by_round], dim=1
        )
        bins = (t * self.num_bins).long().clamp(0, self.num_bins - 1)
        is_in_bin = torch.nn.functional.one_hot(bins, self.num_bins).double()  # (b, n)
        counts = (weights > 0).double()[:, None]
        self.sums += (is_in_bin * counts).t() @ rows.double()

    def compute(self) -> RoundAccuracyResult:
        """Return the means."""
        count, loss, accuracy = self.sums[:, :3].unbind(1)
        by_round = self.sums[:, 3:] / count[:, None]
        return RoundAccuracyResult(loss / count, accuracy / count, by_round, count.long())
