r"""Frechet distance between the features of two sets of clips (FID, and its relatives).

Both sets are summarized by mean and covariance of their features:

    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))

The number depends on the features more than on anything else, so the extractor is an argument and
its name belongs to every number: `fid[torch_fidelity]`, `fid[digits-cnn]`. torchmetrics holds the
sums; here are the clips, the root by symmetric eigenvalues, reference statistics in place of a real
set, and what happens on processes without samples.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from grn_lightning.functional.distances import frechet_distance
from grn_lightning.metrics.features import extract, protocol_of, require_extractor
from grn_lightning.metrics.protocols import Measurement
from grn_lightning.metrics.reference import (
    Moments,
    ReferenceStatistics,
    check_features,
    moments_of_sums,
)

_MAX_ERROR = 1e-8  # relative, of distances with known answers
_CHECKED_FEATURES = 64


def fid_tag(name: str) -> str:
    """Return the name of a distance with the features `name` in the curves of a training.

    Example:
        >>> fid_tag("digits-cnn")
        'fid[digits-cnn]'
    """
    return f"fid[{name}]"


# --- the solver, and how much it can be trusted ---------------------------------------------------


def _known_distances(device: torch.device) -> list[tuple[float, float]]:
    """Return computed and true distances of Gaussians that can be worked out by hand."""
    d = _CHECKED_FEATURES
    rng = torch.Generator().manual_seed(0)
    normal = torch.randn(d, d + 2, generator=rng, dtype=torch.float64).to(device)
    turn = torch.linalg.qr(normal[:, :d]).Q
    gap, (u, v) = normal[:, 0], normal[:, -2:].T
    zero = torch.zeros_like(gap)
    a, b = (torch.logspace(0, end, d, dtype=torch.float64, device=device) for end in (-4.0, 1.0))
    rotated = [(turn * values) @ turn.T for values in (a, b)]
    pair = torch.eye(d, dtype=torch.float64, device=device)
    tilted = pair.clone()
    pair[0, 0], tilted[:2, :2] = 4.0, torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    # The root of a 2 x 2 matrix M has the trace sqrt(tr M + 2 sqrt(det M)); M is [[8, 4], [1, 3]].
    root = (11 + 2 * 20**0.5) ** 0.5
    return [
        (  # matrices with common axes
            float(frechet_distance(gap, rotated[0], zero, rotated[1])),
            float(gap.dot(gap) + (a.sqrt() - b.sqrt()).square().sum()),
        ),
        (  # two samples each: rank one
            float(frechet_distance(zero, torch.outer(u, u), zero, torch.outer(v, v))),
            float(u.dot(u) + v.dot(v) - 2 * u.dot(v).abs()),
        ),
        (  # matrices that do not commute
            float(frechet_distance(zero, pair, zero, tilted)),
            10 - 2 * root,
        ),
    ]


@lru_cache
def check_solver(device: str = "cpu") -> None:
    """Compute distances that are known, once per kind of device, before the first unknown one.

    Some builds of linear algebra return wrong roots without a word, and FIDs of 20 instead of 5.

    Raises:
        RuntimeError: If a distance is wrong.
    """
    for found, expected in _known_distances(torch.device(device)):
        if not abs(found - expected) <= _MAX_ERROR * abs(expected):
            raise RuntimeError(
                f"the linear algebra of this installation is wrong on {device!r}: a Frechet "
                f"distance that must be {expected:.12g} comes out as {found:.12g}. No distance is "
                "computed with it; try another build of torch, or the other device."
            )


def distance_of_moments(first: Moments, second: Moments) -> Tensor:
    """Return the Frechet distance of two summaries, float64, by a solver that was checked."""
    check_solver(first.mean.device.type)
    mean, covariance = (one.to(first.mean.device) for one in second[:2])
    return frechet_distance(first.mean, first.covariance, mean, covariance)


def caveats_of(samples: Moments, reference: Moments) -> tuple[str, ...]:
    """Return what a reader of a Frechet distance should know, a sentence each."""
    found, width = [], len(samples.mean)
    if samples.num_samples <= width:
        found.append(
            f"{samples.num_samples} samples span at most {samples.num_samples - 1} of {width} "
            "features: the distance is too large, and comparable at the same number only"
        )
    if float(samples.covariance.trace()) < 1e-6 * float(reference.covariance.trace()):
        found.append("all samples have nearly the same features: the generator has collapsed")
    return tuple(found)


# --- the metric -----------------------------------------------------------------------------------


class _PassFeatures(nn.Module):
    """Stands where torchmetrics expects a network, so that it takes features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class FrechetDistance(FrechetInceptionDistance):
    """Frechet distance with any features, summed and solved in float64.

    The metric holds the extractor as a submodule: keep it out of LightningModules, whose
    checkpoints would swallow it.

    Args:
        extractor: A module that is a `FeatureExtractor`; used in evaluation mode, without gradient.
        reset_real_features: Whether `reset` forgets the real set too. The validation set stays the
            same, so by default it is kept and needs to be added once.
        reference: Statistics in place of a real set; the same on all processes, and counted once.

    Raises:
        ValueError: If the extractor has no name or width, or the reference was made by another.
    """

    def __init__(
        self,
        extractor: nn.Module,
        *,
        reset_real_features: bool = False,
        reference: ReferenceStatistics | None = None,
    ) -> None:
        name, num_features = require_extractor(extractor)
        super().__init__(_PassFeatures(num_features), reset_real_features=reset_real_features)
        self.extractor_name = name
        self.extractor = extractor
        self.reference = reference
        if reference is not None:
            reference.require(protocol_of(extractor))
            require_width(reference, num_features)
        self.caveats: tuple[str, ...] = ()
        self.num_compared = 0
        # Else it is set by `update`, and `compute` fails on a process that had no sample.
        self.orig_dtype = torch.float64

    @property
    def tag(self) -> str:
        """Name of the number in the curves of a training."""
        return fid_tag(self.extractor_name)

    def update(self, clips: Tensor, real: bool, weights: Tensor | None = None) -> None:
        """Add clips to one of the sets.

        Args:
            clips: `(b, 3, f, h, w)` in [-1, 1].
            real: Which set; the generated one if False.
            weights: `(b,)`; a clip of weight 0 is padding and left out, all others count once.

        Raises:
            ValueError: If features are not finite, or real clips come beside a reference.
        """
        if real and self.reference is not None:
            raise ValueError(
                f"{self.tag} compares with {self.reference.label}; it takes no real clips besides."
            )
        if weights is not None:
            clips = clips[weights > 0]
        if len(clips):
            features = extract(self.extractor, clips, real=real).pooled.double()
            check_features(features, len(self.real_features_sum))
            super().update(features, real=real)

    def compute(self) -> Tensor:
        """Return the distance, float64.

        Raises:
            ValueError: If one of the sets has fewer than two samples.
        """
        counts = int(self.real_features_num_samples), int(self.fake_features_num_samples)
        if counts[1] < 2 or (counts[0] < 2 and self.reference is None):
            raise ValueError(
                f"{self.tag} must have at least 2 samples in each set, got {counts[0]} real and "
                f"{counts[1]} generated ones."
            )
        samples = moments_of_sums(self.fake_features_sum, self.fake_features_cov_sum, counts[1])
        if self.reference is None:
            real = moments_of_sums(self.real_features_sum, self.real_features_cov_sum, counts[0])
        else:
            real = self.reference.moments
        self.caveats, self.num_compared = caveats_of(samples, real), counts[1]
        return distance_of_moments(samples, real)

    def measure(self, *, metric: str = "fid", reference: str = "") -> Measurement:
        """Compute the distance and return it with its protocol.

        Args:
            metric: What it is called: "fid", or "rfid", "fvd", "rfvd".
            reference: Name of the real set; that of the statistics if there are any.
        """
        value = float(self.compute())
        name = reference if self.reference is None else self.reference.label
        protocol = protocol_of(self.extractor, num_samples=self.num_compared, reference=name)
        return Measurement(metric=metric, value=value, protocol=protocol, caveats=self.caveats)


def require_width(reference: ReferenceStatistics, num_features: int) -> None:
    """Refuse statistics of features of another width.

    Raises:
        ValueError: With both widths.
    """
    width = len(reference.moments.mean)
    if width != num_features:
        raise ValueError(
            f"reference {reference.label} is about {width} features, the extractor has "
            f"{num_features}; they are not of one kind."
        )
