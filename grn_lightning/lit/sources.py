"""Sources of samples and how they are loaded, as a configuration says it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


def refuse(where: str, *issues: tuple[bool, str]) -> None:
    """Raise the texts of all issues that are true at once."""
    found = [text for is_wrong, text in issues if is_wrong]
    if found:
        raise ValueError(f"{where}: {'; '.join(found)}.")


@dataclass(frozen=True, kw_only=True)
class ShardSource:
    """One set of shards and how it is read."""

    path: str
    """Folder of the shards, of pixels or, from `grn encode`, of codes."""
    batch_size: int
    """Samples per device and step."""
    media: Literal["image", "video"] = "image"
    """What the samples show."""
    name: str = ""
    """Name in checkpoints and messages; the folder's by default. Keep it when the folder moves."""
    split_train: str = "train"
    """Split to train on (of `<split>.manifest.json`), or a pattern such as "{00000..00099}.tar"."""
    split_val: str | None = "val"
    """Split to validate on, likewise; null for none."""
    path_val: str | None = None
    """Folder of the split to validate on, if another: pixels beside a training on codes."""
    weight: float = 1.0
    """Share of the training steps, relative to the other sources."""
    image_size: int | tuple[int, int] | None = None
    """Height and width in pixels, if not those of the data module."""
    num_frames: int = 1
    """Frames of a clip; 1 for images."""
    fps: float | None = None
    """Frames per second at which a video is read; null takes its frames as they are."""
    random_window: bool = False
    """Train on a random stretch of each video instead of its beginning."""
    horizontal_flip: bool = False
    """Mirror every second training sample. Never for digits, text or "moves left". Codes need
    their mirrored copy (`grn encode --flip true`)."""
    random_crop: bool = False
    """Train on any of the five crops of each sample; only of codes (`grn encode --crop_scale`)."""
    max_samples: int | None = None
    """Use only the first samples of each split, for instance four to overfit."""
    shuffle_shards: int = 16
    """Number of shards among which training samples are mixed at a time; 0 does not shuffle."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        media, fps, limit = self.media, self.fps, self.max_samples
        is_image = media == "image"
        refuse(
            f"source {self.title!r}",
            (media not in ("image", "video"), f"`media` must be 'image' or 'video', got {media!r}"),
            (self.batch_size < 1, f"`batch_size` must be at least 1, got {self.batch_size}"),
            (self.weight <= 0, f"`weight` must be positive, got {self.weight}"),
            (self.num_frames < 1, f"`num_frames` must be at least 1, got {self.num_frames}"),
            (is_image and self.num_frames > 1, "`num_frames` of images must be 1"),
            (is_image and bool(fps or self.random_window), "`fps`, `random_window` are for videos"),
            (fps is not None and fps <= 0, f"`fps` must be positive, got {fps}"),
            (limit is not None and limit < 1, f"`max_samples` must be at least 1, got {limit}"),
            (self.shuffle_shards < 0, f"`shuffle_shards` is negative: {self.shuffle_shards}"),
        )

    @property
    def title(self) -> str:
        """Its name, or its folder's."""
        return self.name or Path(self.path).name


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How samples are loaded; nothing here changes a batch."""

    num_workers: int = 0
    """Loader processes per device; 0 loads in the training process."""
    persistent_workers: bool = True
    """Keep the processes between validations."""
    multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None = None
    """How processes start; null is Python's default."""
    cache_decoded: bool = False
    """Keep decoded samples in memory, for sets that fit; every process keeps its own."""
    max_bad_fraction: float = 0.01
    """Share of samples that may be missing or broken before the run stops; 0 allows none."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        workers, fraction = self.num_workers, self.max_bad_fraction
        refuse(
            "loader",
            (workers < 0, f"`num_workers` must be at least 0, got {workers}"),
            (not 0 <= fraction <= 1, f"`max_bad_fraction` must be in [0, 1], got {fraction}"),
        )


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width; a single number is both."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"`image_size` must be at least 1, got {size}.")
    return height, width
