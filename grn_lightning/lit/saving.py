"""Checkpoints that are there whole or not at all.

A file is written under another name in the same folder, brought to the disk, and only then given
its own: whoever is killed leaves the checkpoint before. A strategy that writes a folder (DeepSpeed,
sharded FSDP: a file for each process) does the same with the folder, and a note of all its files,
their sizes and their checksums is written last. What is left of an unfinished save is overwritten
by the next.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from grn_lightning.lit.shards import layout_of, read_shards

COMPLETE = "complete.json"
"""Written last into the folder of a checkpoint: its files, their sizes and their checksums."""

_CHUNK = 2**24


def unfinished_name(path: Path) -> Path:
    """Return where a checkpoint lies while it is being written; never a name ending in .ckpt."""
    return path.with_name(f".{path.name}.part")


def _set_aside(path: Path) -> Path:
    """Return where the folder of a checkpoint lies while its successor takes its name."""
    return path.with_name(f".{path.name}.old")


def _make_way(path: Path) -> None:
    """Remove what is left of a save that was interrupted, a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Wait until a file, or the list of files of a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(new: Path, path: Path) -> None:
    """Give a file that is on the disk the name of another one, which is gone then."""
    os.replace(new, path)
    to_disk(path.parent)


@contextmanager
def written_whole(path: Path) -> Iterator[Any]:
    """Give a binary stream whose bytes become the file when all of them are on the disk."""
    part = unfinished_name(path)
    if part.is_dir():
        _make_way(part)
    with part.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    replace_file(part, path)


def link(path: Path, target: Path) -> None:
    """Let a symbolic link point to a file or folder nearby, at no time to nothing."""
    part = unfinished_name(path)
    _make_way(part)
    part.symlink_to(os.path.relpath(target, path.parent))
    if path.is_dir() and not path.is_symlink():  # a folder does not give way to a link
        path.rename(_set_aside(path))
    replace_file(part, path)
    shutil.rmtree(_set_aside(path), ignore_errors=True)


# --- files ----------------------------------------------------------------------------------------


def is_local(path: str | Path) -> bool:
    """Whether a path is one of this machine's file systems, and no address of a store."""
    return "://" not in str(path)


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's way to write a checkpoint, but never half of one.

    Lightning writes to the folder for temporary files and moves the file from there: between two
    disks that is a copy, and nothing waits for the disk. Addresses of object stores are left to
    it, where an upload counts when it is complete.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a file under another name, then rename it."""
        if storage_options is not None or not is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with written_whole(Path(path)) as stream:
            torch.save(checkpoint, stream)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a file, or what several processes have written in its place as if one had."""
        if layout_of(path) in ("zero", "fsdp"):
            return read_shards(path)
        return super().load_checkpoint(path, map_location, weights_only)


def save_files_whole(trainer: L.Trainer) -> None:
    """Let a trainer write its checkpoints by `WholeCheckpointIO`, if it has no way of its own."""
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = WholeCheckpointIO()


# --- folders --------------------------------------------------------------------------------------


def sizes_of(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file below a folder, but for the note of them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in files
        if path != folder / COMPLETE
    }


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file, as in a zip archive."""
    value, chunk = 0, memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as stream:
        while length := stream.readinto(chunk):
            value = zlib.crc32(chunk[:length], value)
    return value


def _checksums_together(folder: Path, strategy: Strategy) -> dict[str, int]:
    """Sum up a folder's files, each process its share of them; to be called on every process.

    A file that its process does not see yet is left to whoever needs it.
    """
    names = list(strategy.broadcast(list(sizes_of(folder))))
    mine = torch.zeros(len(names), dtype=torch.int64, device=strategy.root_device)
    for index in range(strategy.global_rank, len(names), strategy.world_size):  # type: ignore[attr-defined]
        if (folder / names[index]).is_file():
            mine[index] = checksum(folder / names[index]) + 1
    sums = strategy.reduce(mine, reduce_op="sum").tolist()
    return {name: value - 1 for name, value in zip(names, sums, strict=True) if value}


def note_complete(
    folder: Path, facts: Mapping[str, Any], sums: Mapping[str, int] | None = None
) -> None:
    """Bring all files of a checkpoint to the disk, then write down which they are.

    Args:
        folder: Of the checkpoint.
        facts: Plain data to be written beside sizes and checksums.
        sums: Checksums of files; those of others are computed.
    """
    sizes, known = sizes_of(folder), sums or {}
    for path in {folder, *(folder / name for name in sizes)}:
        to_disk(path)
    crc32 = {name: known.get(name) or checksum(folder / name) for name in sizes}
    with written_whole(folder / COMPLETE) as stream:
        note = {**facts, "files": sizes, "crc32": {name: f"{crc32[name]:08x}" for name in sizes}}
        stream.write(json.dumps(note, indent=1).encode())


def replace_folder(new: Path, folder: Path) -> None:
    """Give a complete folder, or a file, the name of a folder, which is removed then.

    No file system exchanges two folders at once. Between the two renames the new checkpoint lies
    complete under its other name, where `newest_valid` finds it.
    """
    aside = _set_aside(folder)
    shutil.rmtree(aside, ignore_errors=True)
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        folder.rename(aside)
    new.rename(folder)
    to_disk(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def save_whole(trainer: L.Trainer, path: str | Path, *, weights_only: bool = False) -> None:
    """Save what a trainer has, as a file or as a folder, whole or not at all.

    To be called on every process.

    Args:
        trainer: In the middle of a training.
        path: Of the checkpoint.
        weights_only: Leave out what is needed to go on training.
    """
    save_files_whole(trainer)
    if not is_local(path):
        trainer.save_checkpoint(path, weights_only)
        return
    path, strategy = Path(path), trainer.strategy
    part = unfinished_name(path)
    if trainer.is_global_zero:
        _make_way(part)
    strategy.barrier("save_whole")
    trainer.save_checkpoint(part, weights_only)
    is_folder = strategy.broadcast(part.is_dir())
    sums = _checksums_together(part, strategy) if is_folder else {}
    if trainer.is_global_zero:
        if is_folder:
            facts = {"global_step": trainer.global_step, "world_size": trainer.world_size}
            note_complete(part, facts, sums)
        if is_folder or path.is_dir() and not path.is_symlink():  # which no file replaces
            replace_folder(part, path)
        else:
            replace_file(part, path)
            shutil.rmtree(_set_aside(path), ignore_errors=True)  # if it was killed there
    strategy.barrier("save_whole")
