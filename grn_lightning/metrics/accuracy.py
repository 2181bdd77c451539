"""Loss and accuracy of a generator on held-out samples, also by time of the process."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from grn_lightning.functional.losses import accuracy_by_time


class TimeBinnedResult(NamedTuple):
    """Means over all samples of all devices."""

    loss: Tensor
    """Mean cross-entropy per element, in nats; NaN without samples."""
    accuracy: Tensor
    """Mean share of right elements, in [0, 1]."""
    accuracy_by_time: Tensor
    """`(num_bins,)`: the same for the samples of each bin of t; NaN for empty bins."""


class TimeBinnedAccuracy(Metric):
    """Sums in float64, so that neither ranks nor batch sizes change a mean.

    Args:
        num_bins: Equal bins of t in [0, 1].
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    sums: Tensor
    bin_sums: Tensor
    bin_counts: Tensor

    def __init__(self, *, num_bins: int = 10):
        super().__init__()
        self.num_bins = num_bins
        zeros = torch.zeros(num_bins, dtype=torch.float64)
        self.add_state("sums", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("bin_sums", zeros, dist_reduce_fx="sum")
        self.add_state("bin_counts", zeros.clone(), dist_reduce_fx="sum")

    def update(self, loss: Tensor, accuracy: Tensor, t: Tensor, weights: Tensor) -> None:
        """Add samples.

        Args:
            loss: `(b,)` mean cross-entropy of each sample.
            accuracy: `(b,)` share of right elements of each sample.
            t: `(b,)` times in [0, 1].
            weights: `(b,)`; samples of weight 0 are padding.
        """
        counts = weights > 0
        loss, accuracy, t = loss[counts].double(), accuracy[counts].double(), t[counts]
        self.sums += torch.stack([loss.sum(), accuracy.sum(), counts.sum().double()])
        bin_sums, bin_counts = accuracy_by_time(accuracy.float(), t, num_bins=self.num_bins)
        self.bin_sums += bin_sums
        self.bin_counts += bin_counts

    def compute(self) -> TimeBinnedResult:
        """Return the means."""
        loss, accuracy, count = self.sums
        return TimeBinnedResult(loss / count, accuracy / count, self.bin_sums / self.bin_counts)
