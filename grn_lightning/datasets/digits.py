"""The embedded data set: real handwritten digits that move over a small canvas, with captions.

The scans are the 1,797 8x8 digits bundled with scikit-learn (test part of the UCI set "Optical
Recognition of Handwritten Digits"). They are split *by scan*, so that no stroke of a held-out clip
was ever seen in training. One builder makes images with class and caption ("the digit seven") and
clips with caption ("the digit seven moves left"); the result depends on the configuration alone.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate

from grn_lightning.datasets.manifest import Manifest, write_json, write_manifest, write_shard
from grn_lightning.media.images import encode_png
from grn_lightning.media.video import encode_mp4

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = ("left", "right", "up", "down")

# Pixels per frame along (row, column) at speed 1.
_UNIT_MOTION = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """What the embedded data set looks like and how much of it is written."""

    canvas_size: int = 32
    """Height and width of the pictures in pixels."""
    digit_size: int = 16
    """Height and width of the upscaled scan in pixels; the scans themselves are 8x8."""
    num_frames: int = 9
    """Frames of a clip; `1 + 4 k` suits a tokenizer with temporal stride 4."""
    speed: int = 2
    """Motion of a clip in pixels per frame."""
    place_step: int = 4
    """Start positions lie this many pixels apart; 1 allows every position."""
    fps: int = 8
    """Frame rate that is written into the clips, in frames per second."""
    num_train_clips: int = 5000
    """Training clips; scans are drawn from the training scans."""
    num_val_clips: int = 400
    """Held-out clips; scans are drawn from the held-out scans."""
    num_train_images: int = 4000
    """Training images."""
    num_val_images: int = 400
    """Held-out images."""
    samples_per_shard: int = 1000
    """Samples in one tar file."""
    seed: int = 0
    """Seed of the split, the positions and the directions."""

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing, and digits that would leave the canvas."""
        least = {name: int(name != "seed") for name in asdict(self)}
        low = {name: value for name, value in asdict(self).items() if value < least[name]}
        if low:
            issues = [f"`{n}` must be at least {least[n]}, got {value}" for n, value in low.items()]
            raise ValueError("DigitsConfig: " + "; ".join(issues) + ".")
        needed = self.digit_size + self.speed * (self.num_frames - 1)
        if needed > self.canvas_size:
            raise ValueError(
                f"`canvas_size` must be at least digit_size + speed * (num_frames - 1) = {needed} "
                f"so that a digit stays in the picture, got {self.canvas_size}."
            )


class DigitScans(NamedTuple):
    """Scans of one split."""

    images: Tensor
    """`(n, 8, 8)` float32 in [0, 1], 1 = ink."""
    labels: Tensor
    """`(n,)` long in 0..9."""


def load_scans(split: Literal["train", "val"], *, seed: int = 0) -> DigitScans:
    """Return the scans of a split: four fifths for training, one fifth held out.

    Args:
        split: "train" (1,437 scans) or "val" (360 scans).
        seed: Seed of the permutation that decides the split.

    Raises:
        ValueError: If the split has another name.
    """
    if split not in ("train", "val"):
        raise ValueError(f"`split` must be 'train' or 'val', got {split!r}.")
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    num_val = len(order) // 5 + 1
    chosen = order[num_val:] if split == "train" else order[:num_val]
    images = torch.from_numpy(data.images[chosen]).float() / 16
    return DigitScans(images, torch.from_numpy(data.target[chosen]).long())


def upscale_scan(scan: Tensor, *, size: int) -> Tensor:
    """Upscale `(..., 8, 8)` scans to `(..., size, size)` by bicubic interpolation, in [0, 1]."""
    flat = scan.reshape(-1, 1, *scan.shape[-2:])
    large = interpolate(flat, size=(size, size), mode="bicubic", align_corners=False)
    return large.clamp(0, 1).reshape(*scan.shape[:-2], size, size)


def render_clip(scan: Tensor, *, direction: str | None, start: tuple[int, int],
                config: DigitsConfig) -> Tensor:  # fmt: skip
    """Draw one scan moving over the canvas.

    Args:
        scan: `(8, 8)` in [0, 1].
        direction: One of `DIRECTIONS`, or None for a single still frame.
        start: Row and column of the digit's upper left corner in the first frame.
        config: Sizes and speed.

    Returns:
        uint8 `(f, 3, h, w)`, white on black; f is 1 for a still.
    """
    size, digit = config.canvas_size, upscale_scan(scan, size=config.digit_size)
    num_frames = config.num_frames if direction else 1
    d_row, d_col = _UNIT_MOTION[direction] if direction else (0, 0)
    clip = torch.zeros(num_frames, size, size)
    for frame in range(num_frames):
        row = start[0] + d_row * config.speed * frame
        col = start[1] + d_col * config.speed * frame
        clip[frame, row : row + config.digit_size, col : col + config.digit_size] = digit
    return (clip * 255).round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1).contiguous()


def draw_start(
    direction: str | None, config: DigitsConfig, rng: np.random.Generator
) -> tuple[int, int]:
    """Draw a start position from which the whole motion stays on the canvas."""
    free = config.canvas_size - config.digit_size
    travel = config.speed * (config.num_frames - 1) if direction else 0
    start = []
    for unit in _UNIT_MOTION[direction] if direction else (0, 0):
        low = travel if unit < 0 else 0
        high = free - (travel if unit > 0 else 0)
        start.append(
            low + config.place_step * int(rng.integers((high - low) // config.place_step + 1))
        )
    return start[0], start[1]


def _clip_sample(
    scans: DigitScans, config: DigitsConfig, rng: np.random.Generator
) -> dict[str, str | bytes]:
    """Draw one clip with caption, class and how it was made."""
    chosen, direction = int(rng.integers(len(scans.labels))), DIRECTIONS[rng.integers(4)]
    label, start = int(scans.labels[chosen]), draw_start(direction, config, rng)
    clip = render_clip(scans.images[chosen], direction=direction, start=start, config=config)
    facts = {"scan": chosen, "direction": direction, "start": start, "fps": config.fps}
    return {
        "mp4": encode_mp4(clip, fps=config.fps, lossless=True),
        "txt": f"the digit {DIGIT_NAMES[label]} moves {direction}".encode(),
        "cls": str(label).encode(),
        "json": json.dumps(facts).encode(),
    }


def _image_sample(
    scans: DigitScans, config: DigitsConfig, rng: np.random.Generator
) -> dict[str, str | bytes]:
    """Draw one still with caption, class and how it was made."""
    chosen = int(rng.integers(len(scans.labels)))
    label, start = int(scans.labels[chosen]), draw_start(None, config, rng)
    image = render_clip(scans.images[chosen], direction=None, start=start, config=config)[0]
    return {
        "png": encode_png(image),
        "txt": f"the digit {DIGIT_NAMES[label]}".encode(),
        "cls": str(label).encode(),
        "json": json.dumps({"scan": chosen, "start": start}).encode(),
    }


class _Part(NamedTuple):
    """One split of one kind of sample."""

    folder: str
    split: Literal["train", "val"]
    num_samples: int
    draw: Callable[[DigitScans, DigitsConfig, np.random.Generator], dict[str, str | bytes]]


def _write_part(folder: Path, part: _Part, config: DigitsConfig, number: int) -> Iterator[int]:
    """Write the shards of one part, then their manifest; yields samples as they are done."""
    scans = load_scans(part.split, seed=config.seed)
    infos, fields = [], set[str]()
    for shard in range(-(-part.num_samples // config.samples_per_shard)):
        first = shard * config.samples_per_shard
        count = min(config.samples_per_shard, part.num_samples - first)
        samples = []
        for index in range(first, first + count):
            rng = np.random.default_rng((config.seed, number, index))
            sample: dict[str, str | bytes] = {"__key__": f"{index:08d}"}
            samples.append(sample | part.draw(scans, config, rng))
            yield 1
        scan = write_shard(folder / f"{part.split}-{shard:06d}.tar", samples)
        infos.append(scan.info)
        fields.update(scan.fields)
    manifest = Manifest(shards=tuple(infos), fields=tuple(sorted(fields)))
    write_manifest(folder / f"{part.split}.manifest.json", manifest)


def build_digits(folder: Path, config: DigitsConfig) -> Iterator[int]:
    """Write `clips/` and `images/`, each with shards of "train" and "val".

    Parts that are complete and were written with the same configuration are left as they are.

    Args:
        folder: Where the two folders come to lie.
        config: What is written.

    Yields:
        The number of samples done since the last time, for a progress bar; all of them if the set
        is already there.

    Raises:
        ValueError: If the folder holds a set of another configuration.
    """
    facts_file = folder / "digits.json"
    facts = json.loads(json.dumps(asdict(config)))
    if facts_file.is_file() and json.loads(facts_file.read_text()) != facts:
        raise ValueError(
            f"'{folder}' holds digits of another configuration ({facts_file.name} tells which). "
            "Give another folder, or remove that one yourself."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(facts_file, facts)
    parts = (
        _Part("clips", "train", config.num_train_clips, _clip_sample),
        _Part("clips", "val", config.num_val_clips, _clip_sample),
        _Part("images", "train", config.num_train_images, _image_sample),
        _Part("images", "val", config.num_val_images, _image_sample),
    )
    for number, part in enumerate(parts):
        if (folder / part.folder / f"{part.split}.manifest.json").is_file():
            yield part.num_samples
        else:
            (folder / part.folder).mkdir(parents=True, exist_ok=True)
            yield from _write_part(folder / part.folder, part, config, number)
