"""Whether a checkpoint is whole, and one that a module could go on from.

One process of a job reads every byte of it; the others look at sizes and settings only.
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

from grn_lightning.lit.saving import COMPLETE, checksum, sizes_of
from grn_lightning.lit.shards import layout_of, load_part, require_whole

NETWORKS = ("generator", "tokenizer", "backbone", "text_encoder")
"""Settings of a module that say how large its networks are."""
NEEDED = ("state_dict", "global_step", "loops", "optimizer_states")
"""What a file must hold that training can go on from."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was found whole."""

    path: Path
    """The file or folder itself, not a link to it."""
    step: int
    """Updates before it was saved."""
    facts: Mapping[str, Any]
    """What Lightning stores beside the weights."""


def _check_archive(path: Path, reads_all: bool) -> None:
    """Refuse a file that was not written to its end, or, if all is read, has changed since.

    Raises:
        ValueError: With the reason.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # its table of contents stands at its end
            broken = archive.testzip() if reads_all else None
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ValueError("is cut off, or no checkpoint") from error
    if broken is not None:
        raise ValueError(f"is damaged: '{broken}' in it has another checksum")


def _load(path: Path) -> dict[str, Any]:
    """Read a file without its tensors, which stay on the disk."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError("holds more than tensors and plain data, or cannot be read") from error
    if not isinstance(content, dict):
        raise ValueError("is no checkpoint of a run")
    return content


def _check_file(path: Path, reads_all: bool) -> dict[str, Any]:
    _check_archive(path, reads_all)
    content = _load(path)
    missing = [key for key in NEEDED if key not in content]
    if "state_dict" in missing:
        raise ValueError("is no checkpoint of a run")
    if missing:
        raise ValueError("holds weights only: no training can go on from it")
    return content


def _check_noted(folder: Path, reads_all: bool) -> set[str]:
    """Compare a folder with the note of its files; return those whose every byte was compared.

    Notes of earlier versions hold sizes only, and older folders have none.
    """
    if not (folder / COMPLETE).is_file():
        return set()
    note, found = json.loads((folder / COMPLETE).read_text()), sizes_of(folder)
    for name, size in note["files"].items():
        if name not in found:
            raise ValueError(f"is unfinished: '{name}' is missing")
        if found[name] != size:
            raise ValueError(f"is damaged: '{name}' has {found[name]:,} bytes, not {size:,}")
    sums = note.get("crc32", {}) if reads_all else {}
    for name, noted in sums.items():
        if checksum(folder / name) != int(noted, 16):
            raise ValueError(f"is damaged: '{name}' in it has another checksum")
    return set(sums)


def _check_folder(folder: Path, reads_all: bool) -> dict[str, Any]:
    layout = layout_of(folder)
    if layout is None:
        raise ValueError("is unfinished: the folder holds no checkpoint")
    compared = _check_noted(folder, reads_all)
    parts = sorted(folder.rglob("*.pt"))
    try:
        require_whole(folder)
    except ValueError as error:
        reason = str(error).removeprefix(f"'{folder}' is no whole checkpoint: ").rstrip(".")
        raise ValueError(f"is unfinished: {reason}") from error
    for path in parts:
        try:
            _check_archive(path, reads_all and str(path.relative_to(folder)) not in compared)
        except ValueError as error:
            raise ValueError(f"is unfinished: '{path.name}' {error}") from error
    first = next(path for path in parts if path.name.endswith(("model_states.pt", "meta.pt")))
    return load_part(first)


def examine(path: Path, *, reads_all: bool = True) -> Saved:
    """Read a checkpoint, and return what it says about itself.

    Args:
        path: A file, or the folder that a sharded strategy has written.
        reads_all: Compare the checksums of all its bytes; else the sizes of its files.

    Raises:
        ValueError: With a reason that goes on after its name: "is cut off, or no checkpoint".
    """
    if path.is_symlink() and not path.exists():
        raise ValueError("points to nothing")
    if not path.exists():
        raise ValueError("does not exist")
    path = path.resolve() if path.is_symlink() else path
    check = _check_folder if path.is_dir() else _check_file
    facts = check(path, reads_all)
    if "global_step" not in facts:
        raise ValueError("does not tell its step")
    return Saved(path, int(facts["global_step"]), facts)


def misfit(facts: Mapping[str, Any], module: L.LightningModule) -> str | None:
    """Return why a module cannot go on from a checkpoint, if it cannot.

    Args:
        facts: What `examine` has read.
        module: The module of this run.
    """
    there, here = facts.get("hyper_parameters", {}), dict(module.hparams)
    is_of_this_stage = getattr(module, "_is_of_this_stage", None)
    if is_of_this_stage is not None and not is_of_this_stage(there):
        return f"is of another model: not one that {type(module).__name__} trains"
    for name in NETWORKS:
        before, now = there.get(name), here.get(name)
        if not isinstance(before, dict) or not isinstance(now, dict):
            continue
        for key in sorted(before.keys() & now.keys() - {"checkpoint"}):
            if _plain(before[key]) != _plain(now[key]):
                return (
                    f"is of another model: its `{name}.{key}` is {before[key]}, this run's is "
                    f"{now[key]}"
                )
    return None


def _plain(value: Any) -> Any:
    """Tuples and lists are one; YAML and checkpoints mix them up."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value
