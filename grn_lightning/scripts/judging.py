"""Judging held-out clips, their reconstructions and samples by the same judges, side by side."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from grn_lightning.lit.callbacks import DigitFeatures
from grn_lightning.metrics import DIRECTIONS, DigitJudge, FrechetDistance, InceptionFeatures
from grn_lightning.metrics.protocols import find_convention, short_count
from grn_lightning.metrics.video_features import VideoFeatures
from grn_lightning.scripts.records import Figure

Kind = Literal["samples", "reconstructions", "real"]
KINDS: tuple[Kind, ...] = ("samples", "reconstructions", "real")

MEANINGS = {
    "digit accuracy": "share in which the judge reads the digit of the label",
    "direction accuracy": "share that moves as the caption says",
    "caption accuracy": "share in which both digit and direction are right",
}


class Reading(NamedTuple):
    """What the judge reads from one clip."""

    text: str
    """For a caption, such as "7, left"; empty without a judge."""
    is_right: bool | None
    """Whether all that was asked for is there; None if nothing could be judged."""


def judge_beside(data: Path) -> Path | None:
    """Return the judge that lies beside the shards of the embedded set, if there is one."""
    path = data.parent / "judge.safetensors"
    return path if path.is_file() else None


def asked_directions(captions: Sequence[str]) -> Tensor | None:
    """Return the directions that captions end with, `(b,)` long; None if one does not."""
    words = [caption.rpartition(" ")[2] for caption in captions]
    if not words or not set(words) <= set(DIRECTIONS):
        return None
    return torch.tensor([DIRECTIONS.index(word) for word in words])


class Judging:
    """Adds up what judges say of real clips, reconstructions and samples.

    Args:
        judge: File of the judge of the embedded set; None leaves digits and directions out.
        inception: File of the Inception weights; None leaves that distance out.
        video_features: File of a video network for FVD, see `VideoFeatures`; None leaves it out.
        device: Where the judges work.
        protocol: How the Inception is fed: "torch_fidelity", "adm" or "clean".

    Raises:
        ValueError: If a file is not what it should be, or there is no such protocol.
    """

    def __init__(
        self,
        *,
        judge: Path | None,
        inception: Path | None,
        device: torch.device,
        video_features: Path | None = None,
        protocol: str = "torch_fidelity",
    ):
        find_convention(protocol)
        self.device = device
        self.left_out = [
            f"{name}: give `--{option} FILE`"
            for name, option, file in (
                (f"FID[{protocol}]", "inception", inception),
                ("FVD", "video_features", video_features),
            )
            if file is None
        ]
        self.judge: DigitJudge | None = None
        self.extractors: list[nn.Module] = []
        if judge is not None:
            features = DigitFeatures(str(judge)).to(device)
            self.judge = features.judge
            self.extractors.append(features)
        if inception is not None:
            self.extractors.append(InceptionFeatures(inception, protocol=protocol).to(device))
        if video_features is not None:
            self.extractors.append(VideoFeatures(video_features).to(device))
        self.distances: dict[Kind, list[FrechetDistance]] = {}
        self.shares: dict[tuple[str, Kind], MeanMetric] = {}
        self.count = 0

    def add(self, kind: Kind, clips: Tensor, batch: Any) -> list[Reading]:
        """Judge clips of one kind.

        Args:
            kind: What they are.
            clips: `(b, 3, f, h, w)` in [-1, 1].
            batch: The held-out batch that they are, reconstruct, or answer to.

        Returns:
            One reading per clip.
        """
        clips, real = clips.to(self.device), batch["clips"].to(self.device)
        if kind == "real":
            self.count += len(clips)
        else:
            for distance in self._distances(kind):
                distance.update(real, real=True)
                distance.update(clips, real=False)
        return self._read(kind, clips, batch)

    def _distances(self, kind: Kind) -> list[FrechetDistance]:
        if kind not in self.distances:
            made = [FrechetDistance(e).to(self.device) for e in self.extractors]
            self.distances[kind] = made
        return self.distances[kind]

    def _read(self, kind: Kind, clips: Tensor, batch: Any) -> list[Reading]:
        if self.judge is None or "class_labels" not in batch:
            return [Reading("", None)] * len(clips)
        digits = self.judge.classify(clips).cpu()
        is_right = {"digit accuracy": digits == batch["class_labels"].cpu()}
        texts = [str(digit) for digit in digits.tolist()]
        asked = asked_directions(batch.get("captions", []))
        if clips.shape[2] > 1 and asked is not None:
            directions = self.judge.direction(clips).cpu()
            is_right["direction accuracy"] = directions == asked
            is_right["caption accuracy"] = torch.stack(list(is_right.values())).all(0)
            names = (*DIRECTIONS, "resting")  # NO_DIRECTION is -1
            texts = [f"{text}, {names[n]}" for text, n in zip(texts, directions, strict=True)]
        for name, rights in is_right.items():
            metric = self.shares.setdefault((name, kind), MeanMetric())
            metric.update(rights.float())
        all_right = list(is_right.values())[-1].tolist()
        return [Reading(*pair) for pair in zip(texts, all_right, strict=True)]

    def figures(self, kind: Kind, *, split: str) -> list[Figure]:
        """Return the figures of one kind."""
        count = short_count(self.count)
        distances = [
            self._distance(distance, kind, split) for distance in self.distances.get(kind, [])
        ]
        shares = [
            Figure(
                name,
                (str(DigitJudge.name), kind, count, split),
                float(metric.compute()),
                unit="%",
                meaning=MEANINGS[name],
            )
            for (name, known), metric in self.shares.items()
            if known == kind
        ]
        return distances + shares

    def _distance(self, distance: FrechetDistance, kind: Kind, split: str) -> Figure:
        """Measure a distance; samples are counted as clips, also where features are of frames."""
        name = ("" if kind == "samples" else "r") + getattr(distance.extractor, "title", "FID")
        found = distance.measure(metric=name.lower(), reference=f"the same of split {split}")
        found = replace(found, protocol=found.protocol.with_samples(self.count))
        return Figure(
            name,
            (*found.protocol.parts, split),
            found.value,
            meaning=f"Frechet distance of {kind} to the real ones; 0 is the same distribution",
            measured=found.as_dict(),
        )
