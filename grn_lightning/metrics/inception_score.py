r"""Inception score from running sums (Salimans et al. 2016).

    exp( mean over samples of KL( p(y | x) || p(y) ) )

The score is taken of parts of the samples and averaged. Publications differ in the parts: 10 of
shuffled samples (torch-fidelity), or 5000 samples each, which must be in random order (ADM). When
the number of samples is known from the start, so is the part of every sample; then a part needs
only the sums of p and of p log p, and nothing has to be kept.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from grn_lightning.metrics.protocols import Convention
from grn_lightning.metrics.reference import check_features

_SEED = 2020  # torch-fidelity's, for its shuffle


class Score(NamedTuple):
    """A mean over parts or subsets."""

    mean: Tensor
    """float64."""
    spread: Tensor
    """Standard deviation over the parts, float64, of the population."""


def parts_of_samples(num_samples: int, convention: Convention) -> Tensor:
    """Return the part of every sample, `(num_samples,)` long.

    Raises:
        ValueError: If there are fewer samples than parts.
    """
    position = torch.arange(num_samples)
    if convention.score_part_size is not None:
        parts = position // convention.score_part_size
    else:
        assert convention.score_parts is not None
        count = convention.score_parts
        if num_samples < count:
            raise ValueError(
                f"an Inception score of {count} parts needs at least as many samples, got "
                f"{num_samples}."
            )
        ends = torch.arange(1, count + 1) * num_samples // count
        parts = torch.searchsorted(ends, position, right=True)
    if convention.score_order == "in order":
        return parts
    # Position i of the shuffled samples is taken by sample order[i].
    order = torch.from_numpy(np.random.RandomState(_SEED).permutation(num_samples))
    return torch.empty_like(parts).scatter_(0, order, parts)


class InceptionScore(Metric):
    """Inception score of a known number of samples; memory does not grow with them.

    Args:
        num_classes: Width of the logits.
        num_samples: Samples that will come, over all processes.
        convention: How they are spread over parts; see `protocols.CONVENTIONS`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    probabilities: Tensor
    entropies: Tensor
    counts: Tensor

    def __init__(self, num_classes: int, *, num_samples: int, convention: Convention) -> None:
        super().__init__()
        self.num_classes, self.num_samples = num_classes, num_samples
        self.parts = parts_of_samples(num_samples, convention)
        num_parts = int(self.parts.max()) + 1
        sums = torch.zeros(num_parts, num_classes, dtype=torch.float64)
        self.add_state("probabilities", sums, dist_reduce_fx="sum")
        self.add_state("entropies", sums[:, 0].clone(), dist_reduce_fx="sum")
        self.add_state("counts", sums[:, 0].long(), dist_reduce_fx="sum")

    def update(self, logits: Tensor, sample_index: Tensor) -> None:
        """Add samples.

        Args:
            logits: `(n, num_classes)`.
            sample_index: `(n,)` long in `[0, num_samples)`: the number of each sample.

        Raises:
            ValueError: If a logit is not finite, or a number out of range.
        """
        check_features(logits, self.num_classes)
        if not len(logits):
            return
        if not 0 <= int(sample_index.min()) <= int(sample_index.max()) < self.num_samples:
            raise ValueError(
                f"sample_index must lie in [0, {self.num_samples}), got {int(sample_index.min())} "
                f"to {int(sample_index.max())}."
            )
        part = self.parts[sample_index.cpu()].to(logits.device)
        p = logits.double().softmax(1)
        self.probabilities.index_add_(0, part, p)
        self.entropies.index_add_(0, part, torch.special.entr(p).sum(1))
        self.counts += torch.bincount(part, minlength=len(self.counts))

    def compute(self) -> Score:
        """Return mean and spread over the parts.

        Raises:
            ValueError: If not all samples have come, whose parts would be uneven.
        """
        if int(self.counts.sum()) != self.num_samples:
            raise ValueError(
                f"the Inception score was announced for {self.num_samples} samples, got "
                f"{int(self.counts.sum())}; parts are drawn for the announced number."
            )
        marginal = self.probabilities / self.counts[:, None]
        divergence = torch.special.entr(marginal).sum(1) - self.entropies / self.counts
        scores = divergence.exp()
        return Score(scores.mean(), scores.std(unbiased=False))
