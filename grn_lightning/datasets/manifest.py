"""Shards on disk: how one is written, how one is counted, and the list of all of a split.

A split is the tar files ``<split>-%06d.tar`` and ``<split>.manifest.json`` beside them::

    {"format": 1, "fields": ["cls", "jpg"],
     "shards": [{"name": "train-000000.tar", "num_samples": 1000, "num_bytes": 104857600}]}

A truncated tar ends without an error in most readers, so the counts are the only way to notice.
Files appear under their final name only when they are complete.
"""

import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, NamedTuple

from webdataset import TarWriter

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


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes its name when the block ends well, and leaves no trace otherwise.

    The temporary name holds the process number: two processes never write into one file.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Write a small JSON file in one piece."""
    with atomic_file(path) as stream:
        stream.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


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


def _checked_key(sample: Mapping[str, str | bytes], keys: Mapping[str, None]) -> str:
    key = str(sample["__key__"])
    if "." in key.rpartition("/")[-1] or key in keys:
        raise ValueError(
            f"keys must differ and hold no dot (the extension follows it), got {key!r}."
        )
    return key


def write_shard(path: Path, samples: Iterable[Mapping[str, str | bytes]]) -> ShardScan:
    """Write samples to one tar; equal samples give equal bytes.

    Args:
        path: The tar, which appears when it is complete.
        samples: ``{"__key__": "00000001", "jpg": b"...", "txt": b"a caption"}`` and so on; all
            values but the key are bytes.

    Returns:
        What was written.

    Raises:
        ValueError: If a key holds a dot or comes twice.
    """
    keys: dict[str, None] = {}  # an ordered set
    fields: set[str] = set()
    with atomic_file(path) as stream:
        # No compression: pictures have been compressed, and readers jump to single members.
        with TarWriter(stream, encoder=False, compress=False, mtime=0) as tar:
            for sample in samples:
                keys[_checked_key(sample, keys)] = None
                tar.write(dict(sample))
                fields.update(sample.keys() - {"__key__"})
        num_bytes = stream.tell()
    return ShardScan(ShardInfo(path.name, len(keys), num_bytes), tuple(sorted(fields)), tuple(keys))


def scan_shard(path: Path) -> ShardScan:
    """Count the samples of a tar by its headers: consecutive members of one key.

    Raises:
        ValueError: If the file is cut off or damaged, with the number of samples before that.
    """
    keys: list[str] = []
    fields: set[str] = set()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if member.isreg() and keys[-1:] != [folder + slash + stem]:
                    keys.append(folder + slash + stem)
                if member.isreg():
                    fields.add(extension.lower())
            end = tar.offset
        with path.open("rb") as stream:  # tarfile takes damage between members for the end
            stream.seek(end)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end mark at byte {end}")
    except (tarfile.TarError, OSError) as error:
        found = f"{len(keys)} samples can be seen"
        raise ValueError(
            f"the shard {path} cannot be read to its end ({error}); {found}."
        ) from error
    info = ShardInfo(path.name, len(keys), path.stat().st_size)
    return ShardScan(info, tuple(sorted(fields)), tuple(keys))
