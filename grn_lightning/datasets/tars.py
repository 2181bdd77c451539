"""What lies where in a shard: its members are located once, by their headers or by a stored index.

A shard is a tar file; consecutive members ``key.extension`` with one key are one sample. Reading
the headers takes about 50 microseconds a member, which is seconds for large shards, so whoever
writes a shard stores what it found in ``<shard>.index.npz`` beside it. That file is only a
shortcut: without it, or where it does not fit the tar, the headers are read.
"""

import tarfile
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from grn_lightning.datasets.codes import CODE_MEMBERS, TEXT
from grn_lightning.datasets.files import atomic_file

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
VIDEO_EXTENSIONS = ("mp4", "webm", "mov", "avi", "mkv")
CODE_EXTENSIONS = (*CODE_MEMBERS, TEXT)
KNOWN_EXTENSIONS = (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS, *CODE_EXTENSIONS, "txt", "cls", "json")

_FORMAT = 1  # of a stored index


class ShardIndex(NamedTuple):
    """Where the samples of one tar lie.

    Attributes:
        keys: Key of each sample.
        fields: Extensions that occur, one per column below.
        offsets: First byte ``(n, fields)`` int64, -1 where a sample lacks the field.
        sizes: Number of bytes ``(n, fields)`` int64.
        damage: What is wrong with the file, empty if nothing.
    """

    keys: tuple[str, ...]
    fields: tuple[str, ...]
    offsets: np.ndarray
    sizes: np.ndarray
    damage: str = ""


class _Member(NamedTuple):
    key: str
    field: str
    offset: int
    size: int


def split_name(name: str) -> tuple[str, str]:
    """Split the name of a member into key and lower-case extension at the first dot of its file.

    Example:
        >>> split_name("cats/0001.JPG")
        ('cats/0001', 'jpg')
    """
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def _read_members(path: Path) -> tuple[list[_Member], str]:
    """Files in the tar whose bytes are all there, and the damage if any."""
    members: list[_Member] = []
    num_bytes = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps an object per member
                key, field = split_name(info.name)
                end = info.offset_data + info.size
                if info.isreg() and end <= num_bytes:
                    members.append(_Member(key, field, info.offset_data, info.size))
            end_of_members = tar.offset
    except tarfile.TarError as error:
        return members, str(error)
    # tarfile takes garbage after the first member for the end; a real end is a block of zeros.
    with path.open("rb") as file:
        file.seek(end_of_members)
        whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    return members, "" if whole else f"no end mark at byte {end_of_members}"


def index_shard(path: Path, *, known: Collection[str] | None = KNOWN_EXTENSIONS) -> ShardIndex:
    """Locate the samples of a tar by its headers.

    A truncated or garbled file gives the samples before the damage.

    Args:
        path: The tar.
        known: Extensions to look for; None takes all.

    Returns:
        Keys and extents of its samples.
    """
    members, damage = _read_members(path)
    found = {member.field for member in members}
    fields = tuple(sorted(found if known is None else found & set(known)))
    keys: list[str] = []
    cells: list[tuple[int, int]] = []  # row and column of each member of a known extension
    extents: list[tuple[int, int]] = []
    for member in members:
        if not keys or keys[-1] != member.key:
            keys.append(member.key)
        if member.field in fields:
            cells.append((len(keys) - 1, fields.index(member.field)))
            extents.append((member.offset, member.size))
    offsets, sizes = np.full((2, len(keys), len(fields)), -1, dtype=np.int64)
    if cells:
        rows, columns = zip(*cells, strict=True)
        offsets[rows, columns], sizes[rows, columns] = zip(*extents, strict=True)
    return ShardIndex(tuple(keys), fields, offsets, sizes, damage)


# --- the stored index -----------------------------------------------------------------------------


def index_file(path: Path) -> Path:
    """Return where the index of a shard is stored."""
    return path.with_suffix(".index.npz")


def _fingerprint(path: Path, index: ShardIndex) -> np.ndarray:
    """Size of the tar and checksums of the headers of its first and last members."""
    extents = index.offsets[index.offsets >= 0]
    checks = [path.stat().st_size]
    with path.open("rb") as file:
        for offset in (extents.min(), extents.max()) if len(extents) else ():
            file.seek(int(offset) - tarfile.BLOCKSIZE)
            checks.append(zlib.crc32(file.read(tarfile.BLOCKSIZE)))
    return np.array(checks, dtype=np.int64)


def store_index(path: Path, index: ShardIndex) -> None:
    """Write the index of a whole shard beside it."""
    with atomic_file(index_file(path)) as stream:
        np.savez(
            stream,
            format=np.array(_FORMAT),
            fingerprint=_fingerprint(path, index),
            keys=np.frombuffer("\n".join(index.keys).encode(), dtype=np.uint8),
            fields=np.array(index.fields, dtype=np.str_),
            offsets=index.offsets,
            sizes=index.sizes,
        )


def load_index(path: Path) -> ShardIndex | None:
    """Read the stored index of a shard; None if there is none, or it is not of this tar."""
    try:
        with np.load(index_file(path), allow_pickle=False) as table:
            if int(table["format"]) != _FORMAT:
                return None
            text = table["keys"].tobytes().decode()
            index = ShardIndex(
                tuple(text.split("\n")) if text else (),
                tuple(table["fields"].tolist()),
                table["offsets"],
                table["sizes"],
            )
            is_same = np.array_equal(table["fingerprint"], _fingerprint(path, index))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return index if is_same and index.offsets.shape[:1] == (len(index.keys),) else None


def locate_samples(path: Path) -> ShardIndex:
    """Locate the samples of a tar by its stored index, or else by its headers."""
    return load_index(path) or index_shard(path)
