"""Checkpoints that several processes have written together, read as if one had.

Two layouts are folders where others are files:

    NAME.ckpt/                      DeepSpeed's ZeRO
        latest                      the word "checkpoint", written last
        checkpoint/*_model_states.pt    weights (stages 1, 2: one file), counts and settings
        checkpoint/*_optim_states.pt    of every process: its part of weights and moments
    NAME.ckpt/                      FSDP
        .metadata                   what lies where
        __N_0.distcp                parts of weights, moments and average
        meta.pt                     counts and settings, written last

Neither DeepSpeed nor a GPU nor other processes are needed to read them, and nothing is unpickled
but tensors, plain data, and the few names listed here; other names are refused.
"""

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from grn_lightning.lit.fsdp_folder import FSDP_INDEX, files_of, load_parts, read_index

EMA_STATE = "ema"
"""Key of the averaged weights in a checkpoint's callback states; see `lit/callbacks/ema.py`."""

EMA_PREFIX = "ema."
"""What stands before the names of averaged weights among the tensors of an FSDP folder."""

Layout = Literal["file", "zero", "fsdp"]

_ZERO_TAG = "checkpoint"
_FSDP_REST = "meta.pt"


def layout_of(path: str | Path) -> Layout | None:
    """Return how a checkpoint is stored, or None if nothing there looks like one."""
    path = Path(path)
    if path.is_file():
        return "file"
    if (path / _ZERO_TAG).is_dir():
        return "zero"
    return "fsdp" if (path / FSDP_INDEX).is_file() or (path / _FSDP_REST).is_file() else None


class _Nothing:
    """Stands for classes of DeepSpeed whose contents nobody here reads."""

    def __new__(cls, *_: Any, **__: Any) -> "_Nothing":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _Stage(int):
    """Stands for DeepSpeed's enumeration of stages."""


_STAND_INS: list[tuple[Callable[..., Any], str]] = [
    (_Nothing, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Nothing, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Nothing, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Stage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]
"""What a ZeRO folder may name besides tensors and plain data, and what is made of it."""


def load_part(path: Path, *, is_for_deepspeed: bool = False) -> dict[str, Any]:
    """Read one file of a ZeRO folder; tensors stay on disk until they are used.

    Args:
        path: The file.
        is_for_deepspeed: Whether DeepSpeed reads on, which wants its classes and not stand-ins.

    Raises:
        ValueError: If it is damaged or holds more than tensors, plain data and `_STAND_INS`.
    """
    known: list[Any] = list(_STAND_INS)
    if is_for_deepspeed:
        names = [name.rsplit(".", 1) for _, name in _STAND_INS]
        known = [getattr(import_module(module), name) for module, name in names]
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise ValueError(
            f"'{path}' cannot be read as a part of a checkpoint: it is damaged, unfinished, or "
            "holds more than tensors and plain data. Take another checkpoint."
        ) from error


def read_shards(path: str | Path) -> dict[str, Any]:
    """Return the checkpoint that one process would have written, without states of optimizers.

    Args:
        path: A folder that ZeRO or FSDP has written.

    Raises:
        ValueError: If a part is missing or damaged.
    """
    path = Path(path)
    require_whole(path)
    checkpoint = _read_zero(path) if layout_of(path) == "zero" else _read_fsdp(path)
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name: tensor.detach() for name, tensor in state.items()}
    return checkpoint


def require_whole(path: str | Path) -> None:
    """Refuse a folder in which a part is missing or was not written to its end.

    Raises:
        ValueError: If so.
    """
    path = Path(path)
    files = _zero_files(path) if layout_of(path) == "zero" else _fsdp_files(path)
    missing = [file.name for file in files if not file.is_file()]
    cut = [file.name for file in files if file.suffix == ".pt" and not _is_archive(file)]
    if missing or cut:
        raise ValueError(
            f"'{path}' is no whole checkpoint: missing {missing}, unfinished {cut}. The run was "
            "stopped while it was written; take an older one."
        )


def _is_archive(file: Path) -> bool:
    return not file.is_file() or zipfile.is_zipfile(file)


# --- DeepSpeed ------------------------------------------------------------------------------------

_ZERO_KEYS = {
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes"),
    *("frozen_param_fragments", "shared_params", "lr_scheduler", "data_sampler", "random_ltd"),
    *("sparse_tensor_module_names", "skipped_steps", "global_steps", "global_samples"),
    *("dp_world_size", "mp_world_size", "ds_config", "ds_version"),
    "checkpoint_parallel_dimensions",
}
"""What DeepSpeed adds to a checkpoint."""


@dataclass(frozen=True)
class ZeroFacts:
    """How a ZeRO checkpoint is divided."""

    stage: int
    world_size: int


def zero_facts(path: str | Path) -> ZeroFacts:
    """Read how a ZeRO checkpoint is divided.

    Raises:
        ValueError: If its first part is missing or damaged.
    """
    [*files] = sorted((Path(path) / _ZERO_TAG).glob("*zero_pp_rank_0_*_optim_states.pt"))
    if not files:
        raise ValueError(f"'{path}' is no whole checkpoint: the optimizer's first part is missing.")
    optimizer = load_part(files[0])["optimizer_state_dict"]
    world_size = optimizer["partition_count"]
    if not isinstance(world_size, int):
        world_size = max(world_size)
    return ZeroFacts(stage=int(optimizer["zero_stage"]), world_size=world_size)


def _zero_files(path: Path) -> list[Path]:
    """Return the files that a ZeRO checkpoint has to have: models in front, optimizers behind."""
    models, optimizers = _zero_parts(path)
    return [path / "latest", *models, *optimizers]


def _zero_parts(path: Path) -> tuple[list[Path], list[Path]]:
    facts, folder = zero_facts(path), path / _ZERO_TAG
    [first] = folder.glob("*zero_pp_rank_0_*_optim_states.pt")
    ranks = range(facts.world_size)
    optimizers = [folder / first.name.replace("rank_0_", f"rank_{n}_", 1) for n in ranks]
    if facts.stage < 3:
        return [folder / "mp_rank_00_model_states.pt"], optimizers
    return [folder / f"zero_pp_rank_{n}_mp_rank_00_model_states.pt" for n in ranks], optimizers


def _read_zero(path: Path) -> dict[str, Any]:
    model_files, optimizer_files = _zero_parts(path)
    models = [load_part(file) for file in model_files]
    first = models[0]
    checkpoint = {name: value for name, value in first.items() if name not in _ZERO_KEYS}
    shapes = {name: shape for group in first["param_shapes"] for name, shape in group.items()}
    is_float32 = all(first["module"][name].dtype == torch.float32 for name in shapes)
    if zero_facts(path).stage < 3:
        state = dict(first["module"])
        if not is_float32:
            state |= _join_groups(optimizer_files, first["param_shapes"])
    else:
        state = {name: first["module"][name] for name in first["buffer_names"]}
        state |= _join_stretches([_flat_weights(file) for file in optimizer_files], shapes)
        frozen = first.get("frozen_param_shapes") or {}
        fragments = [model.get("frozen_param_fragments") or {} for model in models]
        state |= {name: _join([f[name] for f in fragments], frozen[name]) for name in frozen}
        _join_averages(checkpoint, models, shapes)
    for name, same in first.get("shared_params", {}).items():
        state[name] = state[same]
    checkpoint["state_dict"] = state
    return checkpoint


def _join(stretches: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Put a tensor together from equal stretches of it, the last of which is padded."""
    return torch.cat([stretch.flatten() for stretch in stretches])[: shape.numel()].view(shape)


def _join_averages(
    checkpoint: dict[str, Any], models: Sequence[dict[str, Any]], shapes: Mapping[str, torch.Size]
) -> None:
    """Put averages together, of which every process has stored its stretches."""
    average = checkpoint.get("callbacks", {}).get(EMA_STATE)
    if average is None:
        return
    parts = [model["callbacks"][EMA_STATE]["shadows"] for model in models]
    whole = {name: _join([part[name] for part in parts], shapes[name]) for name in parts[0]}
    state = average | {"shadows": whole}
    checkpoint["callbacks"] = checkpoint["callbacks"] | {EMA_STATE: state}


def _flat_weights(file: Path) -> Tensor:
    """Return the stretches of all weights that a process of stage 3 keeps, one after the other."""
    return torch.cat(load_part(file)["optimizer_state_dict"]["fp32_flat_groups"])


def _join_stretches(flats: Sequence[Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Put weights of stage 3 together: of each, every process has a stretch of one length."""
    state, offset = {}, 0
    for name, shape in shapes.items():
        length = -(-shape.numel() // len(flats))
        state[name] = _join([flat[offset : offset + length] for flat in flats], shape)
        offset += length
    return state


def _join_groups(
    files: Sequence[Path], groups: Sequence[Mapping[str, torch.Size]]
) -> dict[str, Tensor]:
    """Put float32 weights of stages 1 and 2 together: every process has a stretch of each group."""
    parts = [
        load_part(file)["optimizer_state_dict"]["single_partition_of_fp32_groups"] for file in files
    ]
    state = {}
    for number, shapes in enumerate(groups):
        flat, offset = torch.cat([part[number] for part in parts]), 0
        for name, shape in shapes.items():
            state[name] = flat[offset : offset + shape.numel()].view(shape)
            offset += shape.numel()
    return state


# --- FSDP -----------------------------------------------------------------------------------------


def stored_averages(path: Path) -> set[str]:
    """Return the names of the averaged weights in an FSDP folder."""
    before = f"state_dict.{EMA_PREFIX}"
    names = read_index(path).state_dict_metadata
    return {name.removeprefix(before) for name in names if name.startswith(before)}


def _fsdp_files(path: Path) -> list[Path]:
    files = files_of(read_index(path))
    return [path / FSDP_INDEX, *(path / name for name in files), path / _FSDP_REST]


def read_rest(path: Path) -> dict[str, Any]:
    """Read counts and settings of an FSDP folder.

    Raises:
        ValueError: If they are damaged or hold more than tensors and plain data.
    """
    return load_part(path / _FSDP_REST)


def _read_fsdp(path: Path) -> dict[str, Any]:
    before = "state_dict."
    tensors = {
        name: torch.empty(info.size, dtype=info.properties.dtype)
        for name, info in read_index(path).state_dict_metadata.items()
        if name.startswith(before) and isinstance(info, TensorStorageMetadata)
    }
    load_parts(tensors, path, is_alone=True)
    named = {name.removeprefix(before): tensor for name, tensor in tensors.items()}
    averages = {name: named.pop(name) for name in list(named) if name.startswith(EMA_PREFIX)}
    checkpoint = read_rest(path)
    checkpoint["state_dict"] = named
    if averages:
        whole = {name.removeprefix(EMA_PREFIX): value for name, value in averages.items()}
        state = checkpoint["callbacks"][EMA_STATE] | {"shadows": whole}
        checkpoint["callbacks"] = checkpoint["callbacks"] | {EMA_STATE: state}
    return checkpoint


# --- going on -------------------------------------------------------------------------------------


def require_divided_alike(path: Path, *, stage: int, world_size: int) -> None:
    """Refuse a checkpoint from which ZeRO cannot go on training, and say what can.

    Raises:
        ValueError: If it is no ZeRO folder, or one of another stage or number of processes.
    """
    way = "or start from its weights: `model.init_from`, with a new run"
    layout = layout_of(path)
    if layout != "zero":
        which = "fsdp" if layout == "fsdp" else "the strategy that has written it"
        raise ValueError(f"'{path}' was not written by DeepSpeed: go on with {which}, {way}.")
    require_whole(path)
    facts = zero_facts(path)
    if facts.world_size != world_size:
        raise ValueError(
            f"'{path}' is divided among {facts.world_size} processes, and {world_size} are "
            f"running: go on with {facts.world_size}, {way}. FSDP goes on with any number."
        )
    if facts.stage != stage:
        raise ValueError(
            f"'{path}' was written by ZeRO stage {facts.stage}, and this is stage {stage}: go on "
            f"with deepspeed_zero{facts.stage}, {way}."
        )
