"""Numbers of a set of samples, from the features that its parts hold; one part in memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from grn_lightning.metrics import DigitJudge, Measurement, ReferenceStatistics
from grn_lightning.metrics.features import Features
from grn_lightning.metrics.fid import require_width
from grn_lightning.metrics.generation import (
    GENERATION_METRICS,
    GenerationConfig,
    GenerationMetrics,
)
from grn_lightning.metrics.protocols import short_count
from grn_lightning.scripts.asking import Asked
from grn_lightning.scripts.judging import MEANINGS, asked_directions
from grn_lightning.scripts.records import Figure
from grn_lightning.scripts.sample_features import Described, Extracted, FeatureJob


@dataclass(frozen=True)
class Compared:
    """Features, and what their distribution is compared with."""

    features: Extracted
    """The features."""
    reference: ReferenceStatistics | None
    """Real ones; None leaves out whatever compares."""

    def __post_init__(self) -> None:
        """Refuse a reference of other features."""
        if self.reference is not None:
            self.reference.require(self.features.protocol)
            require_width(self.reference, self.features.num_features)


def _metrics_of(compared: Compared) -> tuple[str, ...]:
    """Return what can be had with these features and this reference."""
    reference, features = compared.reference, compared.features
    is_possible = {
        "fid": reference is not None,
        "sfid": reference is not None and reference.spatial is not None and features.num_spatial,
        "is": features.num_classes,
        "kid": reference is not None and reference.features is not None,
    }
    is_possible["precision"] = is_possible["recall"] = is_possible["kid"]
    return tuple(name for name in GENERATION_METRICS if is_possible[name])


def _measured(job: FeatureJob, compared: Compared) -> list[Measurement]:
    """Add features up in the order of the parts and return what follows from them."""
    metrics, features = _metrics_of(compared), compared.features
    if not metrics:
        return []
    count = len(job.asked.values)
    frames = 1 if features.metric == "fvd" else job.plan.size.num_frames
    config = GenerationConfig(num_samples=count, metrics=metrics, frames_per_sample=frames)
    judge = GenerationMetrics(Described(features), config, compared.reference)
    names = {kind: f"{features.name}/{kind}" for kind in Features._fields}
    first = 0
    for tensors in job.read([*names.values(), "num_steps"]):
        number = torch.arange(first, first + len(tensors["num_steps"]))
        seen: Any = {kind: tensors.get(name) for kind, name in names.items()}
        judge.update_features(Features(**seen), real=False, sample_index=number)
        first += len(number)
    return [_renamed(one, features.metric, frames) for one in judge.compute()]


def _renamed(one: Measurement, metric: str, frames: int) -> Measurement:
    """Call a distance by its name, and count clips where their frames were compared."""
    protocol = one.protocol.with_samples(one.protocol.num_samples // frames)
    return replace(one, metric=metric if one.metric == "fid" else one.metric, protocol=protocol)


def measure(job: FeatureJob, compared: Sequence[Compared]) -> list[Measurement]:
    """Return all numbers that features give, in the order of the features.

    Raises:
        ValueError: If a part is damaged.
    """
    return [number for one in compared for number in _measured(job, one)]


# --- what the judge of the embedded set reads -----------------------------------------------------


def _asked_for(asked: Asked) -> dict[str, Tensor | None]:
    """Return what the judge should read, by name, where it is known."""
    directions = asked_directions([str(value) for value in asked.values])
    digits = None if asked.labels is None else torch.tensor(asked.labels)
    return {"digit": digits, "direction": directions if asked.field == "captions" else None}


def shares(job: FeatureJob) -> list[Figure]:
    """Return the shares of samples that show the digit and the direction that they were asked for.

    There are none without a judge, and none about what the conditions do not tell.
    """
    if job.judge is None:
        return []
    wanted = _asked_for(job.asked)
    rights: dict[str, list[Tensor]] = {name: [] for name in wanted}
    first = 0
    for tensors in job.read(["digit", "direction"]):
        count = len(tensors["digit"])
        for name, read in tensors.items():
            asked = wanted[name]
            if asked is not None:
                rights[name].append(read == asked[first : first + count])
        first += count
    is_right = {f"{name} accuracy": torch.cat(parts) for name, parts in rights.items() if parts}
    if len(is_right) == 2:
        is_right["caption accuracy"] = torch.stack([*is_right.values()]).all(0)
    protocol = (DigitJudge.name, short_count(len(job.asked.values)))
    return [
        Figure(name, protocol, _mean(right), "%", MEANINGS[name])
        for name, right in is_right.items()
    ]


def _mean(values: Tensor) -> float:
    metric = MeanMetric().set_dtype(torch.float64)
    metric.update(values.double())
    return float(metric.compute())


# --- what it cost ---------------------------------------------------------------------------------


def costs(job: FeatureJob) -> dict[str, Any]:
    """Return steps, forwards and seconds of the samples, as plain data."""
    steps: list[Tensor] = []
    forwards, seconds = 0, 0.0
    for tensors in job.read(["num_steps", "num_forwards", "seconds"]):
        steps.append(tensors["num_steps"])
        forwards += int(tensors["num_forwards"].sum())
        seconds += float(tensors["seconds"].sum())
    all_steps = torch.cat(steps)
    values, counts = all_steps.unique(return_counts=True)
    return {
        "mean_steps": float(all_steps.double().mean()),
        "steps": dict(zip(map(str, values.tolist()), counts.tolist(), strict=True)),
        "forwards_per_sample": forwards / len(all_steps),
        "seconds_per_sample": seconds / len(all_steps),
    }
