"""Which checkpoint a run goes on from: the newest that is whole and of this model.

A run may have been killed while it was saving, a disk may have been full, a folder of shards may
have been copied without one of them. So every candidate is read before it is trusted, from the
newest to the oldest, and whatever is passed over is named with its reason. A run whose checkpoints
are all unfit does not begin afresh.

Within a folder the newest is the one of the most steps, as copies change times; between the folders
of several runs it is the one that was written last.
"""

import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from grn_lightning.lit.examine import Saved, examine, misfit
from grn_lightning.lit.preflight import LOG
from grn_lightning.lit.saving import COMPLETE, link, replace_folder, written_whole
from grn_lightning.lit.shards import (
    layout_of,
    require_divided_alike,
    zero_facts,
)
from grn_lightning.lit.strategies import ZeRO

CSV_TABLE = "metrics.csv"
_LATER = re.compile(r"later-\d+")
"""Folders for what a run that goes back leaves behind."""


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


def _written_at(path: Path) -> int:
    """Nanoseconds; of a folder those of its newest file."""
    times = [path.lstat().st_mtime_ns]
    if path.is_dir() and not path.is_symlink():
        times = [file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()] or times
    return max(times)


def _inside(folder: Path) -> Iterator[Path]:
    """Yield what may be a checkpoint: files, folders, links, and what awaits its name.

    A folder awaits it if it is noted as complete, a file if there is none of that name.
    """
    for path in folder.rglob("*.ckpt"):
        above = path.relative_to(folder).parents
        if not any(one.suffix == ".ckpt" or _LATER.fullmatch(one.name) for one in above):
            yield path
    for part in folder.rglob(".*.ckpt.part"):
        if part.is_dir():
            if (part / COMPLETE).is_file():
                yield part
        elif part.is_file() and not _named(part).exists():
            yield part


def _named(part: Path) -> Path:
    """Return the name that a checkpoint waits for; undoes `unfinished_name`."""
    return part.with_name(part.name[1:].removesuffix(".part"))


def _step_of(path: Path) -> int | None:
    """Return the step of a checkpoint, or None if it is not fit, as far as its sizes tell."""
    try:
        return examine(path, reads_all=False).step
    except ValueError:
        return None


def _in_order(paths: Sequence[Path]) -> list[Path]:
    """Sort what lies in one folder, the newest first: by step, then by time.

    One without a step stands before those that were written earlier.
    """
    steps = {path: _step_of(path) for path in paths}
    times = {path: _written_at(path) for path in paths}

    def rank(path: Path) -> tuple[int, bool, int, str]:
        step = steps[path]
        if step is None:
            earlier = (steps[one] or -1 for one in paths if times[one] <= times[path])
            return max(earlier), True, times[path], path.name
        return step, False, times[path], path.name

    return sorted(paths, key=rank, reverse=True)


def candidates(folders: Iterable[Path]) -> list[Path]:
    """Return what may be checkpoints below folders, the newest first; links to others are left out.

    A path that is itself a checkpoint is the only candidate there.
    """
    found: set[Path] = set()
    for folder in folders:
        found.update(_inside(folder) if layout_of(folder) is None else [folder])
    whole = {path.resolve() for path in found if not path.is_symlink()}
    kept = [path for path in found if not path.is_symlink() or path.resolve() not in whole]
    beside: dict[Path, list[Path]] = {}
    for path in kept:
        beside.setdefault(path.parent, []).append(path)
    runs = sorted(beside, key=lambda run: max(map(_written_at, beside[run])), reverse=True)
    return [path for run in runs for path in _in_order(beside[run])]


def survey(
    *folders: Path, module: L.LightningModule | None = None, reads_all: bool = True
) -> Survey:
    """Look for the newest checkpoint that training can go on from.

    Args:
        folders: Where to look, at any depth; a checkpoint stands for itself.
        module: The module of this run; None takes checkpoints of any.
        reads_all: Compare checksums; else sizes only.
    """
    skipped = []
    for path in candidates(folders):
        try:
            saved = examine(path, reads_all=reads_all)
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
    asked = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    folders = [Path(path) for path in asked if path]
    if folders and all(asked):
        return folders
    if not trainer.loggers:
        return [*folders, Path(trainer.default_root_dir) / "checkpoints"]
    root, version = _root_of(trainer.loggers[0]), getattr(trainer.loggers[0], "_version", None)
    name = version if isinstance(version, str) else f"version_{version}"
    return [*folders, root if version is None else root / name]


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
        if _is_first_process(trainer) and table is not None and table.is_file():
            table.rename(free_name(table))


def _is_first_process(trainer: L.Trainer) -> bool:
    """Whether this process is the one that tells, before they know each other."""
    return trainer.node_rank == trainer.local_rank == 0


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


def place_of(saved: Saved) -> Path:
    """Return where a checkpoint lies once `give_name` has been called for it."""
    return _named(saved.path) if saved.path.name.endswith(".part") else saved.path


def give_name(saved: Saved) -> Path:
    """Give a complete checkpoint the name it has waited for when its run was killed."""
    path = place_of(saved)
    if path != saved.path:
        replace_folder(saved.path, path)
    return path


def finish_save(saved: Saved) -> None:
    """Do what the run that wrote a checkpoint was killed before: give names.

    A `last.ckpt` of an earlier step, or an unfit one, becomes the checkpoint: else it would stay
    behind, if nothing is left to train.
    """
    path = give_name(saved)
    last = path.with_name("last.ckpt")
    if path == last or not os.path.lexists(last) or not _is_behind(last, saved):
        return
    if path.is_dir() or last.is_symlink():
        link(last, path)
    elif last.is_file():
        with written_whole(last) as stream, path.open("rb") as source:
            shutil.copyfileobj(source, stream)


def _is_behind(path: Path, saved: Saved) -> bool:
    try:
        return examine(path).step < saved.step
    except ValueError:
        return True


def put_later_aside(saved: Saved) -> Path | None:
    """Move whole checkpoints of later steps out of the folder of the one that a run goes back to.

    The run would write over them, and going on once more would find them instead of what it wrote.

    Returns:
        The folder where they are now, `later-N` beside the checkpoint; None if there are none.
    """
    folder = place_of(saved).parent
    found = [path for path in _inside(folder) if path.parent == folder and path != saved.path]
    later = [
        path
        for path in found
        if not path.is_symlink()
        and (_step_of(path) or 0) > saved.step
        and not _is_behind(path, saved)
    ]
    if not later:
        return None
    aside = free_name(folder / "later")
    aside.mkdir()
    ends = {path.resolve() for path in later}
    links = [path for path in found if path.is_symlink() and path.resolve() in ends]
    for path in (*links, *later):
        name = _named(path).name if path.suffix == ".part" else path.name
        path.rename(free_name(aside / name) if os.path.lexists(aside / name) else aside / name)
    return aside


def is_own(trainer: L.Trainer, saved: Saved) -> bool:
    """Whether a checkpoint lies where this run writes; others' folders are only read."""
    above = saved.path.resolve().parents
    return any(folder.resolve() in above for folder in run_folders(trainer))


@dataclass(frozen=True)
class Start:
    """What a run goes on from, and how."""

    saved: Saved
    is_auto: bool
    """Whether the run has looked for it itself."""
    is_own: bool
    """Whether it lies where the run writes."""

    @property
    def path(self) -> Path:
        """Where it lies once `make_ready` was called."""
        return place_of(self.saved) if self.is_own else self.saved.path


def make_ready(start: Start) -> None:
    """Let the names in a run's folder be those of the run that goes on; no other run's change."""
    if not start.is_own:
        return
    aside = put_later_aside(start.saved)
    if aside is not None:
        LOG.warning("resume: moved checkpoints of later steps to '%s'.", aside)
    if start.is_auto:
        finish_save(start.saved)
    else:
        give_name(start.saved)


def free_name(path: Path) -> Path:
    """Return the first of NAME-1, NAME-2, ... that does not exist."""
    number = 1
    while (other := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    return other


# --- strategies -----------------------------------------------------------------------------------

_WAY = "or start from its weights with `model.init_from`, which begins the optimizer's moments anew"


def refuse_other_strategy(path: Path, trainer: L.Trainer) -> None:
    """Refuse a checkpoint whose parts the processes of this run could not take up.

    Raises:
        ValueError: Naming the strategy or the number of processes that could.
    """
    strategy, layout = trainer.strategy, layout_of(path)
    if isinstance(strategy, ZeRO):
        processes = trainer.num_devices * trainer.num_nodes
        require_divided_alike(path, stage=strategy.stage, world_size=processes)
        return
    name = type(strategy).__name__
    if layout == "zero":
        facts = zero_facts(path)
        raise ValueError(
            f"'{path}' was written by deepspeed_zero{facts.stage} on {facts.world_size} processes, "
            f"and the strategy of this run is {name}: go on as it was written, {_WAY}."
        )
    if layout == "fsdp" and not isinstance(strategy, ModelParallelStrategy | FSDPStrategy):
        raise ValueError(
            f"'{path}' was written by fsdp, and the strategy of this run is {name}: go on with "
            f"fsdp, on any number of processes, {_WAY}."
        )


# --- the decision ---------------------------------------------------------------------------------


def choose(mode: str | None, trainer: L.Trainer, module: L.LightningModule) -> Saved | None:
    """Decide what a training goes on from.

    The first process reads candidates to their last byte, the others look at sizes; `SameStart`
    lets them take what the first one has chosen.

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
    found = survey(*folders, module=module, reads_all=_is_first_process(trainer))
    if found.newest is None and found.skipped:
        raise ValueError(
            f"`resume`: no checkpoint under {names} is fit to go on from: {found}. Nothing was "
            "begun; `--resume none` begins a new run beside them."
        )
    if found.newest is None and not is_auto:
        raise ValueError(
            f"`resume`: there is no checkpoint under {names}; give a folder or a checkpoint, "
            "'auto' or 'none'."
        )
    if found.newest is not None:
        refuse_other_strategy(found.newest.path, trainer)
    if _is_first_process(trainer):
        _tell(found, names, trainer)
    return found.newest


def _tell(found: Survey, names: str, trainer: L.Trainer) -> None:
    for path, reason in found.skipped:
        LOG.warning("resume: skipped '%s', which %s.", path, reason)
    if found.newest is None:
        LOG.info("resume: no checkpoint under %s yet, so the run begins.", names)
    else:
        where = _standing(found.newest, trainer)
        LOG.info("resume: goes on from '%s', %s.", found.newest.path, where)


def _standing(saved: Saved, trainer: L.Trainer) -> str:
    text = f"step {saved.step:,}"
    if (samples := saved.facts.get("samples_seen")) is not None:
        text += f" after {samples:,} samples"
    if 0 < trainer.max_steps <= saved.step:
        text += f"; all {trainer.max_steps:,} steps of `trainer.max_steps` are done"
    return text
