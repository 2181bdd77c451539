"""Documents: samples of any size, measured before they are read, and packs of them as tensors.

What a document will be, its frames, rows and columns, follows from what its shard notes about it
(`grn shards` notes size and duration, `grn encode` the grid of the codes) and from its running
number, which picks one of several presets. So the tokens of a pack are known before any of its
samples is decoded.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from grn_lightning.datasets.codes import CODES, TEXT, CodeFacts, OtherTokenizerError, decode_text
from grn_lightning.datasets.order import SampleRequest
from grn_lightning.datasets.packing import PackRequest
from grn_lightning.datasets.samples import (
    Batch,
    Sample,
    SampleFormat,
    SampleReader,
    ShardDataset,
)
from grn_lightning.datasets.shards import ShardSet
from grn_lightning.media.images import to_float
from grn_lightning.media.resolutions import fitting_presets, latent_size, nearest_template

_PRESET = 16  # purpose of a sample's random numbers, beside those of `samples.py`
_FEW = 10  # samples that may be unreadable at the beginning of a set
_MEASURED = 2**20  # documents whose size is remembered
_LATE = 0.01  # frames by which the end of a video may be noted too late

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Strides:
    """Pixels per position of the tokenizer at hand."""

    temporal: int
    """Frames per latent frame behind the first."""
    spatial: int
    """Pixels per position, down and across."""

    def grid(self, size: Grid) -> Grid:
        """Return frames, rows and columns of positions of a clip in pixels.

        Raises:
            ValueError: If the size does not fit.
        """
        frames, height, width = size
        if (frames - 1) % self.temporal or height % self.spatial or width % self.spatial:
            raise ValueError(
                f"a document must have 1 + {self.temporal} k frames and sides of multiples of "
                f"{self.spatial}, got {frames} x {height} x {width}; change `num_frames` or "
                "`image_size`."
            )
        return 1 + (frames - 1) // self.temporal, height // self.spatial, width // self.spatial


@dataclass(frozen=True, kw_only=True)
class DocumentFormat:
    """What a sample of one source is turned into.

    Attributes:
        sample: Medium, labels and flips; `num_frames` is the most frames of a video, and `size`
            that of pixels without presets. Codes are taken at the size they have.
        presets: Resolution presets of pixels, with weights; each sample gets the template nearest
            to its shape and one of the presets it is large enough for. None takes `sample.size`.
        allow_shorter: Take videos with fewer frames than `sample.num_frames` too, whole.
    """

    sample: SampleFormat
    presets: Mapping[str, float] | None = None
    allow_shorter: bool = False


class _Noted(NamedTuple):
    """What a shard notes about a sample; 0 where it does not."""

    num_frames: int
    height: int
    width: int
    fps: float | None


class _SizedReader(SampleReader):
    """Decodes samples of one size; what is cached in the set is told to it."""

    def __init__(self, parent: "DocumentReader", sample_format: SampleFormat):
        self._known = parent.code_facts, parent.text_hash
        super().__init__(
            parent.shards,
            sample_format,
            seed=parent.seed,
            max_samples=parent.num_samples,
            cache_decoded=parent.cache_decoded,
        )

    def _first_facts(self) -> tuple[CodeFacts | None, str | None]:
        return self._known


class DocumentReader:
    """Measures and decodes the documents of one source.

    Args:
        shards: Where they lie.
        document_format: What they become.
        seed: Seed of presets, flips and windows.
        max_samples: Use only the first so many.
        cache_decoded: Keep what has been decoded in memory, for sets that fit.

    Attributes:
        strides: Of the tokenizer; to be set before anything is measured or read.

    Raises:
        ValueError: If what is cached in the set cannot be read.
    """

    strides: Strides

    def __init__(
        self,
        shards: ShardSet,
        document_format: DocumentFormat,
        *,
        seed: int = 0,
        max_samples: int | None = None,
        cache_decoded: bool = False,
    ):
        self.shards, self.format, self.seed = shards, document_format, seed
        self.num_samples = min(len(shards), max_samples or len(shards))
        self.cache_decoded = cache_decoded
        self.code_facts: CodeFacts | None = None
        self.text_hash: str | None = None
        self.code_facts, self.text_hash = self._facts_of_first()
        self._readers: dict[tuple[Grid, float | None], SampleReader] = {}
        self._remember()

    def _remember(self) -> None:
        self._lengths: dict[int, int] = {}
        self._noted = lru_cache(maxsize=_MEASURED)(self._read_noted)

    def __getstate__(self) -> dict[str, object]:
        """Leave what was read behind when pickled."""
        kept = {k: v for k, v in vars(self).items() if k not in ("_noted", "_lengths")}
        return kept | {"_readers": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restore the fields; facts are read again when needed."""
        vars(self).update(state)
        self._remember()

    @property
    def shard_sizes(self) -> list[int]:
        """Number of samples that are used of each shard."""
        starts = np.cumsum([0, *self.shards.shard_sizes[:-1]])
        return np.clip(self.num_samples - starts, 0, self.shards.shard_sizes).tolist()

    # --- measuring --------------------------------------------------------------------------------

    def size(self, index: int, *, number: int) -> Grid:
        """Return frames, height and width in pixels that a document will have.

        Args:
            index: The sample, in ``[0, num_samples)``.
            number: Its running number, which picks a preset.

        Raises:
            ValueError: If the sample does not tell, or has too few frames.
            OSError: If the shard cannot be read.
        """
        noted, wanted = self._noted(index), self.format.sample
        frames = self._num_frames(noted)
        if wanted.codes:
            return frames, noted.height, noted.width
        if self.format.presets is None:
            return frames, *wanted.size
        height, width = noted.height, noted.width
        template = nearest_template(height, width, measure="difference")
        fitting = fitting_presets(height, width, self.format.presets)
        words = np.random.SeedSequence((self.seed, number, _PRESET)).generate_state(1, np.uint64)
        edges = np.cumsum([*fitting.values()])
        place = int(np.searchsorted(edges, int(words[0]) / 2**64 * edges[-1], side="right"))
        rows, columns = latent_size([*fitting][min(place, len(fitting) - 1)], template)
        return frames, rows * self.strides.spatial, columns * self.strides.spatial

    def grid(self, index: int, *, number: int) -> Grid:
        """Return the grid of positions of a document; see `size`."""
        return self.strides.grid(self.size(index, number=number))

    def text_length(self, index: int, count: Callable[[str], int]) -> int:
        """Return the tokens of a document's caption.

        Args:
            index: The sample.
            count: Tells the tokens of a text, always the same; not asked where features are cached.

        Raises:
            ValueError: If it has neither caption nor features.
        """
        if index not in self._lengths:
            if len(self._lengths) >= _MEASURED:
                self._lengths.clear()
            self._lengths[index] = self._count_text(index, count)
        return self._lengths[index]

    def _count_text(self, index: int, count: Callable[[str], int]) -> int:
        raw = self.shards.read(index, ("txt", "json"))
        if not self.format.sample.with_text_features:
            if "txt" not in raw.fields:
                raise ValueError("the sample has no txt.")
            return count(raw.fields["txt"].decode().strip())
        entry = _facts(raw.fields).get(TEXT)
        if isinstance(entry, dict) and isinstance(entry.get("num_tokens"), int):
            return entry["num_tokens"]
        data = self.shards.read(index, (TEXT,)).fields.get(TEXT, b"")
        return int(decode_text(data, entry, encoder_hash=self.text_hash).mask.sum())

    def _num_frames(self, noted: _Noted) -> int:
        wanted = self.format.sample
        if wanted.media == "image":
            return 1
        if not self.format.allow_shorter and not wanted.codes:
            return wanted.num_frames
        if wanted.codes and noted.fps != wanted.fps:
            raise ValueError(
                f"its codes are those of {noted.fps} frames per second, and {wanted.fps} is asked "
                "for; set `fps`, or encode again."
            )
        frames = noted.num_frames
        if not wanted.codes and wanted.fps is not None and noted.fps:
            frames = math.ceil(noted.num_frames / noted.fps * wanted.fps - _LATE)
        if frames < 1 or (frames < wanted.num_frames and not self.format.allow_shorter):
            raise ValueError(
                f"{wanted.num_frames} frames are wanted, it has {frames or 'an unknown number'}; "
                "`allow_shorter` takes it as it is, where its shard notes its length."
            )
        stride = self.strides.temporal
        return 1 + (min(frames, wanted.num_frames) - 1) // stride * stride

    def _read_noted(self, index: int) -> _Noted:
        wanted = self.format.sample
        if not (wanted.codes or self.format.presets or self.format.allow_shorter):
            return _Noted(0, 0, 0, None)
        facts = _facts(self.shards.read(index, ("json",)).fields)
        if wanted.codes:
            entry = facts.get(CODES)
            if not isinstance(entry, dict):
                raise ValueError("its json does not tell what the codes mean; encode it again.")
            frames, height, width = entry["size"]
            return _Noted(frames, height, width, entry.get("fps"))
        height, width = (facts.get(name, 0) for name in ("height", "width"))
        if self.format.presets and min(height, width) < 1:
            raise ValueError(
                "its json tells no height and width, which `presets` need; build the shards with "
                "`grn shards`, or set `image_size`."
            )
        return _Noted(facts.get("num_frames", 0), height, width, facts.get("fps"))

    def _facts_of_first(self) -> tuple[CodeFacts | None, str | None]:
        """What is cached in the set, by its first sample that can be read."""
        wanted = self.format.sample
        if not (wanted.codes or wanted.with_text_features):
            return None, None
        sized, index = wanted, 0
        if wanted.codes:
            index, noted = self._first_noted()
            size = noted.height, noted.width
            sized = replace(wanted, size=size, num_frames=noted.num_frames, fps=noted.fps)
        first = SampleReader(self.shards, sized, max_samples=index + 1)
        return first.code_facts, first.text_hash

    def _first_noted(self) -> tuple[int, _Noted]:
        for index in range(self.num_samples):
            try:
                return index, self._read_noted(index)
            except (ValueError, OSError):
                if index + 1 == min(self.num_samples, _FEW):
                    raise
        raise AssertionError("a set of shards holds at least one sample")

    # --- reading ----------------------------------------------------------------------------------

    def read(self, index: int, *, number: int) -> Sample:
        """Decode a document; see `SampleReader.read`."""
        size = self.size(index, number=number)
        place = (size, self.format.sample.fps)
        if place not in self._readers:
            sized = replace(self.format.sample, size=size[1:], num_frames=size[0])
            self._readers[place] = _SizedReader(self, sized)
        return self._readers[place].read(index, number=number)


def _facts(fields: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the JSON of a sample; nothing if it has none."""
    facts = json.loads(fields.get("json", b"{}"))
    return facts if isinstance(facts, dict) else {}


# --- packs ----------------------------------------------------------------------------------------


class PackedBatch(TypedDict):
    """What a training step receives: documents one behind the other, in place of a `Batch`."""

    grids: list[Grid | None]
    """Latent frames, rows and columns of each document; None where it is a clip still."""
    codes: Tensor
    """Long ``(n, d)``: codes of all positions of the documents that have them."""
    clips: list[Tensor]
    """Float ``(3, f, h, w)`` in [-1, 1]: the documents that are clips still."""
    tokenizer_hash: NotRequired[str]
    """Of the tokenizer that made the codes."""
    keys: list[str]
    """Names of the samples."""
    sources: list[int]
    """Number of each document's source."""
    sample_index: Tensor
    """Long ``(d,)``: running number in the training stream."""
    captions: NotRequired[list[str]]
    """One text per document."""
    text_embeds: NotRequired[Tensor]
    """Float ``(l, c)``: cached features of all captions."""
    text_positions: NotRequired[Tensor]
    """Long ``(l,)``: place of each token in its caption."""
    text_lengths: NotRequired[list[int]]
    """Tokens of each caption whose features are cached."""
    token_budget: int
    """Most tokens that a pack may have."""
    step_samples: int
    """Documents of this step on all ranks."""
    step_mark: int
    """Tells the packs of this step from others; the same on all ranks."""


class DocumentItem(NamedTuple):
    """A decoded document with its place in the stream."""

    sample: Sample
    request: SampleRequest


def collate_pack(
    items: Sequence[DocumentItem], *, step_samples: int, token_budget: int, step_mark: int = 0
) -> PackedBatch:
    """Join documents to a pack.

    Args:
        items: At least one.
        step_samples: Documents of all ranks.
        token_budget: Of the packs.
        step_mark: See `PackRequest`.
    """
    samples = [item.sample for item in items]
    codes = [sample.codes for sample in samples if sample.codes is not None]
    channels = codes[0].shape[0] if codes else 0
    batch: PackedBatch = {
        "grids": [None if s.codes is None else _as_grid(s.codes) for s in samples],
        "codes": torch.cat([torch.empty(0, channels).long(), *(c.flatten(1).T for c in codes)]),
        "clips": [to_float(s.clip.transpose(0, 1)) for s in samples if s.codes is None],
        "keys": [sample.key for sample in samples],
        "sources": [item.request.source for item in items],
        "sample_index": torch.tensor([item.request.number for item in items]),
        "token_budget": token_budget,
        "step_samples": step_samples,
        "step_mark": step_mark,
    }
    hashes = [sample.facts.tokenizer_hash for sample in samples if sample.facts is not None]
    if hashes:
        batch["tokenizer_hash"] = hashes[0]
    captions = [sample.caption for sample in samples if sample.caption is not None]
    if captions:
        batch["captions"] = captions
    texts = [sample.text for sample in samples if sample.text is not None]
    if texts:
        batch["text_embeds"] = torch.cat([text.embeds[text.mask] for text in texts])
        batch["text_positions"] = torch.cat([text.mask.nonzero().flatten() for text in texts])
        batch["text_lengths"] = [int(text.mask.sum()) for text in texts]
    return batch


def _as_grid(codes: Tensor) -> Grid:
    return codes.shape[1], codes.shape[2], codes.shape[3]


def is_pack(batch: Mapping[str, Any]) -> bool:
    """Whether a training batch is a `PackedBatch`."""
    return "grids" in batch


def first_document(batch: PackedBatch, strides: Strides) -> Batch:
    """Return the first document of a pack as a batch of one sample, for checks."""
    grid = batch["grids"][0]
    alone: Batch = {
        "keys": batch["keys"][:1],
        "sample_index": batch["sample_index"][:1],
        "weights": torch.ones(1),
    }
    if grid is None:
        alone["clips"] = batch["clips"][0][None]
    else:
        frames, rows, columns = grid
        codes = batch["codes"][: math.prod(grid)]
        alone["codes"] = codes.T.unflatten(1, grid)[None]
        alone["tokenizer_hash"] = batch["tokenizer_hash"]
        alone["clip_size"] = (
            1 + (frames - 1) * strides.temporal,
            rows * strides.spatial,
            columns * strides.spatial,
        )
    if "captions" in batch:
        alone["captions"] = batch["captions"][:1]
    if "text_embeds" in batch:
        alone["text_embeds"] = batch["text_embeds"][: batch["text_lengths"][0]][None]
        alone["text_mask"] = torch.ones(alone["text_embeds"].shape[:2], dtype=torch.bool)
    return alone


class PackDataset(ShardDataset):
    """Answers requests for packs; a document that cannot be read is reported, counted, left out.

    Args:
        readers: The sources.
        token_budget: Of the packs.
        max_bad_fraction: See `ShardDataset`.
    """

    instead = "left out of its pack:"

    def __init__(
        self,
        readers: Sequence[DocumentReader],
        *,
        token_budget: int,
        max_bad_fraction: float = 0.01,
    ):
        super().__init__(readers, max_bad_fraction=max_bad_fraction)  # type: ignore[arg-type]
        self.token_budget = token_budget

    def __getitem__(self, pack: PackRequest) -> PackedBatch:  # type: ignore[override]
        """Return the documents of a pack.

        Raises:
            ValueError: If too many documents are bad, or all of the pack.
        """
        items = [item for request in pack.requests if (item := self._read(request)) is not None]
        if not items:
            raise ValueError("no document of a pack can be read; repair or rebuild the shards.")
        return collate_pack(
            items,
            step_samples=pack.step_samples,
            token_budget=self.token_budget,
            step_mark=pack.step_mark,
        )

    def _read(self, request: SampleRequest) -> DocumentItem | None:
        reader = self.readers[request.source]
        self.num_seen += 1
        try:
            return DocumentItem(reader.read(request.index, number=request.number), request)
        except OtherTokenizerError as error:
            where = reader.shards.describe(request.index)
            raise OtherTokenizerError(f"{where}: {error}") from error
        except (ValueError, OSError) as error:
            self._count_bad(reader.shards.describe(request.index), error)
            return None
