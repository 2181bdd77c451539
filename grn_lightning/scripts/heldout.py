"""The first samples of a held-out split, a batch at a time."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from grn_lightning.datasets.order import SampleRequest
from grn_lightning.datasets.samples import (
    Batch,
    SampleFormat,
    SampleReader,
    ShardDataset,
    check_fields,
    collate,
)
from grn_lightning.datasets.shards import ShardSet
from grn_lightning.datasets.tars import VIDEO_EXTENSIONS
from grn_lightning.scripts.runs import ClipSize


def media_of(shards: ShardSet) -> Literal["image", "video"]:
    """Return what the samples of shards show."""
    return "video" if set(VIDEO_EXTENSIONS) & set(shards.fields) else "image"


@dataclass(frozen=True)
class HeldOut:
    """Samples that were not trained on."""

    dataset: ShardDataset
    """Where they come from."""
    num_samples: int
    """How many of them are read."""
    batch_size: int
    """How many at a time."""
    split: str
    """Name of the split."""
    fps: float
    """Frames per second at which clips are shown."""
    digest: Any = field(default_factory=hashlib.sha256)
    """SHA-256 over keys, pixels and labels of what was read so far; no batch size changes it."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches; samples that do not decode are reported and left out."""
        for first in range(0, self.num_samples, self.batch_size):
            numbers = range(first, min(first + self.batch_size, self.num_samples))
            items = [self.dataset[SampleRequest(number, 0, number)] for number in numbers]
            whole = [item for item in items if item.weight > 0]
            for sample, *_ in whole:
                self.digest.update(f"{sample.key} {sample.class_label} {sample.caption}".encode())
                self.digest.update(sample.clip.contiguous().numpy().data)
            if whole:
                yield collate(whole)


def open_held_out(
    shards: ShardSet,
    *,
    split: str,
    size: ClipSize,
    fps: float | None,
    num_samples: int | None,
    batch_size: int,
) -> HeldOut:
    """Prepare to read the first samples, with classes and captions where there are any.

    Args:
        shards: From `ShardSet.open`.
        split: Its name.
        size: Frames, height and width.
        fps: Frames per second at which videos are read; None takes their frames as they are.
        num_samples: How many; None takes all.
        batch_size: How many at a time.

    Raises:
        ValueError: If there are fewer samples than asked for.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    num_samples = num_samples or len(shards)
    if num_samples > len(shards):
        raise ValueError(
            f"`num_samples` must be at most {len(shards)}, which split {split!r} in "
            f"'{shards.paths[0].parent}' has, got {num_samples}."
        )
    sample_format = SampleFormat(
        media=media_of(shards),
        size=(size.height, size.width),
        num_frames=size.num_frames,
        fps=fps,
        with_classes="cls" in shards.fields,
        with_captions="txt" in shards.fields,
    )
    folder = Path(shards.paths[0]).parent
    check_fields(shards, sample_format, name=str(folder))
    dataset = ShardDataset([SampleReader(shards, sample_format)], is_validation=True)
    return HeldOut(dataset, num_samples, batch_size, split, fps or 8.0)
