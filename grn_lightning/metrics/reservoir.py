"""A bounded, even sample of features, the same however the samples came.

Kernel distances and manifolds look at pairs of samples and cannot be had from sums. All features of
50k samples are 410 MB a set, gathered on every process; so at most a fixed number is kept: those
samples whose random number, a function of seed and sample number, is smallest. That is an even
draw without replacement; neither batches, order nor number of processes change which ones.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

from grn_lightning.functional.random import Stream, counter_uniform
from grn_lightning.metrics.reference import check_features

_EMPTY = torch.inf


class FeatureReservoir(Metric):
    """At most `capacity` features, float32, of as many samples as come.

    Args:
        num_features: Width `d` of the features.
        capacity: Features to keep; the memory is `capacity * (d + 4) * 4` bytes from the start.
        seed: Of the draw.
    """

    is_differentiable = False
    full_state_update = False
    features: Tensor
    priorities: Tensor
    indices: Tensor
    count: Tensor

    def __init__(self, num_features: int, *, capacity: int, seed: int = 0) -> None:
        super().__init__()
        if capacity < 2:
            raise ValueError(f"capacity must be at least 2, got {capacity}.")
        self.num_features, self.capacity, self.seed = num_features, capacity, seed
        # Processes are laid side by side here and drawn from in `compute`.
        self.add_state("features", torch.zeros(capacity, num_features), dist_reduce_fx=None)
        self.add_state("priorities", torch.full((capacity,), _EMPTY).double(), dist_reduce_fx=None)
        self.add_state("indices", torch.full((capacity,), -1), dist_reduce_fx=None)
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, features: Tensor, sample_index: Tensor) -> None:
        """Look at features.

        Args:
            features: `(n, d)`.
            sample_index: `(n,)` long: the number of each sample, which no other sample has.

        Raises:
            ValueError: If a feature is not finite or the shapes are others.
        """
        check_features(features, self.num_features)
        if sample_index.shape != (len(features),):
            raise ValueError(
                f"sample_index must be ({len(features)},), got {tuple(sample_index.shape)}."
            )
        self.count += len(features)
        if not len(features):
            return
        sample_index = sample_index.to(self.indices)
        priorities = torch.cat([self.priorities, self._priorities(sample_index)])
        kept = torch.zeros_like(priorities, dtype=torch.bool)
        kept[priorities.topk(self.capacity, largest=False).indices] = True
        # As many leave as enter, so only these rows move.
        leave = (~kept[: self.capacity]).nonzero().flatten()
        enter = kept[self.capacity :].nonzero().flatten()
        self.features[leave] = features[enter].detach().to(self.features)
        self.priorities[leave] = priorities[self.capacity + enter]
        self.indices[leave] = sample_index[enter]

    def _priorities(self, sample_index: Tensor) -> Tensor:
        """Random numbers of 48 bits: those of 24 would meet among a few thousand samples."""
        high, low = (
            counter_uniform(sample_index, seed=self.seed, step=0, stream=Stream.SUBSET, shape=(2,))
            .double()
            .unbind(1)
        )
        return high + low * 2.0**-24

    def compute(self) -> Tensor:
        """Return the kept features of all processes, `(m, d)` float32, by sample number.

        m is the capacity or the number of samples, whichever is less.
        """
        priorities, indices = self.priorities.flatten(), self.indices.flatten()
        features = self.features.flatten(0, -2)
        kept = priorities.topk(self.capacity, largest=False).indices
        kept = kept[priorities[kept] < _EMPTY]
        return features[kept[indices[kept].argsort()]]
