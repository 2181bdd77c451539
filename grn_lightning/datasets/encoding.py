"""From shards of pixels to shards of codes: the plan, the work of a process, and what was made.

Code shard ``train-000007.tar`` holds the samples of pixel shard ``train-000007.tar``, in order and
under their keys, with classes, captions and facts carried along. A shard is the unit of work: it
takes its name when it is complete, and finished ones are skipped. Process r of w owns the shards
r, r + w, ...; no other one writes them, so there is neither a duplicate nor a hole, whoever was
killed when.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from grn_lightning.datasets.codes import (
    FORMAT,
    TEXT,
    CodeFacts,
    TextFeatures,
    encode_codes,
    encode_text,
)
from grn_lightning.datasets.files import atomic_file, write_json
from grn_lightning.datasets.manifest import (
    Manifest,
    ShardScan,
    ShardWriter,
    scan_shard,
    write_manifest,
)
from grn_lightning.datasets.samples import Sample, SampleFormat, SampleReader
from grn_lightning.datasets.shards import ShardSet
from grn_lightning.datasets.tars import index_shard, load_index, store_index
from grn_lightning.media.images import to_float

_CARRIED = ("txt", "cls", "json")
_ADVICE = "choose another folder, or move the old files away."


@dataclass(frozen=True, kw_only=True)
class EncodingPlan:
    """What decides the bytes of a set of codes."""

    split: str
    """Split that is encoded."""
    media: str
    """"image" or "video"."""
    size: tuple[int, int, int]
    """Frames, height and width in pixels."""
    fps: float | None
    """Frames per second at which videos are read."""
    flip: bool
    """Whether mirrored copies are stored."""
    crop_scale: float | None = None
    """Size of the scaled picture over that of its five crops; None is the centre crop alone."""
    tokenizer_hash: str
    """Of the tokenizer's weights."""
    text_hash: str | None
    """Of the text encoder, if features are stored."""
    source: str
    """Hash of names and sizes of the source's shards."""

    def plain(self) -> dict[str, Any]:
        """Return the plan as JSON holds it; one crop goes unsaid, as before there were more."""
        facts = asdict(self)
        if self.crop_scale is None:
            del facts["crop_scale"]
        return json.loads(json.dumps({"format": FORMAT, **facts}))

    def check(self, folder: Path) -> None:
        """Refuse to mix two sets under one name.

        Raises:
            ValueError: Naming what differs.
        """
        path = folder / f"{self.split}.plan.json"
        if not path.exists():
            if any(folder.glob(f"{self.split}-*.tar")):
                raise ValueError(
                    f"{folder} holds {self.split} shards that no plan describes; {_ADVICE}"
                )
            return
        old = json.loads(path.read_text())
        new = self.plain()
        changed = [
            f"{name} was {old.get(name)} and is {new.get(name)}"
            for name in {**new, **old}
            if old.get(name) != new.get(name)
        ]
        if changed:
            raise ValueError(
                f"{folder} holds other codes of {self.split}: {'; '.join(changed)}. To go on, "
                f"{_ADVICE}"
            )

    def store(self, folder: Path) -> None:
        """Write the plan down."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{self.split}.plan.json", self.plain())


def source_digest(shards: ShardSet) -> str:
    """Return a hash of names, counts and sizes of shards."""
    pairs = zip(shards.paths, shards.shard_sizes, strict=True)
    facts = [(path.name, count, path.stat().st_size) for path, count in pairs]
    return blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


# --- reading --------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A sample of the source: its shard, and its number in there."""

    shard: int
    row: int


class Skipped(NamedTuple):
    """A sample that could not be read."""

    place: Place
    reason: str


class SourceBatch(NamedTuple):
    """Samples of one shard."""

    places: list[Place]
    """Where they lie."""
    keys: list[str]
    """Their names."""
    clips: Tensor
    """Float `(b, 3, f, h, w)` in [-1, 1]."""
    carried: list[dict[str, bytes]]
    """Members that are copied."""
    skipped: list[Skipped]
    """Samples of the batch that are not there."""


class SourceBatches(Dataset[SourceBatch]):
    """Decodes batches and keeps what is copied; a sample that cannot be read is told.

    Args:
        shards: The source.
        sample_format: How a sample is read.
    """

    def __init__(self, shards: ShardSet, sample_format: SampleFormat):
        self.shards = shards
        self.reader = SampleReader(shards, sample_format)
        self.starts = np.cumsum([0, *shards.shard_sizes])

    def __getitem__(self, places: Sequence[Place]) -> SourceBatch:
        """Return the samples of some places."""
        items = [self._read(place) for place in places]
        good = [item for item in items if not isinstance(item, Skipped)]
        clips = torch.empty(0, 3, 0, 0, 0)
        if good:
            frames = torch.stack([sample.clip for _, sample, _ in good])  # (b, f, 3, h, w)
            clips = to_float(frames.transpose(1, 2).contiguous())
        return SourceBatch(
            [place for place, _, _ in good],
            [sample.key for _, sample, _ in good],
            clips,
            [carried for _, _, carried in good],
            [item for item in items if isinstance(item, Skipped)],
        )

    def _read(self, place: Place) -> tuple[Place, Sample, dict[str, bytes]] | Skipped:
        index = int(self.starts[place.shard]) + place.row
        try:
            sample = self.reader.read(index, number=0)
            return place, sample, self.shards.read(index, _CARRIED).fields
        except (ValueError, OSError) as error:
            return Skipped(place, f"{self.shards.describe(index)}: {error}")


class ShardBatches(Sampler[list[Place]]):
    """Batches of the shards of one process, none across two shards.

    Args:
        sizes: Number of samples of every shard of the source.
        shards: Numbers of the shards of this process.
        batch_size: Most samples in a batch.
    """

    def __init__(self, sizes: Sequence[int], shards: Sequence[int], *, batch_size: int):
        self.sizes, self.shards, self.batch_size = tuple(sizes), tuple(shards), batch_size

    def __iter__(self) -> Iterator[list[Place]]:
        """Yield the places of one batch after the other."""
        for shard in self.shards:
            for first in range(0, self.sizes[shard], self.batch_size):
                rows = range(first, min(first + self.batch_size, self.sizes[shard]))
                yield [Place(shard, row) for row in rows]

    def __len__(self) -> int:
        """Return the number of batches."""
        return sum(-(-self.sizes[shard] // self.batch_size) for shard in self.shards)


# --- writing --------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """What the networks made of a `SourceBatch`."""

    codes: dict[str, Tensor]
    """Long `(b, d, f', h', w')` by the member they are stored as; see `codes_member`."""
    text: list[TextFeatures] | None
    """Features of the captions."""


def _as_object(data: bytes) -> dict[str, Any]:
    """Read the facts of a stranger's sample; what is no JSON object is left behind."""
    try:
        facts = json.loads(data)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def code_samples(
    batch: SourceBatch, encoded: Encoded, facts: CodeFacts, *, text_hash: str | None
) -> Iterator[dict[str, Any]]:
    """Yield the members of every sample of a code shard."""
    for n, (key, carried) in enumerate(zip(batch.keys, batch.carried, strict=True)):
        sample: dict[str, Any] = {"__key__": key, **carried}
        entries = _as_object(carried.get("json", b"{}"))
        for name, codes in encoded.codes.items():
            sample[name], entries[name] = encode_codes(codes[n], facts)
        if encoded.text is not None and text_hash is not None:
            sample[TEXT], entries[TEXT] = encode_text(encoded.text[n], text_hash)
        yield sample | {"json": json.dumps(entries, sort_keys=True, ensure_ascii=False).encode()}


class CodeShardWriter:
    """Writes the code shards of one process, one after the other.

    Args:
        folder: Where they come to lie.
        names: Name of every shard of the source.
        sizes: Number of samples of every shard of the source.
        split: Name of the split.
    """

    def __init__(self, folder: Path, names: Sequence[str], sizes: Sequence[int], *, split: str):
        self.folder, self.names, self.sizes, self.split = folder, names, sizes, split
        self._open: ShardWriter | None = None
        self._skipped: list[Skipped] = []

    def path(self, shard: int) -> Path:
        """Return where a code shard lies when it is complete."""
        return self.folder / self.names[shard]

    def add(self, batch: SourceBatch, samples: Iterator[dict[str, Any]]) -> None:
        """Append what became of a batch; the last one of a shard completes it."""
        places = batch.places + [skipped.place for skipped in batch.skipped]
        shard, last = max(places)
        if self._open is None:
            self._open = ShardWriter(self.path(shard)).__enter__()
        for sample in samples:
            self._open.add(sample)
        self._skipped += batch.skipped
        if last == self.sizes[shard] - 1:
            self._write_skipped(shard)
            self._open.__exit__(None, None, None)
            self._open = None

    def _write_skipped(self, shard: int) -> None:
        if self._skipped:
            lines = [json.dumps({"reason": s.reason}, ensure_ascii=False) for s in self._skipped]
            with atomic_file(skipped_file(self.path(shard))) as stream:
                stream.write(("\n".join(lines) + "\n").encode())
        self._skipped = []

    def abort(self) -> None:
        """Remove what is not complete."""
        if self._open is not None:
            self._open.__exit__(RuntimeError, RuntimeError(), None)
            self._open = None


def skipped_file(path: Path) -> Path:
    """Return where the samples that a code shard lacks are listed."""
    return path.with_suffix(".skipped.jsonl")


# --- what was made --------------------------------------------------------------------------------


def finish_split(folder: Path, names: Sequence[str], *, split: str) -> None:
    """Write the manifest of complete code shards, and clear away the remains of killed processes.

    Raises:
        ValueError: If a shard is missing or damaged.
    """
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(names)} code shards are missing in {folder}, {missing[0]} for "
            "instance; run the same command again."
        )
    scans: list[ShardScan] = [scan_shard(folder / name) for name in names]
    for name in names:
        if load_index(folder / name) is None:  # killed between the shard and its index
            store_index(folder / name, index_shard(folder / name))
    fields = sorted({field for scan in scans for field in scan.fields})
    manifest = Manifest(tuple(scan.info for scan in scans if scan.keys), tuple(fields))
    write_manifest(folder / f"{split}.manifest.json", manifest)
    for remains in folder.glob(f"{split}-*.tmp"):
        remains.unlink()
