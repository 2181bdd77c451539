"""`grn evaluate stats`: reference statistics of real pictures or clips."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import is_zipfile

import torch
from torch import Tensor, nn
from tqdm import tqdm

from grn_lightning.datasets.shards import ShardSet
from grn_lightning.datasets.tars import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from grn_lightning.media.images import decode_image, to_float
from grn_lightning.media.video import probe_video
from grn_lightning.metrics import FeatureReservoir, FeatureSums, Protocol, ReferenceStatistics
from grn_lightning.metrics.extractors import build_extractor
from grn_lightning.metrics.features import extract, protocol_of, require_extractor
from grn_lightning.metrics.reference import npz_images
from grn_lightning.scripts.heldout import media_of, open_held_out
from grn_lightning.scripts.runs import ClipSize, choose_device


@dataclass(frozen=True)
class StatsReport:
    """What was summed up, and where it lies."""

    file: Path
    """The statistics."""
    source: str
    """What they are of."""
    protocol: Protocol
    """How they were made; `num_samples` counts the pictures, or clips for video features."""
    digest: str
    """SHA-256 of the numbers."""
    has_spatial: bool
    """Whether they serve sFID."""
    num_kept: int
    """Features that were kept for KID, precision and recall."""

    def __str__(self) -> str:
        """Tell it in three lines."""
        serves = ["FID", *(["sFID"] if self.has_spatial else [])]
        serves += ["KID", "precision", "recall"] if self.num_kept else []
        return (
            f"{self.source}: {self.protocol.features} features of {self.protocol.num_samples} "
            f"({self.protocol.resize} scaling, network {self.protocol.network or 'of no file'}), "
            f"for {', '.join(serves)}\n"
            f"  kept {self.num_kept} features, sha256 {self.digest}\n"
            f"  in '{self.file}'"
        )


def _size_of_first(shards: ShardSet) -> ClipSize:
    """Frames, height and width of the first sample."""
    is_video = media_of(shards) == "video"
    names = VIDEO_EXTENSIONS if is_video else IMAGE_EXTENSIONS
    sample = shards.read(0, names)
    data = next(iter(sample.fields.values()))
    if is_video:
        info = probe_video(data, source=sample.key)
        return ClipSize(info.num_frames, info.height, info.width)
    return ClipSize(1, *decode_image(data, source=sample.key).shape[1:])


def _open_shards(
    data: Path,
    split: str,
    *,
    num_samples: int | None,
    image_size: int | tuple[int, int] | None,
    num_frames: int | None,
    batch_size: int,
) -> tuple[Iterator[Tensor], int]:
    """Return batches of clips, and how many samples there are in all."""
    shards = ShardSet.open(data, split)
    found = _size_of_first(shards)
    size = image_size or (found.height, found.width)
    height, width = (size, size) if isinstance(size, int) else size
    held_out = open_held_out(
        shards,
        split=split,
        size=ClipSize(num_frames or found.num_frames, height, width),
        fps=None,
        num_samples=num_samples,
        batch_size=batch_size,
    )
    return (batch["clips"] for batch in held_out), held_out.num_samples


def _check_npz(data: Path) -> None:
    if not data.is_file():
        raise ValueError(f"'{data}' must be an .npz of pictures; there is no such file.")
    if not is_zipfile(data):
        raise ValueError(f"'{data}' must be an .npz of pictures, an archive, and is none.")


def _open_npz(data: Path, *, num_samples: int | None, batch_size: int) -> Iterator[Tensor]:
    left = num_samples
    for images in npz_images(data, batch_size=batch_size):
        images = images[:left]
        yield to_float(images)[:, :, None]
        left = None if left is None else left - len(images)
        if left == 0:
            return


class _Summaries:
    """Sums over all features, and some of them."""

    def __init__(self, extractor: nn.Module, keep: int, device: torch.device) -> None:
        self.extractor, self.device, self.count = extractor, device, 0
        _, width = require_extractor(extractor)
        spatial = getattr(extractor, "num_spatial", None)
        self.pooled = FeatureSums(width).to(device)
        self.spatial = None if spatial is None else FeatureSums(int(spatial)).to(device)
        self.kept = FeatureReservoir(width, capacity=keep).to(device) if keep else None

    def update(self, clips: Tensor) -> None:
        """Add real clips."""
        features = extract(self.extractor, clips.to(self.device), real=True)
        number = self.count + torch.arange(len(features.pooled))
        self.count += len(number)
        self.pooled.update(features.pooled)
        if self.spatial is not None and features.spatial is not None:
            self.spatial.update(features.spatial)
        if self.kept is not None:
            self.kept.update(features.pooled, number)

    def statistics(self, source: str) -> ReferenceStatistics:
        """Return what was found."""
        return ReferenceStatistics(
            moments=self.pooled.compute(),
            protocol=protocol_of(self.extractor, num_samples=self.count),
            source=source,
            spatial=None if self.spatial is None else self.spatial.compute(),
            features=None if self.kept is None else self.kept.compute(),
        )


def _check(out: Path, keep: int, batch_size: int, num_samples: int | None) -> None:
    if out.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"`out` must end in .safetensors or .npz, got '{out}'.")
    if out.exists():
        raise ValueError(f"'{out}' exists and is left alone; give another `--out`.")
    if keep == 1 or keep < 0 or batch_size < 1 or (num_samples is not None and num_samples < 2):
        raise ValueError(
            "`keep` must be 0 or at least 2, `batch_size` at least 1 and `num_samples` at least 2, "
            f"got {keep}, {batch_size} and {num_samples}."
        )
    if keep and out.suffix == ".npz":
        raise ValueError(
            "an .npz has no place for features; leave `--keep` out, or end in .safetensors."
        )


@torch.no_grad()
def evaluate_stats(
    data: Path,
    *,
    out: Path,
    features: str = "torch_fidelity",
    weights: Path | None = None,
    split: str = "train",
    num_samples: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    num_frames: int | None = None,
    keep: int = 0,
    batch_size: int = 32,
    device: str = "auto",
) -> StatsReport:
    """Sum up the features of real pictures or clips, to compare samples with them later.

    Pictures are scaled to cover the size and cut to its centre, as for training, and then go the
    way of the protocol. The file carries the protocol and a hash, and is refused for samples that
    were judged otherwise.

    Args:
        data: Folder of shards, or an `.npz` of pictures, uint8 `(n, h, w, 3)` under `arr_0`.
        out: File to write: `.safetensors`, or `.npz` for the evaluators of others.
        features: `torch_fidelity`, `adm` or `clean` (the Inception of publications), `digits-cnn`,
            `dinov2`, `clip:ARCHITECTURE`, or `video`.
        weights: File of their weights; for the Inception, by default that in torch hub's cache.
        split: Split of the shards.
        num_samples: Take the first so many; by default all.
        image_size: Height and width in pixels, or one number for both; by default those of the
            first sample.
        num_frames: Frames of a clip; by default those of the first.
        keep: Features to keep, an even draw, for KID, precision and recall; 8 kB each with the
            Inception. Publications keep 10000 and more.
        batch_size: Samples at a time; more need more memory.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: If data, features and options do not fit together, or `out` exists.
    """
    _check(out, keep, batch_size, num_samples)
    target = choose_device(device)
    if data.suffix == ".npz":
        _check_npz(data)
        source, total = data.stem, num_samples
        batches = _open_npz(data, num_samples=num_samples, batch_size=batch_size)
    else:
        source = f"{data.resolve().name}-{split}"
        batches, total = _open_shards(
            data,
            split,
            num_samples=num_samples,
            image_size=image_size,
            num_frames=num_frames,
            batch_size=batch_size,
        )
    summaries = _Summaries(build_extractor(features, weights).to(target), keep, target)
    with tqdm(total=total, unit=" samples", desc="statistics") as progress:
        for clips in batches:
            summaries.update(clips)
            progress.update(len(clips))
    statistics = summaries.statistics(source)
    statistics.save(out)
    return StatsReport(
        file=out,
        source=source,
        protocol=statistics.protocol,
        digest=statistics.digest,
        has_spatial=statistics.spatial is not None,
        num_kept=0 if statistics.features is None else len(statistics.features),
    )
