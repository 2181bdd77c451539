"""Samples become features, part by part: what a judged set is kept as until all of it is there.

Pixels are not needed for the numbers, and features are a hundredth of them. A part of 256 pictures
with the features of the Inception (2048 pooled, 2023 spatial, 1008 logits, float32) takes 5 MB, a
set of 50,000 1 GB. The numbers are computed from the parts in their order, so that neither the
number of processes nor an interruption changes them.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from grn_lightning.datasets.manifest import atomic_file
from grn_lightning.metrics import ClipFeatures, DigitJudge
from grn_lightning.metrics.clip import caption_scores
from grn_lightning.metrics.extractors import build_extractor
from grn_lightning.metrics.features import distance_name, extract, protocol_of
from grn_lightning.metrics.protocols import Protocol, Rounding
from grn_lightning.pipelines import GeneratorPipeline
from grn_lightning.scripts.asking import Asked
from grn_lightning.scripts.draw_plan import SamplePlan
from grn_lightning.scripts.drawing import DrawnPart
from grn_lightning.scripts.frames import write_sample
from grn_lightning.scripts.parts import PartJob, Progress, part_sizes
from grn_lightning.scripts.runs import file_hash

PARTS, SAMPLES = "parts", "samples"
"""Folders of features and, where they are kept, of samples."""


@dataclass(frozen=True)
class FeatureSource:
    """Features by name, with the file of the network behind them."""

    name: str
    """As `metrics.extractors.FEATURES` has it."""
    file: Path | None
    """File of the weights; None looks where they are usually cached."""
    rounding: Rounding | None = None
    """How samples become bytes, if not as the protocol does it; of the Inception only."""

    def load(self) -> nn.Module:
        """Load the network.

        Raises:
            ValueError: If there are no such features, or the file is not what it should be.
        """
        return build_extractor(self.name, self.file, rounding=self.rounding)


@dataclass(frozen=True)
class Extracted:
    """What is known of features once their network was opened."""

    source: FeatureSource
    """Where they come from."""
    protocol: Protocol
    """How they are made, for no samples yet."""
    num_features: int
    """Their width."""
    metric: str
    """What their distance is called: "fid" or "fvd"."""
    num_spatial: int | None = None
    """Width of the spatial features, if there are any."""
    num_classes: int | None = None
    """Number of logits, if there are any."""
    reads_captions: bool = False
    """Whether the network also reads texts, for a CLIP score."""

    @classmethod
    def look(cls, source: FeatureSource) -> "Extracted":
        """Open the network once.

        Raises:
            ValueError: If it cannot be loaded.
        """
        network: Any = source.load()
        metric = distance_name(network)
        return cls(
            source,
            protocol_of(network),
            network.num_features,
            metric,
            num_spatial=getattr(network, "num_spatial", None),
            num_classes=getattr(network, "num_classes", None),
            reads_captions=isinstance(network, ClipFeatures),
        )

    @property
    def name(self) -> str:
        """Name of the features in parts and tags."""
        return self.protocol.features

    def facts(self) -> dict[str, Any]:
        """Return what decides the features, as plain data."""
        facts = {key: getattr(self.protocol, key) for key in ("rounding", "resize", "network")}
        if self.source.file is not None:
            facts["sha256"] = file_hash(self.source.file)
        if self.reads_captions:
            facts["captions"] = "scored"
        return facts


class Described(nn.Module):
    """Stands for the network of features that are computed already: it says what they are.

    Args:
        features: What is known of them.
    """

    def __init__(self, features: Extracted) -> None:
        super().__init__()
        protocol = features.protocol
        self.name, self.network = protocol.features, protocol.network
        self.rounding, self.resize = protocol.rounding, protocol.resize
        self.num_features = features.num_features
        self.num_spatial, self.num_classes = features.num_spatial, features.num_classes


@dataclass
class FeatureJob(PartJob):
    """Draws samples and keeps their features; a part is one file."""

    folder: Path
    plan: SamplePlan
    asked: Asked
    sources: Sequence[FeatureSource]
    judge: Path | None
    part_size: int
    keeps_samples: bool
    title: str = "draw and judge"
    _whole: set[int] = field(default_factory=set)  # parts whose samples were seen

    @property
    def samples_per_part(self) -> list[int]:
        """Samples of every part."""
        return part_sizes(len(self.asked.values), self.part_size)

    def file(self, number: int) -> Path:
        """Return the file of a part."""
        return self.folder / PARTS / f"{number:05d}.safetensors"

    def has(self, number: int) -> bool:
        """Whether a part is done: its features, and where they are kept all of its samples."""
        if not self.file(number).is_file():
            return False
        if self.keeps_samples and number not in self._whole:
            suffix = ".png" if self.plan.size.num_frames == 1 else ".mp4"
            numbers = self._numbers(number)
            if not all((self.folder / SAMPLES / f"{n:05d}{suffix}").is_file() for n in numbers):
                return False
            self._whole.add(number)
        return True

    def _numbers(self, number: int) -> range:
        """Return the samples of a part."""
        first = number * self.part_size
        return range(first, min(first + self.part_size, len(self.asked.values)))

    def start(self, device: torch.device) -> Callable[[int, Progress], None]:
        """Load generator and judges and return what does a part."""
        for name in (PARTS, SAMPLES)[: 1 + self.keeps_samples]:
            (self.folder / name).mkdir(exist_ok=True)
        pipeline = self.plan.open(device)
        eyes = _Eyes(self.sources, self.judge, device)

        def do(number: int, progress: Progress) -> None:
            rows = self._numbers(number)
            first = rows.start
            self.file(number).unlink(missing_ok=True)  # made without samples; until all are there
            wanted = self.asked.part(slice(rows.start, rows.stop))
            seen: dict[str, list[Tensor]] = {}
            for part in self.plan.draw(pipeline, wanted, rows, progress=progress):
                if self.keeps_samples:
                    self._keep(part, first, pipeline)
                assert part.clips is not None, "parts are decoded unless asked not to be"
                shown = [self.asked.values[first + row] for row in part.rows]
                captions = shown if self.asked.field == "captions" else None
                for name, tensor in {**eyes.see(part.clips, captions), **_costs(part)}.items():
                    seen.setdefault(name, []).append(tensor.cpu().contiguous())
            joined = {name: torch.cat(tensors) for name, tensors in seen.items()}
            facts = {"first": str(first), "count": str(len(rows))}
            with atomic_file(self.file(number)) as stream:
                stream.write(save(joined, metadata={"part": json.dumps(facts)}))

        return do

    def _keep(self, part: DrawnPart, first: int, pipeline: GeneratorPipeline) -> None:
        """Write samples as files; those of a part that was interrupted are there already."""
        columns = zip(part.rows, part.elements.split(1), part.num_steps.tolist(), strict=True)
        for row, elements, num_steps in columns:
            number = first + row
            stem = self.folder / SAMPLES / f"{number:05d}"
            value = self.asked.values[number]
            for suffix in (".png", ".mp4", ".gif"):
                stem.with_suffix(suffix).unlink(missing_ok=True)
            note = self.plan.note_of(self.asked.field, value, number=number, num_steps=num_steps)
            write_sample(stem, elements, pipeline, fps=self.plan.recipe.fps, note=note)

    def read(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Yield tensors of all parts, in order; those that a part lacks are left out.

        Raises:
            ValueError: If a part is damaged.
        """
        for number, count in enumerate(self.samples_per_part):
            try:
                tensors = load_file(self.file(number))
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"the part '{self.file(number)}' is damaged ({error}); move it away and give "
                    "the same command again."
                ) from error
            if len(tensors["num_steps"]) != count:
                raise ValueError(
                    f"the part '{self.file(number)}' holds {len(tensors['num_steps'])} samples "
                    f"instead of {count}; move it away and give the same command again."
                )
            yield {name: tensors[name] for name in names if name in tensors}


def _costs(part: DrawnPart) -> dict[str, Tensor]:
    return {
        "num_steps": part.num_steps,  # one per sample; the others are sums over a batch
        "seconds": torch.tensor([part.seconds], dtype=torch.float64),
        "num_forwards": torch.tensor([part.num_forwards]),
    }


def score_name(features: str) -> str:
    """Return the name in parts of how well samples fit their captions."""
    return f"{features}/clip_score"


class _Eyes:
    """All networks that look at samples."""

    def __init__(
        self, sources: Sequence[FeatureSource], judge: Path | None, device: torch.device
    ) -> None:
        self.extractors = [source.load().to(device) for source in sources]
        self.judge = None if judge is None else DigitJudge.load(judge).to(device)

    @torch.no_grad()
    def see(self, clips: Tensor, captions: Sequence[str] | None) -> dict[str, Tensor]:
        """Return features and readings of clips `(b, 3, f, h, w)` in [-1, 1], by name.

        Where captions were asked for, networks that read them score how well the clips fit.
        """
        found: dict[str, Tensor] = {}
        for extractor in self.extractors:
            features = extract(extractor, clips)
            for kind, tensor in features._asdict().items():
                if tensor is not None:
                    found[f"{extractor.name}/{kind}"] = tensor.float()
            if captions is not None and isinstance(extractor, ClipFeatures):
                scores = caption_scores(extractor, features.pooled, captions)
                found[score_name(extractor.name)] = scores
        if self.judge is not None:
            found["digit"] = self.judge.classify(clips)
            if clips.shape[2] > 1:
                found["direction"] = self.judge.direction(clips)
        return found
