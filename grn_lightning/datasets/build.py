"""From a folder of pictures or videos to shards: verified, resumable, equal on every machine.

1. `list_sources` names the files, their captions and classes; a share may go to validation.
2. Files are put in an order that depends on their names and a seed only, and cut into shards.
3. The plan is stored. An interrupted build goes on where it was; another plan under the same
   names is refused.
4. Every file is decoded to see that it can be, and copied as it is. Those that cannot be are
   listed with the reason in ``<split>.skipped.jsonl``; sources are never changed.
5. The manifest is written last.

A shard is one unit of work and its bytes do not depend on which process writes it, or when.
"""

import json
import multiprocessing
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from grn_lightning.datasets.manifest import (
    FORMAT,
    Manifest,
    atomic_file,
    write_json,
    write_manifest,
)
from grn_lightning.datasets.pack import PackedShard, ShardJob, Skipped, pack_shard
from grn_lightning.datasets.sources import (
    SourceFile,
    SourceList,
    count_suffixes,
    list_sources,
    stable_order,
)

_VAL = "val"
_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """How files become shards."""

    split: str = "train"
    """Name of the split: the files are `<split>-000000.tar` and so on."""
    captions: Path | None = None
    """Table (.csv, .tsv, .jsonl) with a column `file` and columns `caption`, `class` or both; only
    the files it names are taken. Without one, captions are text files beside the files."""
    classes_from_folders: bool = False
    """The first folder below the source is the name of the class (ImageNet's layout)."""
    require_captions: bool = False
    """Refuse to begin if a file has no caption; otherwise they are counted."""
    val_fraction: float = 0.0
    """Share of the files that goes to the split `val` instead, chosen by file name and seed."""
    samples_per_shard: int = 1000
    """Files in a shard; the last shard, and those with unreadable files, hold fewer."""
    shuffle: bool = True
    """Mix the files, so that a shard holds many classes; otherwise they are sorted by name."""
    seed: int = 0
    """Seed of the mixing and of the choice of `val_fraction`."""
    resize: int | None = None
    """Shrink larger files to this shorter side and encode them anew: PNG stays PNG, other pictures
    become JPEG (quality 95), videos H.264 (crf 18, constant rate, no sound). Without it, and for
    smaller files, bytes are copied as they are."""
    num_workers: int | None = None
    """Processes that verify and write; one per core by default, 0 works in this one."""

    def __post_init__(self) -> None:
        """Refuse what cannot be, all at once."""
        issues = {
            f"split must consist of letters, digits, '-' and '_', got {self.split!r}": not (
                re.fullmatch(r"[\w-]+", self.split, re.ASCII)
            ),
            f"val_fraction must be at least 0 and less than 1, got {self.val_fraction}": not (
                0 <= self.val_fraction < 1
            ),
            f"with val_fraction the split cannot be {_VAL!r} itself": (
                self.val_fraction > 0 and self.split == _VAL
            ),
            f"samples_per_shard must be at least 1, got {self.samples_per_shard}": (
                self.samples_per_shard < 1
            ),
            f"resize must be at least 1, got {self.resize}": (
                self.resize is not None and self.resize < 1
            ),
            f"num_workers must be at least 0, got {self.num_workers}": (self.num_workers or 0) < 0,
        }
        found = [issue for issue, is_wrong in issues.items() if is_wrong]
        if found:
            raise ValueError(f"{'; '.join(found)}.")


@dataclass(frozen=True)
class SplitReport:
    """What a split holds after a build."""

    split: str
    """Its name."""
    num_samples: int
    """Samples in all shards."""
    num_shards: int
    """Shards with samples."""
    num_bytes: int
    """Size of all shards."""
    num_captions: int
    """Samples with a caption."""
    num_skipped: int
    """Files that could not be read, see ``<split>.skipped.jsonl``."""
    num_resumed: int
    """Shards that were there already."""

    def __str__(self) -> str:
        """Tell it in a line or two."""
        text = (
            f"{self.split}: {self.num_samples} samples ({self.num_captions} with a caption) in "
            f"{self.num_shards} shards, {self.num_bytes / 1e6:.1f} MB"
        )
        if self.num_resumed:
            text += f"; {self.num_resumed} shards were there already"
        if self.num_skipped:
            text += f"\n  {self.num_skipped} files could not be read: {self.split}.skipped.jsonl"
        return text


@dataclass(frozen=True)
class ShardReport:
    """What a build has made."""

    target: Path
    """Folder of the shards."""
    splits: tuple[SplitReport, ...]
    """One or two splits."""
    class_names: tuple[str, ...]
    """Names of class 0, 1, ..., where they have names."""
    left_out: Mapping[str, int]
    """Number of files of other kinds in the source, by suffix."""

    def __str__(self) -> str:
        """Tell it to a person."""
        lines = [f"shards in {self.target}", *map(str, self.splits)]
        if self.class_names:
            lines.append(f"{len(self.class_names)} classes, named in classes.json")
        if self.left_out:
            lines.append(f"files of other kinds were left out: {count_suffixes(self.left_out)}")
        return "\n".join(lines)


# --- many shards ----------------------------------------------------------------------------------

_files_done: Any = None  # counter of a worker process, shared with the one that waits


def _start_worker(counter: Any) -> None:
    global _files_done
    _files_done = counter
    torch.set_num_threads(1)  # the processes are the parallelism


def _count_in_worker(count: int) -> None:
    with _files_done.get_lock():
        _files_done.value += count


def _write_in_worker(job: ShardJob) -> PackedShard:
    return pack_shard(job, _count_in_worker)


def _write_all(jobs: Sequence[ShardJob], bar: tqdm, *, num_workers: int) -> list[PackedShard]:
    """Write shards in this process, or in several; results in the order of the jobs."""
    if num_workers <= 1:
        return [pack_shard(job, bar.update) for job in jobs]
    # Not forked: torch and PyAV have threads, which a fork would lose.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_start_worker, initargs=(counter,)
    ) as pool:
        futures = [pool.submit(_write_in_worker, job) for job in jobs]
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, _POLL_SECONDS, return_when=FIRST_COMPLETED)
                bar.update(counter.value - bar.n)
                for future in done:
                    future.result()
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker process was killed, most likely for lack of memory. Finished shards are "
                "kept: run the same command again, with a smaller num_workers."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return [future.result() for future in futures]


# --- the plan -------------------------------------------------------------------------------------


class _Split(NamedTuple):
    name: str
    files: tuple[SourceFile, ...]


def _order(files: Sequence[SourceFile], config: ShardsConfig) -> tuple[SourceFile, ...]:
    if not config.shuffle:
        return tuple(sorted(files))
    by_name = {file.name: file for file in files}
    return tuple(by_name[name] for name in stable_order(by_name, salt=f"order/{config.seed}"))


def _divide(files: Sequence[SourceFile], config: ShardsConfig) -> list[_Split]:
    """Cut the files into splits; a file's place depends on its name and the seed only."""
    if not config.val_fraction:
        return [_Split(config.split, _order(files, config))]
    num_val = max(1, round(config.val_fraction * len(files)))
    if num_val >= len(files):
        raise ValueError(
            f"val_fraction={config.val_fraction} leaves nothing of {len(files)} files."
        )
    ranked = stable_order((file.name for file in files), salt=f"{_VAL}/{config.seed}")
    held_out = set(ranked[:num_val])
    return [
        _Split(config.split, _order([f for f in files if f.name not in held_out], config)),
        _Split(_VAL, _order([f for f in files if f.name in held_out], config)),
    ]


def _plan(split: _Split, config: ShardsConfig) -> dict[str, Any]:
    """Write down what decides the bytes of a split."""
    names = ("val_fraction", "samples_per_shard", "shuffle", "seed", "resize")
    digest = blake2b(digest_size=16)
    for file in split.files:
        digest.update(json.dumps(file).encode() + b"\n")
    return {
        "format": FORMAT,
        **{name: getattr(config, name) for name in names},
        "num_files": len(split.files),
        "files": digest.hexdigest(),
    }


def _check_plan(target: Path, split: str, plan: Mapping[str, Any]) -> None:
    """Refuse to mix two builds under one name."""
    path = target / f"{split}.plan.json"
    advice = "choose another target or split, or move the old files away."
    if not path.exists():
        if any(target.glob(f"{split}-*.tar")) or (target / f"{split}.manifest.json").exists():
            raise ValueError(f"{target} holds {split} shards that no plan describes; {advice}")
        return
    old = json.loads(path.read_text())
    changed = [f"{k} was {old.get(k)} and is {v}" for k, v in plan.items() if old.get(k) != v]
    if changed == [f"files was {old.get('files')} and is {plan['files']}"]:
        changed = ["names, sizes, captions or classes of its files have changed"]
    if changed:
        text = "; ".join(line for line in changed if not line.startswith("files was"))
        raise ValueError(f"{target} holds another build of {split}: {text}. To go on, {advice}")


# --- all together ---------------------------------------------------------------------------------


def _write_skipped(path: Path, skipped: Sequence[Skipped]) -> None:
    if skipped:
        lines = [json.dumps(s._asdict(), ensure_ascii=False) + "\n" for s in skipped]
        with atomic_file(path) as stream:
            stream.write("".join(lines).encode())


def _jobs(target: Path, root: Path, split: _Split, config: ShardsConfig) -> list[ShardJob]:
    starts = range(0, len(split.files), config.samples_per_shard)
    pieces = [split.files[start : start + config.samples_per_shard] for start in starts]
    paths = [target / f"{split.name}-{n:06d}.tar" for n in range(len(starts))]
    return [
        ShardJob(path, root, start, files, config.resize)
        for path, start, files in zip(paths, starts, pieces, strict=True)
    ]


def _build_split(target: Path, root: Path, split: _Split, config: ShardsConfig) -> SplitReport:
    """Write the shards of a split, then what could not be read, then the manifest."""
    jobs, count = _jobs(target, root, split, config), len(split.files)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    num_workers = config.num_workers if config.num_workers is not None else cores or 1
    with tqdm(total=count, desc=f"{split.name} shards", unit="file") as bar:
        done = _write_all(jobs, bar, num_workers=min(num_workers, len(jobs)))
    skipped = [file for shard in done for file in shard.skipped]
    _write_skipped(target / f"{split.name}.skipped.jsonl", skipped)
    if len(skipped) == count:
        raise ValueError(
            f"none of the {count} files of {split.name} could be read, see "
            f"{target / split.name}.skipped.jsonl; the first: {skipped[0].reason}"
        )
    scans = [shard.scan for shard in done if shard.scan.keys]
    fields = sorted({field for scan in scans for field in scan.fields})
    manifest = Manifest(tuple(scan.info for scan in scans), tuple(fields))
    write_manifest(target / f"{split.name}.manifest.json", manifest)
    for remains in target.glob(f"{split.name}-*.tar.*.tmp"):  # of processes that were killed
        remains.unlink()
    return SplitReport(
        split=split.name,
        num_samples=manifest.num_samples,
        num_shards=len(scans),
        num_bytes=sum(scan.info.num_bytes for scan in scans),
        num_captions=sum(shard.num_captions for shard in done),
        num_skipped=len(skipped),
        num_resumed=sum(shard.was_there for shard in done),
    )


def _list(source: Path, target: Path, config: ShardsConfig) -> SourceList:
    """List the files; classes keep the numbers that the target gave them before."""
    if source.resolve() == target.resolve():
        raise ValueError(f"the target must be another folder than the source, got {target} twice.")
    classes = target / "classes.json"
    known = json.loads(classes.read_text()) if classes.exists() else ()
    sources = list_sources(
        source,
        captions=config.captions,
        classes_from_folders=config.classes_from_folders,
        known_classes=known,
        skip=target,
    )
    bare = [file.name for file in sources.files if not file.captions]
    if config.require_captions and bare:
        raise ValueError(
            f"{len(bare)} of {len(sources.files)} files have no caption, {bare[0]} for instance; "
            "write them, name the table in `captions`, or switch require_captions off."
        )
    return sources


def build_shards(
    source: Path, target: Path, *, config: ShardsConfig = ShardsConfig()
) -> ShardReport:
    """Write the pictures or videos of a folder or a table into shards; see the top of this file.

    Args:
        source: Folder, or table of files.
        target: Folder of the shards, made if necessary.
        config: How.

    Returns:
        What was written; `str` tells it to a person.

    Raises:
        ValueError: If the sources or the target do not fit; nothing has been written then. Or if
            no file at all could be read.
    """
    sources = _list(source, target, config)
    splits = _divide(sources.files, config)
    plans = {split.name: _plan(split, config) for split in splits}
    for name, plan in plans.items():
        _check_plan(target, name, plan)
    target.mkdir(parents=True, exist_ok=True)
    if sources.class_names:
        write_json(target / "classes.json", sources.class_names)
    for name, plan in plans.items():
        write_json(target / f"{name}.plan.json", plan)
    reports = [_build_split(target, sources.root, split, config) for split in splits]
    return ShardReport(target, tuple(reports), sources.class_names, sources.left_out)
