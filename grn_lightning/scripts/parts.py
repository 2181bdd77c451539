"""Long jobs in parts: done by any number of processes, in any order, interrupted, taken up again.

A job says how many parts there are, which are done, and how one is done. A part counts as done when
its file has its name. Processes agree through a lock file in the job's folder: each takes parts
that nobody is at, and what a process held is free again as soon as it is gone, however it ended.
So a job may be started on one process, killed, taken up on eight, and joined by another machine
that sees the same folder.

Processes are started here (`devices`), by torchrun, or by SLURM.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from tqdm import tqdm

from grn_lightning.datasets.manifest import write_json
from grn_lightning.scripts.runs import choose_device

if sys.platform != "win32":
    import fcntl

_LOCK_FILE, _PLAN_FILE = "lock", "plan.json"
_POLL_SECONDS = 0.5  # how often others are looked after

Progress = Callable[[float], None]
"""Told how many more samples are done; fractions are steps of one."""


class PartJob(ABC):
    """A job in numbered parts. It is sent to other processes, and must hold plain data only."""

    folder: Path
    """Where the job lies; it exists."""
    title: str
    """What the progress bar says."""

    @property
    @abstractmethod
    def samples_per_part(self) -> list[int]:
        """Samples of every part."""

    @abstractmethod
    def has(self, number: int) -> bool:
        """Whether a part is done."""

    @abstractmethod
    def start(self, device: torch.device) -> Callable[[int, Progress], None]:
        """Load what is needed and return what does a part.

        A part may only become visible when it is complete.
        """


class Claims:
    """Who is at which part, through locks of single bytes of one file.

    The system keeps these locks, and drops them when the process ends.

    Args:
        folder: Where the lock file lies.
    """

    def __init__(self, folder: Path) -> None:
        self._file = (folder / _LOCK_FILE).open("ab") if sys.platform != "win32" else None

    def take(self, number: int) -> bool:
        """Take a part; False if another process has it."""
        if self._file is None:
            return True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError:
            return False
        return True

    def drop(self, number: int) -> None:
        """Give a part back."""
        if self._file is not None:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)

    def close(self) -> None:
        """Give all back."""
        if self._file is not None:
            self._file.close()


# --- who this process is --------------------------------------------------------------------------


@dataclass(frozen=True)
class Rank:
    """This process among those of torchrun or SLURM."""

    number: int = 0
    """Its number."""
    of: int = 1
    """How many there are."""
    on_node: int = 0
    """Its number on its machine."""


def this_rank() -> Rank:
    """Return who this process is; alone, if nobody has started several."""
    if TorchElasticEnvironment.detect():
        torchrun = TorchElasticEnvironment()
        return Rank(torchrun.global_rank(), torchrun.world_size(), torchrun.local_rank())
    if SLURMEnvironment.detect():
        slurm = SLURMEnvironment(auto_requeue=False)
        return Rank(slurm.global_rank(), slurm.world_size(), slurm.local_rank())
    return Rank()


def device_of(name: str, number: int) -> torch.device:
    """Return the device of one of several processes: a GPU of its own if there are GPUs.

    Raises:
        ValueError: If there are fewer GPUs.
    """
    device = choose_device(name)
    if device.type == "cpu" or device.index is not None:
        return device
    count = torch.cuda.device_count()
    if number >= count:
        raise ValueError(f"process {number} finds {count} GPUs here; give `--devices {count}`.")
    return torch.device("cuda", number)


# --- doing it -------------------------------------------------------------------------------------


def _do_parts(
    job: PartJob,
    rank: Rank,
    device: torch.device,
    progress: Progress,
    look: Callable[[], None] = lambda: None,
) -> None:
    """Do parts that nobody is at; the first process stays until all are done.

    Args:
        job: What is to be done.
        rank: Who this process is.
        device: Where it works.
        progress: Told how many samples more this process has done.
        look: Called now and then, to see what others have done.
    """
    counts = job.samples_per_part
    first = rank.number * len(counts) // rank.of
    order = [*range(first, len(counts)), *range(first)]
    do: Callable[[int, Progress], None] | None = None
    claims = Claims(job.folder)
    try:
        while missing := [number for number in order if not job.has(number)]:
            is_idle = True
            for number in missing:
                if not claims.take(number):
                    continue
                if not job.has(number):  # it may have been done a moment ago
                    do = do or job.start(device)
                    do(number, progress)
                    is_idle = False
                claims.drop(number)
                look()
            if rank.number > 0:
                return
            look()
            if is_idle:
                time.sleep(_POLL_SECONDS)
    finally:
        claims.close()


def _done(job: PartJob) -> int:
    """Return the samples of all parts that are there."""
    return sum(count for number, count in enumerate(job.samples_per_part) if job.has(number))


@contextmanager
def _bar(job: PartJob, *, is_shown: bool = True) -> Iterator[Any]:
    """Show how many samples are done; an interrupted job begins where it was."""
    with tqdm(
        total=sum(job.samples_per_part),
        initial=_done(job),
        disable=not is_shown,
        desc=job.title,
        unit="sample",
        bar_format="{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]",
    ) as bar:
        yield bar


def _advance(bar: Any, to: float) -> None:
    """Move a bar; fractions add up to whole samples only nearly."""
    bar.update(min(to, bar.total) - bar.n)


def _alone(job: PartJob, rank: Rank, device: torch.device) -> None:
    with _bar(job, is_shown=rank.number == 0) as bar:

        def progress(samples: float) -> None:
            _advance(bar, bar.n + samples)

        def look() -> None:
            _advance(bar, max(bar.n, _done(job)))

        _do_parts(job, rank, device, progress, look)


def _one_of_many(job: PartJob, rank: Rank, device: str, threads: int, counters: Any) -> None:
    """Work as one of several processes; what is done is told through shared memory."""
    torch.set_num_threads(threads)

    def progress(samples: float) -> None:
        counters[rank.number] += samples

    _do_parts(job, rank, device_of(device, rank.on_node), progress)


_shared: list[Any] = []  # what the parent shares with its processes


def _keep(counters: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes itself
    threading.Thread(target=_follow_parent, daemon=True).start()
    _shared.append(counters)


def _follow_parent() -> None:
    """End with the parent, however it was ended; parts are whole or not there."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _child(job: PartJob, rank: Rank, device: str, threads: int) -> None:
    _one_of_many(job, rank, device, threads, _shared[0])


def _together(job: PartJob, devices: int, device: str) -> None:
    """Start processes and show what they have done together."""
    context = multiprocessing.get_context("spawn")  # a forked process cannot use GPUs
    counters = context.Array("d", devices, lock=False)
    threads = max(1, torch.get_num_threads() // devices)
    pool = ProcessPoolExecutor(devices, context, initializer=_keep, initargs=(counters,))
    try:
        futures = [
            pool.submit(_child, job, Rank(n, devices, n), device, threads) for n in range(devices)
        ]
        with _bar(job) as bar:
            first = bar.n
            while not all(future.done() for future in futures):
                _raise_first(futures)
                _advance(bar, first + sum(counters))
                time.sleep(_POLL_SECONDS)
            _advance(bar, first + sum(counters))
        _raise_first(futures)
    except BrokenProcessPool as error:
        raise ValueError(
            "a process was ended from outside (often for lack of memory); what is finished is "
            f"kept in '{job.folder}'. Give the same command again, perhaps with fewer `--devices`."
        ) from error
    finally:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def _raise_first(futures: list[Future[None]]) -> None:
    for future in futures:
        if future.done() and (error := future.exception()) is not None:
            raise error


def do_parts(job: PartJob, *, devices: int, device: str) -> bool:
    """Do what is missing of a job.

    Args:
        job: What is to be done.
        devices: Processes to start, each on a GPU of its own if there are GPUs.
        device: "auto", "cpu" or "cuda".

    Returns:
        Whether all is done and this process is the one to go on: of several that torchrun or SLURM
        has started, the first.

    Raises:
        ValueError: If there are fewer GPUs, or a process was killed.
    """
    rank = this_rank()
    if devices < 1:
        raise ValueError(f"`devices` must be at least 1, got {devices}.")
    if devices > 1 and rank.of > 1:
        raise ValueError(
            f"torchrun or SLURM has started {rank.of} processes already; leave `--devices` out."
        )
    if all(job.has(number) for number in range(len(job.samples_per_part))):
        return rank.number == 0
    if devices > 1:
        if choose_device(device).type == "cuda":
            device_of(device, devices - 1)  # refuses what there is not, before anything starts
        _together(job, devices, device)
    else:
        _alone(job, rank, device_of(device, rank.on_node))
    return rank.number == 0


def settle_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """Note in a folder what is being done there, or look that it is the same.

    Args:
        folder: A new one, an empty one, or one that an earlier call has settled.
        plan: Plain data; all that decides the result.

    Raises:
        ValueError: If something else is being done there, or it holds other files.
    """
    file = folder / _PLAN_FILE
    # In this order: of several processes one may have written it, and begun, a moment ago.
    if (is_taken := _holds_others(folder)) and not file.is_file():
        raise ValueError(
            f"`out` must be new, empty, or the folder of the same command, '{folder}' is not."
        )
    if not is_taken and not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, plan)
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"'{file}' is damaged ({error}), and nobody knows what the parts beside it are; give "
            "another `--out`."
        ) from error
    differences = _differences(stored, json.loads(json.dumps(plan)))
    if differences:
        raise ValueError(
            f"'{folder}' holds parts that were made otherwise (there, now): "
            f"{'; '.join(differences)}. Go on as it was begun, or give another `--out`."
        )


def _holds_others(folder: Path) -> bool:
    """Whether there is something else than a plan, or one that is being written."""
    if not folder.exists():
        return False
    return not folder.is_dir() or any(
        not one.name.startswith(_PLAN_FILE) for one in folder.iterdir()
    )


def _differences(first: Any, second: Any, name: str = "") -> list[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        keys = [*first, *(key for key in second if key not in first)]
        return [
            text
            for key in keys
            for text in _differences(first.get(key), second.get(key), f"{name}.{key}".strip("."))
        ]
    return [] if first == second else [f"{name} {first!r} and {second!r}"]


def part_sizes(num_samples: int, part_size: int) -> list[int]:
    """Return how many samples every part has.

    Example:
        >>> part_sizes(10, 4)
        [4, 4, 2]
    """
    sizes = [part_size] * (num_samples // part_size)
    return sizes + [num_samples % part_size] * (num_samples % part_size > 0)
