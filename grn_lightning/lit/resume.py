"""Which checkpoint a run goes on from: the newest that is whole and of this model.

A run may have been killed while it was saving, a disk may have been full, a folder of shards may
have been copied without one of them. So every candidate is read before it is trusted, from the
newest to the oldest, and whatever is passed over is named with its reason. A run whose checkpoints
are all unfit does not begin afresh.
"""

import json
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from grn_lightning.lit.preflight import LOG
from grn_lightning.lit.saving import COMPLETE, sizes_of

SHARDS = "checkpoint"
"""Folder of DeepSpeed's files inside a checkpoint; Lightning calls it so."""
NETWORKS = ("generator", "tokenizer", "backbone", "text_encoder")
"""Settings of a module that say how large its networks are."""
CSV_TABLE = "metrics.csv"
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

    @property
    def num_processes(self) -> int:
        """Processes that DeepSpeed divided it among; 1 for others."""
        return int(self.facts.get("dp_world_size", 1))


@dataclass(frozen=True)
class Survey:
    """What lies in a run's folder."""

    newest: Saved | None
    """The newest checkpoint that is fit to go on from."""
    skipped: tuple[tuple[Path, str], ...]
    """Newer ones, the newest first, and why they are not."""

    def __str__(self) -> str:
        """Name what was passed over."""
        return "; ".join(f"'{path}' {reason}" for path, reason in self.skipped)


# --- one checkpoint -------------------------------------------------------------------------------


def _check_archive(path: Path) -> None:
    """Refuse a file that was not written to its end, or has changed since.

    Raises:
        ValueError: With the reason.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ValueError("is cut off, or no checkpoint") from error
    if broken is not None:
        raise ValueError(f"is damaged: '{broken}' in it has another checksum")


def _load(path: Path) -> dict[str, Any]:
    """Read a file without its tensors, which are mapped only."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError("holds more than tensors and plain data, or cannot be read") from error
    if not isinstance(content, dict):
        raise ValueError("is no checkpoint of a run")
    return content


def _check_file(path: Path) -> dict[str, Any]:
    _check_archive(path)
    content = _load(path)
    missing = [key for key in NEEDED if key not in content]
    if "state_dict" in missing:
        raise ValueError("is no checkpoint of a run")
    if missing:
        raise ValueError("holds weights only: no training can go on from it")
    return content


def _check_noted(folder: Path) -> None:
    """Compare a folder with the note of its files."""
    noted = json.loads((folder / COMPLETE).read_text())["files"]
    found = sizes_of(folder)
    for name, size in noted.items():
        if name not in found:
            raise ValueError(f"is unfinished: '{name}' is missing")
        if found[name] != size:
            raise ValueError(f"is damaged: '{name}' has {found[name]:,} bytes instead of {size:,}")


def _check_deepspeed(folder: Path) -> dict[str, Any]:
    shards = sorted((folder / SHARDS).glob("*_states.pt"))
    models = [path for path in shards if path.name.endswith("model_states.pt")]
    if not models:
        raise ValueError("is unfinished: no file in it holds the state of the model")
    for path in shards:
        try:
            _check_archive(path)
        except ValueError as error:
            raise ValueError(f"is unfinished: '{SHARDS}/{path.name}' {error}") from error
    content = _load(models[0])
    expected, found = int(content.get("dp_world_size", 1)), len(shards) - len(models)
    if found < expected:
        raise ValueError(f"is unfinished: {found} of {expected} processes have written their part")
    return content


def _check_distributed(folder: Path) -> dict[str, Any]:
    if not (folder / ".metadata").is_file():
        raise ValueError("is unfinished: '.metadata', which is written last, is missing")
    return _load(folder / "meta.pt")


def _check_folder(folder: Path) -> dict[str, Any]:
    has_note = (folder / COMPLETE).is_file()
    if has_note:
        _check_noted(folder)
    if (folder / SHARDS).is_dir():
        return _check_deepspeed(folder)
    if (folder / "meta.pt").is_file():
        return _check_distributed(folder)
    raise ValueError("is unfinished: the folder holds no checkpoint")


def examine(path: Path) -> Saved:
    """Read a checkpoint, all of its bytes, and return what it says about itself.

    Args:
        path: A file, or the folder that a sharded strategy has written.

    Raises:
        ValueError: With a reason that goes on after its name: "is cut off, or no checkpoint".
    """
    if path.is_symlink() and not path.exists():
        raise ValueError("points to nothing")
    if not path.exists():
        raise ValueError("does not exist")
    path = path.resolve() if path.is_symlink() else path
    facts = _check_folder(path) if path.is_dir() else _check_file(path)
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


# --- all of a run ---------------------------------------------------------------------------------


def _written_at(path: Path) -> int:
    """Nanoseconds; of a folder those of its newest file."""
    times = [path.lstat().st_mtime_ns]
    if path.is_dir() and not path.is_symlink():
        times = [file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()] or times
    return max(times)


def _inside(folder: Path) -> Iterator[Path]:
    """Yield what may be a checkpoint: files, folders, links, and folders that await their name."""
    for path in folder.rglob("*.ckpt"):
        if not any(parent.suffix == ".ckpt" for parent in path.relative_to(folder).parents):
            yield path
    for note in folder.rglob(f".*.ckpt.*/{COMPLETE}"):
        yield note.parent


def candidates(folders: Iterable[Path]) -> list[Path]:
    """Return what may be checkpoints below folders, the newest first; links to others are left out.

    A path that is itself a checkpoint is the only candidate there.
    """
    found: set[Path] = set()
    for folder in folders:
        is_one = folder.is_file() or (folder / COMPLETE).exists() or (folder / SHARDS).is_dir()
        found.update([folder] if is_one else _inside(folder))
    whole = {path.resolve() for path in found if not path.is_symlink()}
    kept = [path for path in found if not path.is_symlink() or path.resolve() not in whole]
    return sorted(kept, key=lambda path: (_written_at(path), path.name), reverse=True)


def survey(*folders: Path, module: L.LightningModule | None = None) -> Survey:
    """Look for the newest checkpoint that training can go on from.

    Args:
        folders: Where to look, at any depth; a checkpoint stands for itself.
        module: The module of this run; None takes checkpoints of any.
    """
    skipped = []
    for path in candidates(folders):
        try:
            saved = examine(path)
        except ValueError as error:
            skipped.append((path, str(error)))
            continue
        reason = None if module is None else misfit(saved.facts, module)
        if reason is None:
            return Survey(saved, tuple(skipped))
        skipped.append((path, reason))
    return Survey(None, tuple(skipped))


def newest_valid(folder: str | Path, *, module: L.LightningModule | None = None) -> Path:
    """Return the newest checkpoint below a folder that training can go on from.

    Args:
        folder: Of a run, or of several versions of one; a checkpoint stands for itself.
        module: The module of this run; None takes checkpoints of any.

    Raises:
        ValueError: If there is none; with all that were passed over, and why.
    """
    found = survey(Path(folder), module=module)
    if found.newest is not None:
        return found.newest.path
    if found.skipped:
        raise ValueError(f"no checkpoint under '{folder}' is fit to go on from: {found}.")
    raise ValueError(f"there is no checkpoint under '{folder}'.")


# --- where a run lies -----------------------------------------------------------------------------


def run_folders(trainer: L.Trainer) -> list[Path]:
    """Return where checkpoints of this run, or of earlier versions of it, may lie."""
    folders = [
        Path(path)
        for callback in trainer.checkpoint_callbacks
        if (path := getattr(callback, "dirpath", None))
    ]
    for logger in trainer.loggers[:1]:
        root, version = _root_of(logger), getattr(logger, "_version", None)
        name = version if isinstance(version, str) else f"version_{version}"
        folders.append(root if version is None else root / name)
    if not trainer.loggers:
        folders.append(Path(trainer.default_root_dir) / "checkpoints")
    return folders


def _root_of(logger: Logger) -> Path:
    """Folder of all versions of what a logger writes."""
    names = (logger.save_dir, logger.name)
    return Path(getattr(logger, "root_dir", None) or Path(*(str(one) for one in names if one)))


def go_on_in_place(trainer: L.Trainer, saved: Saved) -> None:
    """Let loggers write where the run that is resumed has written.

    Curves of TensorBoard go on at the step of the checkpoint; points of later steps, which are
    made again, are hidden. A table of a CSVLogger, which begins a file anew, is kept under another
    name. A logger that has a version of its own keeps it.
    """
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
    for logger in trainer.loggers:
        _take_version(logger, saved.path)
        if isinstance(logger, TensorBoardLogger):
            logger._kwargs.setdefault("purge_step", saved.step)
        table = Path(logger.log_dir) / CSV_TABLE if isinstance(logger, CSVLogger) else None
        is_first_process = trainer.node_rank == trainer.local_rank == 0
        if is_first_process and table is not None and table.is_file():
            table.rename(free_name(table))


def _take_version(logger: Logger, checkpoint: Path) -> None:
    """Take the version from the place of a checkpoint, `ROOT/version_3/checkpoints/last.ckpt`."""
    root, path = _root_of(logger).absolute(), checkpoint.absolute()
    if getattr(logger, "_version", None) is not None or root not in path.parents:
        return
    first, *rest = path.relative_to(root).parts
    if rest:
        match = re.fullmatch(r"version_(\d+)", first)
        # Asked for when the first line is written, and without a setter.
        logger._version = int(match[1]) if match else first  # type: ignore[attr-defined]


def free_name(path: Path) -> Path:
    """Return the first of NAME-1, NAME-2, ... that does not exist."""
    number = 1
    while (other := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    return other


# --- strategies -----------------------------------------------------------------------------------

_WAY = (
    "To go on otherwise, `grn export` the checkpoint and start a run from its weights with "
    "`model.init_args.init_from`; moments of the optimizer then begin anew."
)


def refuse_other_strategy(saved: Saved, trainer: L.Trainer) -> None:
    """Refuse a checkpoint whose parts this run's processes could not take up.

    Raises:
        ValueError: Naming the strategy or the number of processes that could.
    """
    strategy, path = trainer.strategy, saved.path
    is_deepspeed = isinstance(strategy, DeepSpeedStrategy)
    if (path / SHARDS).is_dir():
        before, now = saved.num_processes, trainer.num_devices * trainer.num_nodes
        if not is_deepspeed:
            raise ValueError(
                f"`resume`: '{path}' was written by DeepSpeed, and this run's strategy is "
                f"{type(strategy).__name__}: set `trainer.strategy` as it was. {_WAY}"
            )
        if before != now:
            raise ValueError(
                f"`resume`: '{path}' was written by {before} processes of DeepSpeed, and this run "
                f"has {now}: ZeRO does not divide its parts anew. Resume on {before}. {_WAY}"
            )
    elif path.is_dir() and not isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        raise ValueError(
            f"`resume`: '{path}' was written by FSDP, and this run's strategy is "
            f"{type(strategy).__name__}: set `trainer.strategy` as it was. {_WAY}"
        )
    elif path.is_file() and is_deepspeed:
        raise ValueError(
            f"`resume`: '{path}' is one file, and DeepSpeed goes on from folders that it has "
            f"written itself: set `trainer.strategy` as it was. {_WAY}"
        )


# --- the decision ---------------------------------------------------------------------------------


def choose(mode: str | None, trainer: L.Trainer, module: L.LightningModule) -> Saved | None:
    """Decide what a training goes on from.

    Args:
        mode: "auto" takes the newest fit checkpoint of this run's folder, and begins if there is
            none at all; a path takes the newest of that folder, or that checkpoint; "none" or
            None begins.
        trainer: Of this run.
        module: Its module.

    Returns:
        The checkpoint; None to begin.

    Raises:
        ValueError: If there are checkpoints and none is fit, a path has none, or it was written by
            another strategy than this run's.
    """
    if mode in (None, "none"):
        return None
    is_auto = mode == "auto"
    folders = run_folders(trainer) if is_auto else [Path(str(mode))]
    names = " and ".join(f"'{folder}'" for folder in dict.fromkeys(folders))
    found = survey(*folders, module=module)
    if found.newest is None and found.skipped:
        raise ValueError(
            f"`resume`: no checkpoint under {names} is fit to go on from: {found}. Nothing was "
            "begun; `--resume none` begins a new run beside them."
        )
    if found.newest is None and not is_auto:
        raise ValueError(f"`resume`: there is no checkpoint under {names}.")
    if found.newest is None:
        LOG.info("resume: no checkpoint under %s yet, so the run begins.", names)
        return None
    for path, reason in found.skipped:
        LOG.warning("resume: skipped '%s', which %s.", path, reason)
    saved = found.newest
    refuse_other_strategy(saved, trainer)
    LOG.info("resume: goes on from '%s', %s.", saved.path, _standing(saved, trainer))
    return saved


def _standing(saved: Saved, trainer: L.Trainer) -> str:
    text = f"step {saved.step:,}"
    if (samples := saved.facts.get("samples_seen")) is not None:
        text += f" after {samples:,} samples"
    if 0 < trainer.max_steps <= saved.step:
        text += f"; all {trainer.max_steps:,} steps of `trainer.max_steps` are done"
    return text
