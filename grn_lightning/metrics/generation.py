"""All numbers about a set of generated samples, from one pass of a feature extractor.

Each number needs a summary of the samples: sums of features (FID), of spatial features (sFID), of
class probabilities (IS), or some features themselves (KID, precision, recall). The summaries are
torchmetrics objects of fixed size, which processes add up; the numbers follow from them at the end.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from grn_lightning.metrics.features import Features, extract, protocol_of, require_extractor
from grn_lightning.metrics.fid import caveats_of, distance_of_moments, require_width
from grn_lightning.metrics.inception_score import InceptionScore
from grn_lightning.metrics.neighbours import kernel_score, precision_recall
from grn_lightning.metrics.protocols import CONVENTIONS, Convention, Measurement, Protocol
from grn_lightning.metrics.reference import FeatureSums, ReferenceStatistics
from grn_lightning.metrics.reservoir import FeatureReservoir

GENERATION_METRICS = ("fid", "sfid", "is", "kid", "precision", "recall")
"""Metrics of `GenerationMetrics`, in the order in which they are told."""

_KEPT = ("kid", "precision", "recall")  # need features themselves
_KEPT_REAL = 10_000  # real ones that ADM takes
_SETTINGS = "settings"  # of stored sums, JSON as bytes
_NOTHING = torch.tensor([*b"{}"], dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What is measured, on how many samples."""

    num_samples: int
    """Samples that will come, over all processes."""
    metrics: tuple[str, ...] = GENERATION_METRICS
    """Which numbers."""
    frames_per_sample: int = 1
    """Pictures that a sample shows to an extractor of pictures; each counts as one."""
    kept_features: int = 50_000
    """Features kept of each set for KID, precision and recall, at most; 8 kB each with Inception.
    Precision and recall depend on how many there are: ADM takes 50,000 samples and 10,000 real."""
    kid_subsets: int = 100
    """Subsets that KID is averaged over."""
    kid_subset_size: int = 1000
    """Samples of each set in a subset of KID; fewer if there are not so many."""
    num_neighbours: int = 3
    """Neighbour that makes the radius of precision and recall."""

    @property
    def num_pictures(self) -> int:
        """Pictures that will come, over all processes."""
        return self.num_samples * self.frames_per_sample

    def __post_init__(self) -> None:
        """Refuse what cannot be measured, with all reasons."""
        issues = [
            f"{name} must be at least {least}, got {getattr(self, name)}"
            for name, least in (
                ("num_samples", 2),
                ("frames_per_sample", 1),
                ("kept_features", 2),
                ("kid_subsets", 1),
                ("kid_subset_size", 2),
                ("num_neighbours", 1),
            )
            if getattr(self, name) < least
        ]
        unknown = [name for name in self.metrics if name not in GENERATION_METRICS]
        if unknown or not self.metrics:
            known = ", ".join(GENERATION_METRICS)
            issues.append(f"metrics must be some of {known}, got {', '.join(self.metrics) or '()'}")
        if issues:
            raise ValueError("GenerationConfig: " + "; ".join(issues) + ".")


def _convention(features: str) -> Convention:
    return CONVENTIONS.get(features, CONVENTIONS["torch_fidelity"])


def impossible_metrics(
    extractor: Any, config: GenerationConfig, reference: ReferenceStatistics | None = None
) -> dict[str, str]:
    """Return which of the metrics that are asked for cannot be had, with the reason of each.

    Args:
        extractor: Says its name, and what it gives besides pooled features.
        config: What is asked for, on how many samples.
        reference: What samples are compared with; None stands for real samples.
    """
    name, found = extractor.name, {}
    if getattr(extractor, "num_spatial", None) is None:
        found["sfid"] = f"{name} has no spatial features"
    elif reference is not None and reference.spatial is None:
        found["sfid"] = f"{reference.label} has no spatial statistics"
    parts = _convention(name).score_parts or 1
    if getattr(extractor, "num_classes", None) is None:
        found["is"] = f"{name} has no classes"
    elif config.num_pictures < parts:
        found["is"] = f"its {parts} parts need as many pictures, got {config.num_pictures}"
    kept = min(config.num_pictures, config.kept_features)
    stored = None if reference is None else reference.features
    few = _too_few(config, kept, None if stored is None else len(stored))
    return {metric: why for metric, why in (found | few).items() if metric in config.metrics}


def _too_few(config: GenerationConfig, samples: int, real: int | None) -> dict[str, str]:
    """Return what cannot be had of so many features, with the reason; real ones may yet come."""
    leasts = {"kid": 2, "precision": config.num_neighbours + 1, "recall": config.num_neighbours + 1}
    got = f"{samples} samples" + ("" if real is None else f" and {real} real ones")
    return {
        metric: f"each set must have at least {least}, got {got}"
        for metric, least in leasts.items()
        if samples < least or (real is not None and real < least)
    }


class GenerationMetrics(nn.Module):
    """FID, sFID, Inception score, KID, precision and recall of generated samples.

    It holds the extractor: keep it out of LightningModules, whose checkpoints would swallow it. On
    several processes each adds its own samples, and all call `compute`.

    Args:
        extractor: A module that is a `FeatureExtractor`. Without `num_spatial` it gives no sFID,
            without `num_classes` no Inception score.
        config: What is measured.
        reference: Statistics of real pictures, the same on all processes. What they lack (features
            for KID, precision and recall) comes from real samples that are added; without
            statistics everything does.

    Raises:
        ValueError: If the reference was made with other features.

    Attributes:
        left_out: Metrics that were asked for and cannot be had, with the reason. Where real samples
            are added, some turn out to be so in `compute`.
    """

    def __init__(
        self,
        extractor: nn.Module,
        config: GenerationConfig,
        reference: ReferenceStatistics | None = None,
    ) -> None:
        super().__init__()
        _, self.num_features = require_extractor(extractor)
        self.protocol = protocol_of(extractor, num_samples=config.num_samples)
        if reference is not None:
            reference.require(self.protocol)
            require_width(reference, self.num_features)
        self.extractor, self.config, self.reference = extractor, config, reference
        self._impossible = impossible_metrics(extractor, config, reference)
        self.left_out = dict(self._impossible)
        self.samples = nn.ModuleDict(self._summaries(extractor))
        self.real = nn.ModuleDict(self._real_summaries())
        self._seen = {"samples": 0, "real": 0}

    # --- construction -----------------------------------------------------------------------------

    def _summaries(self, extractor: Any) -> dict[str, Metric]:
        """What is kept of generated samples."""
        config = self.config
        wanted = set(config.metrics) - set(self.left_out)
        found: dict[str, Metric] = {}
        if "fid" in wanted:
            found["pooled"] = FeatureSums(self.num_features)
        if "sfid" in wanted:
            found["spatial"] = FeatureSums(int(extractor.num_spatial))
        if "is" in wanted:
            found["logits"] = InceptionScore(
                int(extractor.num_classes),
                num_samples=config.num_pictures,
                convention=_convention(self.protocol.features),
            )
        if set(_KEPT) & wanted:
            found["kept"] = FeatureReservoir(
                self.num_features, capacity=min(config.kept_features, config.num_pictures)
            )
        return found

    def _real_summaries(self) -> dict[str, Metric]:
        """What is kept of real samples: what the reference does not have."""
        reference = self.reference
        found: dict[str, Metric] = {}
        for name in self.samples:
            if name == "logits" or (reference is not None and name in ("pooled", "spatial")):
                continue
            if name != "kept":
                found[name] = FeatureSums(_summary(self.samples, name).num_features)
            elif reference is None or reference.features is None:
                # There may be more of them than samples, but nobody needs very many more.
                capacity = max(_KEPT_REAL, self.config.num_pictures)
                capacity = min(capacity, self.config.kept_features)
                found[name] = FeatureReservoir(self.num_features, capacity=capacity)
        return found

    # --- samples ----------------------------------------------------------------------------------

    @property
    def needs_real(self) -> bool:
        """Whether real samples have to be added."""
        return len(self.real) > 0

    def update(
        self,
        clips: Tensor,
        *,
        real: bool,
        sample_index: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Add samples.

        Args:
            clips: `(b, 3, f, h, w)` in [-1, 1].
            real: Which set; the generated one if False.
            sample_index: `(b,)` long in `[0, num_samples)`: the number of each sample, over all
                processes; None counts them, on a single process.
            weights: `(b,)`; a sample of weight 0 is padding and left out, all others count once.

        Raises:
            ValueError: If features are not finite, or samples are not numbered on many processes.
        """
        sample_index = self._numbers(len(clips), sample_index, "real" if real else "samples")
        if weights is not None:
            counts = weights > 0
            clips, sample_index = clips[counts], sample_index[counts.to(sample_index.device)]
        if len(clips) and (self.real if real else self.samples):
            features = extract(self.extractor, clips, real=real)
        else:
            features = self._no_features(clips.device)
        self.update_features(features, real=real, sample_index=sample_index)

    def update_features(self, features: Features, *, real: bool, sample_index: Tensor) -> None:
        """Add samples by their features.

        Args:
            features: Of `n` pictures or clips.
            real: Which set.
            sample_index: `(b,)` long; n is a multiple of b, pictures of a sample side by side.
        """
        num_pictures = len(features.pooled)
        each = num_pictures // max(1, len(sample_index))
        number = sample_index[:, None] * each + torch.arange(each, device=sample_index.device)
        number = number.flatten().to(features.pooled.device)
        for name, summary in (self.real if real else self.samples).items():
            source = features.pooled if name == "kept" else getattr(features, name)
            if isinstance(summary, FeatureSums):
                summary.update(source)
            elif isinstance(summary, Metric):
                summary.update(source, number)

    def _numbers(self, count: int, sample_index: Tensor | None, kind: str) -> Tensor:
        if sample_index is not None:
            return sample_index
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError("sample_index must be given on several processes.")
        first = self._seen[kind]
        self._seen[kind] += count
        return torch.arange(first, first + count)

    def _no_features(self, device: torch.device) -> Features:
        """Features of nothing: a process without samples has to take part in the sums."""
        widths = [
            getattr(self.extractor, name, 0)
            for name in ("num_features", "num_spatial", "num_classes")
        ]
        return Features(*(torch.zeros(0, int(width), device=device) for width in widths))

    # --- numbers ----------------------------------------------------------------------------------

    def compute(self) -> list[Measurement]:
        """Return what was asked for and can be had, in the order of `GENERATION_METRICS`.

        Raises:
            ValueError: If there are too few samples.
        """
        found = {one.metric: one for one in (*self._distances(), *self._score(), *self._kept())}
        return [found[name] for name in GENERATION_METRICS if name in found]

    def _distances(self) -> list[Measurement]:
        found = []
        for metric, name, field in (("fid", "pooled", "moments"), ("sfid", "spatial", "spatial")):
            if name not in self.samples:
                continue
            samples = _summary(self.samples, name).compute()
            known = None if self.reference is None else getattr(self.reference, field)
            real = _summary(self.real, name).compute() if known is None else known
            value = float(distance_of_moments(samples, real))
            protocol = self._protocol(samples.num_samples)
            found.append(_measured(metric, value, protocol, caveats=caveats_of(samples, real)))
        return found

    def _score(self) -> list[Measurement]:
        if "logits" not in self.samples:
            return []
        summary = _summary(self.samples, "logits")
        score, protocol = summary.compute(), self._protocol(summary.num_samples, reference="")
        return [_measured("is", float(score.mean), protocol, spread=float(score.spread))]

    def _kept(self) -> list[Measurement]:
        if "kept" not in self.samples:
            return []
        config, samples = self.config, _summary(self.samples, "kept").compute()
        stored = None if self.reference is None else self.reference.features
        real = (
            _summary(self.real, "kept").compute() if stored is None else stored.to(samples.device)
        )
        # Real samples that were added have no name: the statistics are not of them.
        protocol = self._protocol(len(samples), reference="" if stored is None else None)
        few = _too_few(config, len(samples), len(real)).items()
        self.left_out = self._impossible | {
            name: why for name, why in few if name in config.metrics
        }
        wanted, found = set(config.metrics) - set(self.left_out), []
        if "kid" in wanted:
            size = min(config.kid_subset_size, len(samples), len(real))
            score = kernel_score(samples, real, num_subsets=config.kid_subsets, subset_size=size)
            caveats = (
                ()
                if size == config.kid_subset_size
                else (f"subsets have {size} samples instead of {config.kid_subset_size}",)
            )
            value, spread = float(score.mean), float(score.spread)
            found.append(_measured("kid", value, protocol, spread=spread, caveats=caveats))
        if {"precision", "recall"} & wanted:
            pair = precision_recall(samples, real, num_neighbours=config.num_neighbours)
            caveats = (f"against {len(real)} real ones; the value depends on both numbers",)
            for metric, one in pair._asdict().items():
                if metric in wanted:
                    found.append(_measured(metric, float(one), protocol, caveats=caveats))
        return found

    def _protocol(self, num_samples: int, *, reference: str | None = None) -> Protocol:
        label = "" if self.reference is None else self.reference.label
        return self.protocol.with_samples(
            num_samples, reference=label if reference is None else reference
        )

    # --- interruptions ----------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all samples, real ones too."""
        self._seen = {"samples": 0, "real": 0}
        for _, _, summary in self._all():
            summary.reset()

    def sums(self) -> dict[str, Tensor]:
        """Return what this process has added up, for a file; `load_sums` goes on from it."""
        found = {_SETTINGS: torch.frombuffer(bytearray(self._settings()), dtype=torch.uint8)}
        found |= {f"seen.{kind}": torch.tensor(count) for kind, count in self._seen.items()}
        for group, name, summary in self._all():
            for key, value in summary.metric_state.items():
                found[f"{group}.{name}.{key}"] = value.detach().clone()
        return found

    def load_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Go on from what `sums` returned.

        Raises:
            ValueError: If they are sums of other metrics or features, or by another protocol.
        """
        own, stored = self.sums(), dict(sums)
        mine, other = (
            json.loads(bytes(one.pop(_SETTINGS, _NOTHING).tolist())) for one in (own, stored)
        )
        differ = [f"{k} {other.get(k)!r} and {v!r}" for k, v in mine.items() if other.get(k) != v]
        if differ:
            raise ValueError(
                "the stored sums are of other metrics or features, or of samples that were judged "
                f"otherwise (theirs, then these): {'; '.join(differ)}."
            )
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in stored.items()}:
            raise ValueError(
                "the stored sums are of other metrics or features: "
                f"{', '.join(sorted(stored))} instead of {', '.join(sorted(own))}."
            )
        self._seen = {kind: int(sums[f"seen.{kind}"]) for kind in self._seen}
        for group, name, summary in self._all():
            summary.reset()
            for key, value in summary.metric_state.items():
                setattr(summary, key, sums[f"{group}.{name}.{key}"].to(value, copy=True))
            summary._update_count = 1  # torchmetrics warns of a metric without samples

    def _settings(self) -> bytes:
        """What decides the sums besides the samples, as JSON."""
        facts = self.protocol.as_dict() | asdict(self.config) | {"reference": ""}
        return json.dumps(facts, sort_keys=True).encode()

    def _all(self) -> Iterator[tuple[str, str, Any]]:
        for group, summaries in (("samples", self.samples), ("real", self.real)):
            for name in summaries:
                yield group, name, summaries[name]


def of_samples(one: Measurement, *, distance: str, frames_per_sample: int) -> Measurement:
    """Return a number as it is told: by its name, and of samples instead of their frames.

    Args:
        one: From `GenerationMetrics.compute`.
        distance: What a "fid" is called, see `features.distance_name`.
        frames_per_sample: As in the configuration.
    """
    count = one.protocol.num_samples // frames_per_sample
    metric = distance if one.metric == "fid" else one.metric
    return replace(one, metric=metric, protocol=one.protocol.with_samples(count))


def _summary(summaries: nn.ModuleDict, name: str) -> Any:
    return summaries[name]


def _measured(metric: str, value: float, protocol: Protocol, **more: Any) -> Measurement:
    return Measurement(metric=metric, value=value, protocol=protocol, **more)
