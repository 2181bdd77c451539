"""Random access to the samples of WebDataset shards, without unpacking them.

A shard is a tar file; consecutive members ``key.extension`` with one key are one sample. Only
local files and only the extensions of `tars.KNOWN_EXTENSIONS` are read: a shard of a stranger can
make this module neither run a command nor unpickle an object. The members of a shard are located
(`tars.py`) when its first sample is asked for.
"""

import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from grn_lightning.datasets.manifest import read_manifest
from grn_lightning.datasets.tars import ShardIndex, index_shard, locate_samples

_REMOTE = re.compile(r"^(pipe:|[a-z][a-z0-9+.-]*:/)", re.IGNORECASE)
_MAX_OPEN_FILES = 64  # a few windows of the sample order; far below the usual limit of 1,024
_MAX_INDEXES = 256  # about half a megabyte each with 10,000 samples of three members
_MANY_SHARDS = 8  # from here on a scan shows its progress


class _OpenFiles:
    """Bytes of files, which stay open; the one not used for longest is closed first.

    Positioned reads do not move a file's cursor, so a forked worker may share the files.
    """

    def __init__(self) -> None:
        self.handles: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes."""
        if path not in self.handles:
            self.handles[path] = os.open(path, os.O_RDONLY)
        self.handles.move_to_end(path)
        if len(self.handles) > _MAX_OPEN_FILES:
            os.close(self.handles.popitem(last=False)[1])
        try:
            data = os.pread(self.handles[path], size, offset)
        except OSError:  # a server that went away has made the handle stale
            os.close(self.handles.pop(path))
            raise
        if len(data) < size:
            raise OSError(f"{path} ended after {len(data)} of {size} bytes at {offset}.")
        return data

    def __del__(self) -> None:
        """Close what is open."""
        for handle in self.handles.values():
            os.close(handle)


# --- finding shards -------------------------------------------------------------------------------


def _expand(folder: str, pattern: str) -> list[Path]:
    """Files of a pattern with braces or wildcards, in the order of the pattern."""
    from webdataset.shardlists import expand_urls

    paths: list[Path] = []
    for name in expand_urls(pattern):
        has_wildcard = any(mark in name for mark in "*?[")
        paths += sorted(Path(folder).glob(name)) if has_wildcard else [Path(folder) / name]
    return paths


def _refuse_missing(paths: Sequence[Path]) -> None:
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        listed = "\n  ".join(missing[:10]) + ("\n  ..." if len(missing) > 10 else "")
        raise ValueError(
            f"{len(missing)} of {len(paths)} shards are missing; copy them or build the set "
            f"again:\n  {listed}"
        )


def _refuse_remote(path: str) -> None:
    if _REMOTE.match(path):
        raise ValueError(
            f"shards must be local files, got {path!r}: copy them to a disk or mount the storage "
            "(for example `aws s3 sync`, `rclone mount`) and give that folder."
        )


def _no_shards(folder: str, split: str) -> ValueError:
    known = sorted(
        p.name.removesuffix(".manifest.json") for p in Path(folder).glob("*.manifest.json")
    )
    return ValueError(
        f"no shards of split {split!r} in {folder!r}"
        + (f" (splits there: {', '.join(known)})" if known else "")
        + ". Make shards of your files with `grn shards`, the embedded digits with `make data`, or "
        "give a pattern such as '{00000..00099}.tar' as the split."
    )


# --- all shards -----------------------------------------------------------------------------------


class RawSample(NamedTuple):
    """A sample as it lies in a shard.

    Attributes:
        key: Its name.
        fields: Bytes by extension.
    """

    key: str
    fields: dict[str, bytes]


class ShardSet:
    """The samples of some shards, by number.

    Safe under any start method of workers: a pickled set leaves files and indexes behind and
    finds them again when needed.

    Args:
        paths: The tars, in the order in which their samples are counted.
        shard_sizes: Number of samples each one ought to hold.
        fields: Extensions that occur in them.
    """

    def __init__(
        self, paths: Sequence[Path], *, shard_sizes: Sequence[int], fields: Collection[str]
    ):
        self.paths = tuple(paths)
        self.shard_sizes = tuple(shard_sizes)
        self.fields = tuple(sorted(fields))
        self._ends = np.cumsum(self.shard_sizes)
        self._forget()

    @classmethod
    def open(cls, folder: str | Path, split: str) -> "ShardSet":
        """Find the shards of a split.

        Args:
            folder: Where the shards lie.
            split: Name of a split, whose shards ``<split>.manifest.json`` lists; or, ending in
                ".tar", a pattern of files with braces or wildcards, which are then all scanned.

        Raises:
            ValueError: If there are none, some are missing, or the folder is not local.
        """
        for path in (str(folder), split):
            _refuse_remote(path)
        manifest_path = Path(folder) / f"{split}.manifest.json"
        if manifest_path.is_file():
            manifest = read_manifest(manifest_path)
            paths = [Path(folder) / shard.name for shard in manifest.shards]
            if paths:
                _refuse_missing(paths)
                sizes = [shard.num_samples for shard in manifest.shards]
                return cls(paths, shard_sizes=sizes, fields=manifest.fields)
        paths = _expand(str(folder), split if split.endswith(".tar") else f"{split}-*.tar")
        if not paths:
            raise _no_shards(str(folder), split)
        _refuse_missing(paths)
        return cls._scan(paths)

    @classmethod
    def _scan(cls, paths: Sequence[Path]) -> "ShardSet":
        """Count the samples of shards that no manifest describes."""
        quiet = len(paths) < _MANY_SHARDS
        scans: Iterable[Path] = tqdm(paths, desc="scanning shards", unit="shard", disable=quiet)
        sizes: list[int] = []
        fields: set[str] = set()
        for path in scans:
            index = index_shard(path)
            sizes.append(len(index.keys))
            fields.update(index.fields)
            if index.damage:
                warnings.warn(
                    f"{path} is damaged ({index.damage}); its first {len(index.keys)} samples are "
                    "used. A manifest would tell how many are missing.",
                    stacklevel=3,
                )
        return cls(paths, shard_sizes=sizes, fields=fields)

    def _forget(self) -> None:
        self._files = _OpenFiles()
        self._index = lru_cache(maxsize=_MAX_INDEXES)(self._checked_index)

    def __getstate__(self) -> dict[str, object]:
        """Leave open files and indexes behind when pickled."""
        return {k: v for k, v in vars(self).items() if k not in ("_files", "_index")}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restore the list of shards; files are opened when needed."""
        vars(self).update(state)
        self._forget()

    def __len__(self) -> int:
        """Return the number of samples, missing ones included."""
        return sum(self.shard_sizes)

    def _checked_index(self, shard: int) -> ShardIndex:
        path, expected = self.paths[shard], self.shard_sizes[shard]
        index = locate_samples(path)
        if len(index.keys) != expected:
            reason = f" ({index.damage})" if index.damage else ""
            warnings.warn(
                f"{path} holds {len(index.keys)} samples where {expected} are expected{reason}; "
                "missing ones count as bad. Copy or build the shard again.",
                stacklevel=4,
            )
        return index

    def locate(self, index: int) -> tuple[int, int]:
        """Return the shard of a sample and its number in there."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard]) + self.shard_sizes[shard]

    def describe(self, index: int) -> str:
        """Name a sample for a message: its shard, and its key where it has one."""
        shard, row = self.locate(index)
        keys = self._index(shard).keys
        return f"{self.paths[shard]}: {keys[row] if row < len(keys) else f'sample {row}'}"

    def read(self, index: int, fields: Collection[str]) -> RawSample:
        """Read some fields of a sample.

        Args:
            index: Number of the sample, in ``[0, len(self))``.
            fields: Extensions that are wanted; those the sample lacks are left out.

        Raises:
            ValueError: If a damaged shard has lost the sample.
            OSError: If the file cannot be read.
        """
        shard, row = self.locate(index)
        table = self._index(shard)
        if row >= len(table.keys):
            raise ValueError(f"the shard ends after {len(table.keys)} samples.")
        data = {
            field: self._files.read(self.paths[shard], int(offset), int(size))
            for field, offset, size in zip(
                table.fields, table.offsets[row], table.sizes[row], strict=True
            )
            if field in fields and offset >= 0
        }
        return RawSample(table.keys[row], data)
