"""Finding checkpoints of runs and loading what they trained, with averaged weights."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grn_lightning.lit.shards import EMA_STATE as EMA_STATE
from grn_lightning.lit.shards import layout_of, read_shards, require_whole
from grn_lightning.models.convert import load_official
from grn_lightning.models.hashes import weights_hash as weights_hash
from grn_lightning.models.pretrained import clean_names, is_export, read_pretrained
from grn_lightning.models.pretrained import select as select

_DAMAGED = (
    "cannot be read as a checkpoint: it is damaged, unfinished, or holds more than tensors and "
    "plain data. Take another one."
)


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint that a path or a run folder stands for.

    Args:
        path: A `.ckpt` file, the folder that several processes have written in its place, or a
            folder under which the newest `last.ckpt` is taken.

    Raises:
        ValueError: If there is none.
    """
    path = Path(path)
    if layout_of(path) is not None:
        return path
    found = sorted(path.rglob("last.ckpt"), key=lambda file: file.stat().st_mtime)
    if not found:
        what = "no `last.ckpt` lies under that folder" if path.is_dir() else "it does not exist"
        raise ValueError(
            f"no checkpoint at '{path}': {what}. Train one first (`make train-tokenizer` for the "
            "embedded tokenizer), or give the path of a .ckpt file or of a run's folder."
        )
    return found[-1]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a Lightning checkpoint safely: tensors and plain data only.

    One that several processes have written together comes back as if one had, but for the states
    of optimizers, which are left out.

    Raises:
        ValueError: If there is none, or it is not complete.
    """
    file = find_checkpoint(path)
    if file.is_dir():
        return read_shards(file)
    if file.suffix in (".json", ".safetensors"):
        raise ValueError(
            f"'{file}' is no checkpoint of a run, and without its other file no export either; "
            "official weights are made one by `grn convert`."
        )
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"'{file}' {_DAMAGED}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"'{file}' is no checkpoint of a run: it has no `state_dict`.")
    return checkpoint


def whole_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint that a path stands for, having looked that it is whole.

    Args:
        path: A `.ckpt` file, a run folder, or the folder that a sharded strategy has written.

    Raises:
        ValueError: If there is none, or the file was not written to its end.
    """
    file = find_checkpoint(path)
    if file.is_dir():
        require_whole(file)
        return file
    if not zipfile.is_zipfile(file):
        raise ValueError(f"'{file}' {_DAMAGED}")
    return file


def averaged_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the module's state with averaged weights where the run kept an average."""
    state = dict(checkpoint["state_dict"])
    for name, callback_state in checkpoint.get("callbacks", {}).items():
        if name.startswith(EMA_STATE):
            state.update(callback_state["shadows"])
    return state


def trained_state(
    path: str | Path, *, weights: Literal["averaged", "last"] = "averaged"
) -> dict[str, Tensor]:
    """Return what was trained, under the names of its modules, free of wrappers' names.

    Args:
        path: A checkpoint, a run folder, or an export.
        weights: The average where the run kept one, or the weights of the last step; an export
            has one of them.

    Returns:
        Tensors named `tokenizer.`, or `generator.` and `text_encoder.`, then as in the module.

    Raises:
        ValueError: If nothing lies there, or it cannot be read.
    """
    if is_export(path):
        return read_pretrained(path).tensors
    checkpoint = read_checkpoint(path)
    is_averaged = weights == "averaged"
    return clean_names(averaged_state(checkpoint) if is_averaged else checkpoint["state_dict"])


def start_from(path: str | Path, modules: Mapping[str, nn.Module]) -> None:
    """Load what another run has trained, with averaged weights, strictly.

    Args:
        path: A checkpoint, a run folder, or an export.
        modules: By their name there. A text encoder may be missing: an export leaves out what was
            not trained.

    Raises:
        ValueError: If nothing lies there, or it is of another kind or of other sizes.
    """
    state = trained_state(path)
    for name, module in modules.items():
        tensors = select(state, name)
        if not tensors and name != "text_encoder":
            there = ", ".join(sorted({key.split(".")[0] for key in state}))
            raise ValueError(f"`init_from`: '{path}' has no {name}; what it has is {there}.")
        if tensors:
            try:
                load_official(module, tensors)
            except ValueError as error:
                raise ValueError(f"`init_from`: '{path}': {error}") from error
