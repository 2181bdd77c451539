"""From a shard's bytes to a batch: decoding, what to do with bad samples, collating."""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from grn_lightning.datasets.codes import (
    CODES,
    NUM_CROPS,
    TEXT,
    CodeFacts,
    OtherTokenizerError,
    TextFeatures,
    codes_member,
    decode_codes,
    decode_text,
    first_frames,
)
from grn_lightning.datasets.order import SampleRequest
from grn_lightning.datasets.shards import RawSample, ShardSet
from grn_lightning.datasets.tars import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from grn_lightning.media.images import center_crop_resize, decode_image, to_float
from grn_lightning.media.video import decode_video

_FEW_BAD = 10  # so many are forgiven before the share of bad samples means anything
_FLIP, _WINDOW, _CROP = 0, 1, 2  # purposes of the random numbers of a sample
_NO_FRAMES = torch.empty(0, 3, 0, 0, dtype=torch.uint8)

_EXTENSIONS: dict[str, tuple[str, ...]] = {"image": IMAGE_EXTENSIONS, "video": VIDEO_EXTENSIONS}


@dataclass(frozen=True, kw_only=True)
class SampleFormat:
    """What a sample of one source is turned into.

    Attributes:
        media: Whether pictures or films are read.
        size: Height and width; the medium is scaled to cover it, then its centre is cut out.
        num_frames: Frames of a clip; 1 for pictures.
        fps: Frames per second at which a film is read; None takes the frames as they are.
        random_window: Read a random stretch of a film instead of its beginning. The whole film
            is decoded for it: made for short ones.
        horizontal_flip: Mirror every second sample. Never for digits, text or "moves left".
        random_crop: Take any of the five crops whose codes are stored, all alike; only of codes.
        with_classes: Read the class index (`cls`).
        with_captions: Read the caption (`txt`).
        with_text_features: Read cached features of the caption (`text.npz`).
        num_classes: Refuse classes from here on.
        codes: Read cached codes instead of pixels; `size`, `num_frames` and `fps` are then what
            must have been encoded.
    """

    media: Literal["image", "video"]
    size: tuple[int, int]
    num_frames: int = 1
    fps: float | None = None
    random_window: bool = False
    horizontal_flip: bool = False
    random_crop: bool = False
    with_classes: bool = False
    with_captions: bool = False
    with_text_features: bool = False
    num_classes: int | None = None
    codes: bool = False

    def fields(self, codes: str = CODES) -> tuple[str, ...]:
        """Extensions to be read of a sample, whose codes are the member of that name."""
        labels = ["cls"] * self.with_classes + ["txt"] * self.with_captions
        labels += [TEXT] * self.with_text_features
        labels += ["json"] * (self.codes or self.with_text_features)
        if self.codes:
            return (codes, *labels)
        return (*_EXTENSIONS[self.media], *labels)


class Sample(NamedTuple):
    """A decoded sample.

    Attributes:
        key: Its name in the shard.
        clip: uint8 ``(f, 3, h, w)`` in [0, 255]; of no frames where codes are read.
        class_label: Class index, if asked for.
        caption: Text, if asked for.
        codes: Long ``(d, f', h', w')``, if asked for.
        facts: What the codes mean.
        text: Features of the caption, if asked for.
    """

    key: str
    clip: Tensor
    class_label: int | None = None
    caption: str | None = None
    codes: Tensor | None = None
    facts: CodeFacts | None = None
    text: TextFeatures | None = None


class Item(NamedTuple):
    """A sample with its place in the stream, see `SampleRequest`."""

    sample: Sample
    number: int
    weight: float


class Batch(TypedDict):
    """What a training or validation step receives."""

    clips: NotRequired[Tensor]
    """Float ``(b, 3, f, h, w)`` in [-1, 1]; a picture is a clip of one frame."""
    codes: NotRequired[Tensor]
    """Long ``(b, d, f', h', w')``, in place of clips where a source holds codes."""
    tokenizer_hash: NotRequired[str]
    """Of the tokenizer that made the codes."""
    clip_size: NotRequired[tuple[int, int, int]]
    """Frames, height and width in pixels that the codes stand for."""
    keys: list[str]
    """Names of the samples."""
    sample_index: Tensor
    """Long ``(b,)``: running number in the training stream, or position in the validation set."""
    weights: Tensor
    """Float ``(b,)``: 1, or 0 for what only fills a validation batch."""
    class_labels: NotRequired[Tensor]
    """Long ``(b,)``."""
    captions: NotRequired[list[str]]
    """One text per sample."""
    text_embeds: NotRequired[Tensor]
    """Float ``(b, l, c)``: cached features of the captions."""
    text_mask: NotRequired[Tensor]
    """Bool ``(b, l)``: which of them are there."""


def collate(items: Sequence[Item]) -> Batch:
    """Join samples of one source to a batch."""
    samples = [item.sample for item in items]
    batch: Batch = {
        **_joined_media(samples),
        "keys": [sample.key for sample in samples],
        "sample_index": torch.tensor([item.number for item in items]),
        "weights": torch.tensor([item.weight for item in items]),
    }
    labels = [sample.class_label for sample in samples if sample.class_label is not None]
    captions = [sample.caption for sample in samples if sample.caption is not None]
    if labels:
        batch["class_labels"] = torch.tensor(labels)
    if captions:
        batch["captions"] = captions
    texts = [sample.text for sample in samples if sample.text is not None]
    if texts:
        batch["text_embeds"] = pad_sequence([text.embeds for text in texts], batch_first=True)
        batch["text_mask"] = pad_sequence([text.mask for text in texts], batch_first=True)
    return batch


def _joined_media(samples: Sequence[Sample]) -> Any:
    """Clips, or codes with what is common to them."""
    codes, facts = [sample.codes for sample in samples], samples[0].facts
    if facts is None:
        clips = torch.stack([sample.clip for sample in samples])  # (b, f, 3, h, w)
        return {"clips": to_float(clips.transpose(1, 2).contiguous())}  # (b, 3, f, h, w)
    return {
        "codes": torch.stack([one for one in codes if one is not None]),
        "tokenizer_hash": facts.tokenizer_hash,
        "clip_size": facts.size,
    }


# --- one source -----------------------------------------------------------------------------------


def _random(seed: int, number: int, purpose: int) -> int:
    """64 random bits that belong to one sample of the stream."""
    words = np.random.SeedSequence((seed, number, purpose)).generate_state(1, np.uint64)
    return int(words[0])


def _coprime_stride(total: int) -> int:
    """A step near the golden section of `total` that visits everything before it returns."""
    stride = max(1, round(0.618 * total))
    while math.gcd(stride, total) != 1:
        stride += 1
    return stride


class SampleReader:
    """Decodes the samples of one source.

    Args:
        shards: Where they lie.
        sample_format: What they become.
        seed: Seed of flips and windows.
        max_samples: Use only the first so many.
        cache_decoded: Keep what has been decoded in memory, for sets that fit.
    """

    def __init__(
        self,
        shards: ShardSet,
        sample_format: SampleFormat,
        *,
        seed: int = 0,
        max_samples: int | None = None,
        cache_decoded: bool = False,
    ):
        self.shards = shards
        self.format = sample_format
        self.seed = seed
        self.num_samples = min(len(shards), max_samples or len(shards))
        self.cache_decoded = cache_decoded
        self.code_facts: CodeFacts | None = None
        self.text_hash: str | None = None
        self.code_facts, self.text_hash = self._first_facts()
        self._cache: dict[tuple[int, str], Sample] = {}

    def __getstate__(self) -> dict[str, object]:
        """Leave cached samples behind when pickled."""
        return vars(self) | {"_cache": {}}

    @property
    def shard_sizes(self) -> list[int]:
        """Number of samples that are used of each shard."""
        starts = np.cumsum([0, *self.shards.shard_sizes[:-1]])
        left = self.num_samples - starts
        return np.clip(left, 0, self.shards.shard_sizes).tolist()

    def substitute(self, index: int) -> int:
        """Return the sample that stands in for a bad one.

        Repeated, it visits all samples. It jumps far, so that the missing end of a damaged shard
        is not all replaced by one and the same neighbour.
        """
        return (index + _coprime_stride(self.num_samples)) % self.num_samples

    def read(self, index: int, *, number: int) -> Sample:
        """Decode a sample.

        Args:
            index: The sample, in ``[0, num_samples)``.
            number: Its running number, which decides flip and window.

        Raises:
            ValueError: If something is missing or does not decode.
            OSError: If the shard cannot be read.
        """
        is_flipped = self.format.horizontal_flip and bool(_random(self.seed, number, _FLIP) % 2)
        crop = _random(self.seed, number, _CROP) % NUM_CROPS if self.format.random_crop else 0
        # Pixels are flipped when they are taken.
        codes = codes_member(crop, is_flipped) if self.format.codes else CODES
        place = (index, codes)
        sample = self._cache.get(place)
        if sample is None:
            sample = self._decode(self.shards.read(index, self.format.fields(codes)), codes)
        if self.cache_decoded:
            self._cache[place] = sample
        return sample._replace(clip=self._augment(sample.clip, number, is_flipped))

    def _decode(self, raw: RawSample, member: str) -> Sample:
        codes, facts = self._decode_codes(raw, member) if self.format.codes else (None, None)
        return Sample(
            key=raw.key,
            clip=_NO_FRAMES if self.format.codes else self._decode_clip(raw),
            class_label=self._decode_class(raw) if self.format.with_classes else None,
            caption=_field(raw, "txt").decode().strip() if self.format.with_captions else None,
            codes=codes,
            facts=facts,
            text=self._decode_text(raw) if self.format.with_text_features else None,
        )

    def _decode_codes(self, raw: RawSample, name: str = CODES) -> tuple[Tensor, CodeFacts]:
        """Codes of the frames that are wanted."""
        expected = None if self.code_facts is None else self.code_facts.tokenizer_hash
        entry = _entries(raw).get(name)
        codes, facts = decode_codes(_field(raw, name), entry, tokenizer_hash=expected)
        made = (*facts.size[1:], facts.fps)
        wanted = (*self.format.size, self.format.fps)
        if made != wanted:
            raise ValueError(
                "its codes are those of (height, width, fps) "
                f"{made}, and {wanted} is asked for; set `image_size` and `fps`, or encode again."
            )
        codes = first_frames(codes, facts, self.format.num_frames)
        size = (self.format.num_frames, *self.format.size)
        return codes, replace(facts, size=size, grid=(codes.shape[1], *facts.grid[1:]))

    def _first_facts(self) -> tuple[CodeFacts | None, str | None]:
        """What is cached in the set, by the first sample that can be read: all must agree.

        Raises:
            ValueError: If none of the first samples can be read.
        """
        if not (self.format.codes or self.format.with_text_features):
            return None, None
        for index in range(min(self.num_samples, _FEW_BAD)):
            try:
                raw = self.shards.read(index, self.format.fields())
                facts = self._decode_codes(raw)[1] if self.format.codes else None
                entry = _entries(raw).get(TEXT) if self.format.with_text_features else None
                return facts, entry and str(entry.get("encoder_hash"))
            except (ValueError, OSError) as error:
                where, problem = self.shards.describe(index), error
        raise ValueError(f"{where}: {problem}")

    def _decode_clip(self, raw: RawSample) -> Tensor:
        """Uint8 ``(f, 3, h, w)``; all frames of the film if a window is still to be chosen."""
        data = _field(raw, *_EXTENSIONS[self.format.media])
        if self.format.media == "image":
            return center_crop_resize(decode_image(data), self.format.size)[None]
        num_frames = None if self.format.random_window else self.format.num_frames
        clip = decode_video(data, fps=self.format.fps, num_frames=num_frames, size=self.format.size)
        if len(clip) < self.format.num_frames:
            raise ValueError(f"{self.format.num_frames} frames are wanted, it has {len(clip)}.")
        return clip

    def _decode_text(self, raw: RawSample) -> TextFeatures:
        entry = _entries(raw).get(TEXT)
        return decode_text(_field(raw, TEXT), entry, encoder_hash=self.text_hash)

    def _decode_class(self, raw: RawSample) -> int:
        label = int(_field(raw, "cls"))
        if label < 0 or (self.format.num_classes and label >= self.format.num_classes):
            raise ValueError(f"class {label} is not in [0, {self.format.num_classes}).")
        return label

    def _augment(self, clip: Tensor, number: int, is_flipped: bool) -> Tensor:
        if self.format.codes:
            return clip
        if self.format.random_window:
            num_starts = len(clip) - self.format.num_frames + 1
            start = _random(self.seed, number, _WINDOW) % num_starts
            clip = clip[start : start + self.format.num_frames]
        return clip.flip(-1) if is_flipped else clip


def _entries(raw: RawSample) -> dict[str, Any]:
    """Return the JSON of a sample; nothing if it has none."""
    entries = json.loads(raw.fields.get("json", b"{}"))
    return entries if isinstance(entries, dict) else {}


def _field(raw: RawSample, *extensions: str) -> bytes:
    """Return the first of some fields that the sample has."""
    for extension in extensions:
        if extension in raw.fields:
            return raw.fields[extension]
    raise ValueError(f"the sample has no {' or '.join(extensions)}.")


def holds_codes(shards: ShardSet, media: str) -> bool:
    """Whether the samples are codes; where there are pixels too, these are read."""
    return CODES in shards.fields and not set(_EXTENSIONS[media]) & set(shards.fields)


def check_fields(shards: ShardSet, sample_format: SampleFormat, *, name: str) -> None:
    """Refuse a source none of whose samples has what is asked for.

    Raises:
        ValueError: Naming what is missing and what there is.
    """
    wanted: dict[str, tuple[str, ...]] = {sample_format.media: _EXTENSIONS[sample_format.media]}
    if sample_format.codes:
        wanted = {"codes": (CODES,)}
        if sample_format.horizontal_flip:
            wanted["mirrored codes, see `grn encode --flip`"] = (codes_member(0, True),)
        if sample_format.random_crop:
            last = codes_member(NUM_CROPS - 1, sample_format.horizontal_flip)
            wanted["codes of crops, see `grn encode --crop_scale`"] = (last,)
    if sample_format.with_text_features:
        wanted["text features, see `grn encode --text_encoder`"] = (TEXT,)
    if sample_format.with_classes:
        wanted["class"] = ("cls",)
    if sample_format.with_captions:
        wanted["caption"] = ("txt",)
    missing = [
        f"{what} ({', '.join(extensions)})"
        for what, extensions in wanted.items()
        if not set(extensions) & set(shards.fields)
    ]
    if missing:
        raise ValueError(
            f"the samples of source {name!r} in {shards.paths[0].parent} have no "
            f"{' and no '.join(missing)}; their fields are {', '.join(shards.fields) or 'none'}. "
            "Add the field to the shards, or change `media`, `with_classes` or `with_captions`."
        )


# --- all sources ----------------------------------------------------------------------------------


class ShardDataset(Dataset[Item]):
    """Answers sample requests; a bad sample is reported, counted and replaced.

    The replacement depends on the bad sample alone, so runs stay reproducible. Too many bad
    samples stop the run. Every loader worker counts for itself.

    Args:
        readers: The sources.
        is_validation: Give replacements weight 0.
        max_bad_fraction: Share of bad samples among those seen that is accepted; the first nine
            are, whatever their share. 0 accepts none.
    """

    instead = "another sample replaces"

    def __init__(
        self,
        readers: Sequence[SampleReader],
        *,
        is_validation: bool = False,
        max_bad_fraction: float = 0.01,
    ):
        self.readers = tuple(readers)
        self.is_validation = is_validation
        self.max_bad_fraction = max_bad_fraction
        self.num_seen = 0
        self.num_bad = 0

    def __len__(self) -> int:
        """Return the number of samples of all sources."""
        return sum(reader.num_samples for reader in self.readers)

    def __getitem__(self, request: SampleRequest) -> Item:
        """Return the requested sample or its replacement.

        Raises:
            ValueError: If too many samples are bad.
        """
        reader, index = self.readers[request.source], request.index
        while True:
            self.num_seen += 1
            try:
                sample = reader.read(index, number=request.number)
            except OtherTokenizerError as error:
                raise OtherTokenizerError(f"{reader.shards.describe(index)}: {error}") from error
            except (ValueError, OSError) as error:
                self._count_bad(reader.shards.describe(index), error)
                index = reader.substitute(index)
                continue
            is_void = self.is_validation and index != request.index
            return Item(sample, request.number, 0.0 if is_void else request.weight)

    def _count_bad(self, where: str, error: Exception) -> None:
        self.num_bad += 1
        limit = self.max_bad_fraction
        if self.num_bad > limit * self.num_seen and (self.num_bad >= _FEW_BAD or limit == 0):
            raise ValueError(
                f"{self.num_bad} of {self.num_seen} samples are bad, more than "
                f"max_bad_fraction={limit} allows. The last one is {where}: {error} "
                "Repair or rebuild the shards, or raise `max_bad_fraction`."
            ) from error
        warnings.warn(f"{self.instead} {where}: {error}", stacklevel=3)
