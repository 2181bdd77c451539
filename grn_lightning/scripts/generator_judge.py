"""Judging an arm of `grn bench generators`: likelihoods, drawn pictures, and their time."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grn_lightning.datasets.shards import ShardSet
from grn_lightning.lit.callbacks import DigitFeatures
from grn_lightning.metrics import FrechetDistance
from grn_lightning.pipelines import GeneratorPipeline
from grn_lightning.pipelines.coarse_to_fine import CoarseToFinePipeline
from grn_lightning.pipelines.likelihood import negative_log_likelihood
from grn_lightning.samplers import RefineConfig
from grn_lightning.samplers.coarse_to_fine import CoarseToFineConfig, DrawConfig
from grn_lightning.scripts.generator_records import GeneratorBenchConfig, Judged
from grn_lightning.scripts.heldout import open_held_out
from grn_lightning.scripts.judging import judge_beside
from grn_lightning.scripts.runs import ClipSize, choose_device

AnyPipeline = CoarseToFinePipeline | GeneratorPipeline


class Pictures(NamedTuple):
    """Pictures and their classes."""

    clips: Tensor
    """`(n, 3, 1, h, w)` in [-1, 1]."""
    labels: Tensor
    """`(n,)` long."""


def load_pictures(config: GeneratorBenchConfig, data: Path, split: str, count: int) -> Pictures:
    """Read the first pictures of a split, at most `count`."""
    shards, size = ShardSet.open(data, split), config.image_size
    batches = open_held_out(
        shards,
        split=split,
        size=ClipSize(1, size, size),
        fps=None,
        num_samples=min(count, len(shards)),
        batch_size=config.batch_size,
    )
    pairs = [(batch["clips"], batch["class_labels"]) for batch in batches]
    clips, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return Pictures(clips, labels)


def clock(device: torch.device) -> float:
    """Return a time in seconds: that of the process on a CPU, so that its neighbours count little.

    With several threads the times of all of them add up.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


@dataclass(frozen=True)
class Drawn:
    """Pictures that an arm has drawn, and what they cost."""

    pictures: Pictures
    """With the classes that were asked for."""
    codes: list[Tensor]
    """Of each batch."""
    seconds: float
    """Time of a picture, decoding included."""
    num_forwards: int
    """Sequential forwards of a transformer."""


def draw(
    pipeline: AnyPipeline,
    config: GeneratorBenchConfig,
    *,
    count: int,
    scale: float,
    seed: int,
) -> Drawn:
    """Draw pictures of all classes in turn, a batch at a time.

    Args:
        pipeline: The arm's networks.
        config: Batch size, picture size, refinement steps.
        count: How many.
        scale: Guidance scale; of coarse-to-fine prediction, that of stage 1.
        seed: Seed of the noise.
    """
    one = _drawer(pipeline, config, scale=scale, seed=seed)
    clips, codes, seconds, steps = [], [], 0.0, 0
    labels = torch.arange(count, device=pipeline.device) % config.num_classes
    for index in torch.arange(count, device=pipeline.device).split(config.batch_size):
        start = clock(pipeline.device)
        drawn = one({"class_labels": labels[index]}, index)
        seconds += clock(pipeline.device) - start
        clips.append(drawn.clips)
        codes.append(drawn.codes if isinstance(pipeline, CoarseToFinePipeline) else drawn.elements)
        steps = int(torch.as_tensor(drawn.num_steps).max())
    return Drawn(Pictures(torch.cat(clips), labels), codes, seconds / count, steps)


def _drawer(
    pipeline: AnyPipeline, config: GeneratorBenchConfig, *, scale: float, seed: int
) -> Callable[[Any, Tensor], Any]:
    if isinstance(pipeline, CoarseToFinePipeline):
        how = CoarseToFineConfig(coarse=DrawConfig(guidance_scale=scale))
        return lambda batch, index: pipeline.draw(
            pipeline.condition(batch), index, config=how, seed=seed
        )
    refine = RefineConfig(num_steps=config.num_steps, guidance_scale=scale)
    size = (1, config.image_size, config.image_size)
    return lambda batch, index: pipeline.draw(
        pipeline.condition(batch), index, size=size, config=refine, seed=seed
    )


def decode_seconds(pipeline: AnyPipeline, codes: list[Tensor]) -> float:
    """Return the time of decoding a picture, batches as they were drawn."""
    start = clock(pipeline.device)
    for part in codes:
        pipeline.detokenize(part)
    return (clock(pipeline.device) - start) / sum(map(len, codes))


def held_out_bits(
    pipeline: CoarseToFinePipeline, pictures: Pictures, batch_size: int
) -> tuple[float, float]:
    """Return the mean bits of the codes of a picture given its class: coarse and fine."""
    sums = torch.zeros(2, dtype=torch.float64)
    for clips, labels in zip(
        pictures.clips.split(batch_size), pictures.labels.split(batch_size), strict=True
    ):
        codes = pipeline.tokenize(clips.to(pipeline.device))
        nats = negative_log_likelihood(
            pipeline, codes, pipeline.condition({"class_labels": labels})
        )
        sums += torch.stack([part.double().sum().cpu() for part in nats])
    coarse, fine = (sums / math.log(2) / len(pictures.labels)).tolist()
    return coarse, fine


class PictureJudge:
    """Compares pictures with the held-out ones of the embedded set.

    Args:
        config: Its `judge`, sizes and device.
        data: Folder of shards with splits "train" and "val".

    Raises:
        ValueError: If there is no judge.
    """

    def __init__(self, config: GeneratorBenchConfig, data: Path) -> None:
        path = config.judge or judge_beside(data)
        if path is None:
            raise ValueError(
                f"there is no judge beside '{data}'; `grn digits` writes one, or give `--judge`."
            )
        self.batch_size = config.batch_size
        self.features = DigitFeatures(str(path)).to(choose_device(config.device))
        self.held_out = load_pictures(config, data, "val", config.num_held_out)
        self.training = load_pictures(config, data, "train", config.num_drawn)

    @torch.no_grad()
    def judge(self, pictures: Pictures, *, scale: float | None = None) -> Judged:
        """Judge pictures that should show the digits of their classes."""
        device = next(self.features.parameters()).device
        distance = FrechetDistance(self.features).to(device)
        for clips in self.held_out.clips.split(self.batch_size):
            distance.update(clips.to(device), real=True)
        num_right = 0
        for clips, labels in zip(
            pictures.clips.split(self.batch_size),
            pictures.labels.split(self.batch_size),
            strict=True,
        ):
            distance.update(clips.to(device), real=False)
            digits = self.features.judge.classify(clips.to(device))
            num_right += int((digits == labels.to(device)).sum())
        return Judged(
            fid=float(distance.compute()),
            accuracy=num_right / len(pictures.labels),
            num_pictures=len(pictures.labels),
            guidance_scale=scale,
        )

    @torch.no_grad()
    def reconstructed(self, pipeline: AnyPipeline) -> Judged:
        """Judge held-out pictures after the tokenizer."""
        parts = [
            pipeline.detokenize(pipeline.tokenize(clips.to(pipeline.device)))
            for clips in self.held_out.clips.split(self.batch_size)
        ]
        return self.judge(Pictures(torch.cat(parts), self.held_out.labels))
