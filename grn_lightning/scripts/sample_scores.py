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
    impossible_metrics,
    of_samples,
)
from grn_lightning.metrics.protocols import metric_name, short_count
from grn_lightning.scripts.asking import Asked
from grn_lightning.scripts.judging import MEANINGS, asked_directions
from grn_lightning.scripts.records import Figure
from grn_lightning.scripts.sample_features import Described, Extracted, FeatureJob, score_name

_COMPARING = ("fid", "sfid", "kid", "precision", "recall")


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


def _config(job: FeatureJob, compared: Compared) -> GenerationConfig:
    """Return what is measured if it can be."""
    frames = 1 if compared.features.metric == "fvd" else job.plan.size.num_frames
    return GenerationConfig(num_samples=len(job.asked.values), frames_per_sample=frames)


def _has_score(job: FeatureJob, compared: Compared) -> bool:
    return compared.features.reads_captions and job.asked.field == "captions"


def _reasons(job: FeatureJob, compared: Compared) -> dict[str, str]:
    """Return the metrics that cannot be had with these features and this reference, with why."""
    features, reference = compared.features, compared.reference
    found: dict[str, str] = {}
    if reference is None:
        found = dict.fromkeys(_COMPARING, "there is no `--reference`")
    elif reference.features is None:
        why = f"{reference.label} keeps no features (`grn evaluate stats --keep`)"
        found = dict.fromkeys(("kid", "precision", "recall"), why)
    found |= impossible_metrics(Described(features), _config(job, compared), reference)
    if features.reads_captions and not _has_score(job, compared):
        found["clip_score"] = "no captions are drawn"
    order = (*GENERATION_METRICS, "clip_score")
    return {name: found[name] for name in order if name in found}


def left_out(job: FeatureJob, compared: Sequence[Compared]) -> list[str]:
    """Return what cannot be had of the samples, drawn or not, a phrase for every reason."""
    found = []
    for one in compared:
        names: dict[str, list[str]] = {}
        for metric, why in _reasons(job, one).items():
            name = metric_name(one.features.metric if metric == "fid" else metric)
            names.setdefault(why, []).append(name)
        found += [
            f"{', '.join(those)} of {one.features.name}: {why}" for why, those in names.items()
        ]
    return found


def has_numbers(job: FeatureJob, compared: Sequence[Compared]) -> bool:
    """Whether any number will follow from the samples, besides what they cost."""
    return bool(_readable(job)) or any(
        _has_score(job, one) or set(GENERATION_METRICS) - set(_reasons(job, one))
        for one in compared
    )


def _measured(job: FeatureJob, compared: Compared) -> list[Measurement]:
    """Add features up in the order of the parts and return what follows from them."""
    reasons, features = _reasons(job, compared), compared.features
    metrics = tuple(name for name in GENERATION_METRICS if name not in reasons)
    if not metrics:
        return []
    config = replace(_config(job, compared), metrics=metrics)
    judge = GenerationMetrics(Described(features), config, compared.reference)
    names = {kind: f"{features.name}/{kind}" for kind in Features._fields}
    first = 0
    for tensors in job.read([*names.values(), "num_steps"]):
        number = torch.arange(first, first + len(tensors["num_steps"]))
        seen: Any = {kind: tensors.get(name) for kind, name in names.items()}
        judge.update_features(Features(**seen), real=False, sample_index=number)
        first += len(number)
    frames = config.frames_per_sample
    return [
        of_samples(one, distance=features.metric, frames_per_sample=frames)
        for one in judge.compute()
    ]


def _caption_score(job: FeatureJob, compared: Compared) -> list[Measurement]:
    if not _has_score(job, compared):
        return []
    name = score_name(compared.features.name)
    scores = torch.cat([tensors[name] for tensors in job.read([name, "num_steps"])])
    protocol = compared.features.protocol.with_samples(len(scores), reference="captions")
    return [Measurement(metric="clip_score", value=_mean(scores), protocol=protocol)]


def measure(job: FeatureJob, compared: Sequence[Compared]) -> list[Measurement]:
    """Return all numbers that features give, in the order of the features.

    Raises:
        ValueError: If a part is damaged.
    """
    return [
        number for one in compared for number in (*_measured(job, one), *_caption_score(job, one))
    ]


# --- what the judge of the embedded set reads -----------------------------------------------------


def _asked_for(asked: Asked) -> dict[str, Tensor | None]:
    """Return what the judge should read, by name, where it is known."""
    directions = asked_directions([str(value) for value in asked.values])
    digits = None if asked.labels is None else torch.tensor(asked.labels)
    return {"digit": digits, "direction": directions if asked.field == "captions" else None}


def _readable(job: FeatureJob) -> set[str]:
    """Return what the judge reads and the conditions tell."""
    known = {name for name, asked in _asked_for(job.asked).items() if asked is not None}
    shown = {"digit", "direction"} if job.plan.size.num_frames > 1 else {"digit"}
    return set() if job.judge is None else known & shown


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
