"""Shards on disk: how one is written, how one is counted, and the list of all of a split.

A split is the tar files ``<split>-%06d.tar`` and ``<split>.manifest.json`` beside them::

    {"format": 1, "fields": ["cls", "jpg"],
     "shards": [{"name": "train-000000.tar", "num_samples": 1000, "num_bytes": 104857600}]}

A truncated tar ends without an error in most readers, so the counts are the only way to notice.
Files appear under their final name only when they are complete. Beside every shard lies an index
of its members (`tars.py`), which is a shortcut and may be lost.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from webdataset import TarWriter

from grn_lightning.datasets.files import atomic_file as atomic_file
from grn_lightning.datasets.files import write_json as write_json
from grn_lightning.datasets.tars import index_shard, store_index

FORMAT = 1


@dataclass(frozen=True)
class ShardInfo:
    """One tar file of a split."""

    name: str
    """File name, relative to the manifest."""
    num_samples: int
    """Complete samples in it."""
    num_bytes: int
    """Size of the file."""


@dataclass(frozen=True)
class Manifest:
    """All shards of a split."""

    shards: tuple[ShardInfo, ...]
    """In the order in which samples are counted."""
    fields: tuple[str, ...]
    """Extensions that occur in the samples, sorted; a single sample may lack some."""

    @property
    def num_samples(self) -> int:
        """Number of samples of the split."""
        return sum(shard.num_samples for shard in self.shards)


class ShardScan(NamedTuple):
    """What the headers of one tar tell."""

    info: ShardInfo
    """Name, number of samples, size."""
    fields: tuple[str, ...]
    """Extensions that occur, sorted."""
    keys: tuple[str, ...]
    """Key of every sample, in order."""


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the list of a split's shards in one piece."""
    shards = [asdict(shard) for shard in manifest.shards]
    write_json(path, {"format": FORMAT, "fields": list(manifest.fields), "shards": shards})


def read_manifest(path: Path) -> Manifest:
    """Read the list of a split's shards.

    Raises:
        ValueError: If there is none, or it is not of this format.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"no manifest {path}; make shards with `grn shards`.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); build the shards again.") from error
    number = content.get("format") if isinstance(content, dict) else None
    if number != FORMAT:
        raise ValueError(f"{path} must have format {FORMAT}, got {number}; build the shards again.")
    try:
        shards = tuple(ShardInfo(**shard) for shard in content["shards"])
        return Manifest(shards, tuple(content["fields"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} lacks or adds an entry: {error}.") from error


class ShardWriter:
    """Writes one tar, sample by sample; it appears, with its index, when the block ends well.

    Equal samples give equal bytes.

    Args:
        path: The tar.
    """

    def __init__(self, path: Path):
        self.path = path
        self._keys: dict[str, None] = {}  # an ordered set
        self._fields: set[str] = set()
        self._files = ExitStack()

    def __enter__(self) -> Self:
        """Open the file under a temporary name."""
        with ExitStack() as files:
            self._stream = files.enter_context(atomic_file(self.path))
            # No compression: pictures have been compressed, and readers jump to single members.
            options = {"encoder": False, "compress": False, "mtime": 0}
            self._tar = files.enter_context(TarWriter(self._stream, **options))
            self._files = files.pop_all()
        return self

    def add(self, sample: Mapping[str, str | bytes]) -> None:
        """Append a sample, ``{"__key__": "00000001", "jpg": b"...", "txt": b"a caption"}``.

        Raises:
            ValueError: If its key holds a dot or comes twice.
        """
        key = str(sample["__key__"])
        if "." in key.rpartition("/")[-1] or key in self._keys:
            raise ValueError(
                f"keys must differ and hold no dot (the extension follows it), got {key!r}."
            )
        self._keys[key] = None
        self._fields.update(sample.keys() - {"__key__"})
        self._tar.write(dict(sample))

    def __exit__(self, *error: Any) -> None:
        """Give the file its name, or remove it if something went wrong."""
        self._files.__exit__(*error)
        if error[0] is None:
            store_index(self.path, index_shard(self.path))

    @property
    def scan(self) -> ShardScan:
        """What was written, once the block has ended."""
        info = ShardInfo(self.path.name, len(self._keys), self.path.stat().st_size)
        return ShardScan(info, tuple(sorted(self._fields)), tuple(self._keys))


def write_shard(path: Path, samples: Iterable[Mapping[str, str | bytes]]) -> ShardScan:
    """Write samples to one tar; equal samples give equal bytes.

    Args:
        path: The tar, which appears when it is complete.
        samples: See `ShardWriter.add`; all values but the key are bytes.

    Returns:
        What was written.

    Raises:
        ValueError: If a key holds a dot or comes twice.
    """
    with ShardWriter(path) as writer:
        for sample in samples:
            writer.add(sample)
    return writer.scan


def scan_shard(path: Path) -> ShardScan:
    """Count the samples of a tar by its headers: consecutive members of one key.

    Raises:
        ValueError: If the file is cut off or damaged, with the number of samples before that.
    """
    try:
        index = index_shard(path, known=None)
    except OSError as error:
        raise ValueError(f"the shard {path} cannot be read ({error}).") from error
    if index.damage:
        raise ValueError(
            f"the shard {path} cannot be read to its end ({index.damage}); {len(index.keys)} "
            "samples can be seen."
        )
    info = ShardInfo(path.name, len(index.keys), path.stat().st_size)
    return ShardScan(info, index.fields, index.keys)
