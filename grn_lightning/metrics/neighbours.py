"""Kernel distance and precision/recall of features that were kept."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from grn_lightning.functional.distances import (
    is_within_radii,
    neighbour_radii,
    polynomial_kernel_distance,
)
from grn_lightning.metrics.inception_score import Score

_SEED = 2020  # torch-fidelity's, for its subsets


def kernel_score(
    samples: Tensor, real: Tensor, *, num_subsets: int = 100, subset_size: int = 1000
) -> Score:
    """Return KID: the kernel distance of random subsets, averaged (Binkowski et al. 2018).

    The subsets are those of torch-fidelity for features in the same order.

    Args:
        samples: `(n, d)` features of generated samples.
        real: `(m, d)` features of real ones.
        num_subsets: How many subsets.
        subset_size: Samples of each set in a subset.

    Raises:
        ValueError: If a set has fewer samples than a subset.
    """
    if min(len(samples), len(real)) < subset_size or subset_size < 2:
        raise ValueError(
            f"subset_size must be at least 2 and at most the number of samples, got {subset_size} "
            f"for {len(samples)} generated and {len(real)} real ones."
        )
    rng = np.random.RandomState(_SEED)
    found = []
    for _ in range(num_subsets):
        picked = [
            one[torch.from_numpy(rng.choice(len(one), subset_size, replace=False)).to(one.device)]
            for one in (samples, real)
        ]
        found.append(polynomial_kernel_distance(*picked))
    values = torch.stack(found)
    return Score(values.mean(), values.std(unbiased=False))


class Manifolds(NamedTuple):
    """Improved precision and recall."""

    precision: Tensor
    """Share of generated samples on the manifold of real ones, float64."""
    recall: Tensor
    """Share of real samples on the manifold of generated ones, float64."""


def precision_recall(samples: Tensor, real: Tensor, *, num_neighbours: int = 3) -> Manifolds:
    """Return improved precision and recall (Kynkaanniemi et al. 2019).

    Args:
        samples: `(n, d)` features of generated samples.
        real: `(m, d)` features of real ones.
        num_neighbours: The neighbour whose distance is the radius of a ball.

    Raises:
        ValueError: If a set has no more samples than neighbours.
    """
    radii = [neighbour_radii(x, num_neighbours=num_neighbours) for x in (samples, real)]
    precision = is_within_radii(samples, real, radii[1]).double().mean()
    return Manifolds(precision, is_within_radii(real, samples, radii[0]).double().mean())
