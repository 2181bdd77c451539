"""One shard of a build: files are verified, described, shrunk if asked for, and written.

The bytes of a shard are a function of its job and of the files, not of who does it or when.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from grn_lightning.datasets.manifest import ShardScan, scan_shard, write_shard
from grn_lightning.datasets.sources import IMAGE_SUFFIXES, SourceFile
from grn_lightning.media.images import (
    center_crop_resize,
    decode_image,
    encode_jpeg,
    encode_png,
    fit_short_side,
)
from grn_lightning.media.video import decode_video, encode_mp4, probe_video

_SLUG_LENGTH = 60  # a member's name has 100 bytes at most
_RECOVERED = "could not be read when its shard was written, but can be now"


# --- a sample -------------------------------------------------------------------------------------


class _Prepared(NamedTuple):
    extension: str
    data: bytes
    facts: dict[str, Any]


def _prepare_image(data: bytes, extension: str, resize: int | None, source: str) -> _Prepared:
    image = decode_image(data, source=source)
    size = fit_short_side(*image.shape[-2:], short_side=resize or min(image.shape[-2:]))
    if size != tuple(image.shape[-2:]):
        small = center_crop_resize(image, size)
        extension = "png" if extension == "png" else "jpg"
        data = encode_png(small) if extension == "png" else encode_jpeg(small)
    return _Prepared(extension, data, {"height": size[0], "width": size[1]})


def _prepare_video(data: bytes, extension: str, resize: int | None, source: str) -> _Prepared:
    info = probe_video(data, source=source)
    if resize is not None and resize < min(info.height, info.width):
        fitted = fit_short_side(info.height, info.width, short_side=resize)
        size = (fitted[0] // 2 * 2, fitted[1] // 2 * 2)  # H.264 stores colours for 2x2 pixels
        clip = decode_video(data, fps=info.fps, num_frames=None, size=size, source=source)
        extension, data = "mp4", encode_mp4(clip, fps=info.fps)
        info = probe_video(data, source=source)
    return _Prepared(extension, data, info._asdict())


def _make_sample(key: str, root: Path, file: SourceFile, resize: int | None) -> dict[str, Any]:
    """Read, verify and describe one file.

    Raises:
        ValueError: If it does not decode.
        OSError: If it cannot be read.
    """
    path = root / file.name
    suffix = path.suffix.lower()
    extension = "jpg" if suffix == ".jpeg" else suffix.removeprefix(".")
    prepare = _prepare_image if suffix in IMAGE_SUFFIXES else _prepare_video
    extension, data, facts = prepare(path.read_bytes(), extension, resize, file.name)
    facts["source"] = file.name
    sample: dict[str, Any] = {"__key__": key, extension: data}
    if file.captions:
        sample["txt"] = file.captions[0].encode()
    if len(file.captions) > 1:
        facts["captions"] = list(file.captions)
    if file.class_index is not None:
        sample["cls"] = str(file.class_index).encode()
    return sample | {"json": json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()}


# --- a shard --------------------------------------------------------------------------------------


class ShardJob(NamedTuple):
    """A shard to be written: the unit of work of a process."""

    path: Path
    """The tar."""
    root: Path
    """Folder that the files' names are relative to."""
    first: int
    """Number of the first file within the split."""
    files: tuple[SourceFile, ...]
    """What to put in."""
    resize: int | None
    """Shorter side that larger files are shrunk to."""

    def keyed(self) -> Iterator[tuple[str, SourceFile]]:
        """Yield files with their keys: number within the split, and what the name allows.

        A key ends at its first dot and must fit into 100 bytes, so it cannot be the path itself.
        """
        for number, file in enumerate(self.files, self.first):
            stem = Path(file.name).with_suffix("").as_posix()
            slug = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_")[-_SLUG_LENGTH:]
            yield f"{number:08d}-{slug}".rstrip("-"), file


class Skipped(NamedTuple):
    """A file that could not become a sample."""

    source: str
    """Its name."""
    reason: str
    """What reading or decoding it said."""


class PackedShard(NamedTuple):
    """What became of a job."""

    scan: ShardScan
    """What the shard holds."""
    skipped: tuple[Skipped, ...]
    """Files that are not in it."""
    num_captions: int
    """Samples with a caption."""
    was_there: bool
    """Whether it had been written before."""


def _attempt(job: ShardJob, key: str, file: SourceFile) -> dict[str, Any] | Skipped:
    """Make a sample, or tell why there is none."""
    try:
        return _make_sample(key, job.root, file, job.resize)
    except (ValueError, OSError) as error:
        return Skipped(file.name, str(error))


def _resume(job: ShardJob, tick: Callable[[int], None]) -> PackedShard:
    """Count a shard that is there, and find out again why files are missing from it."""
    try:
        scan = scan_shard(job.path)
    except ValueError as error:
        raise ValueError(f"{error} Delete that shard and run the same command again.") from error
    keyed = dict(job.keyed())
    strangers = set(scan.keys) - keyed.keys()
    if strangers:
        raise ValueError(
            f"{job.path} holds samples of another build, {min(strangers)} for instance; choose "
            "another target, or move that shard away and run the same command again."
        )
    absent = sorted(keyed.keys() - set(scan.keys))
    attempts = [_attempt(job, key, keyed[key]) for key in absent]
    skipped = [
        attempt if isinstance(attempt, Skipped) else Skipped(keyed[key].name, _RECOVERED)
        for key, attempt in zip(absent, attempts, strict=True)
    ]
    tick(len(job.files))
    captions = sum(bool(keyed[key].captions) for key in scan.keys)
    return PackedShard(scan, tuple(skipped), captions, was_there=True)


def pack_shard(job: ShardJob, tick: Callable[[int], None]) -> PackedShard:
    """Write one shard, unless it is there.

    Args:
        job: Files and the name of the shard.
        tick: Called with a number of files whenever so many more are done.

    Raises:
        ValueError: If the shard is there but damaged, or of another build.
    """
    if job.path.exists():
        return _resume(job, tick)
    skipped: list[Skipped] = []
    num_captions = 0

    def samples() -> Iterator[dict[str, Any]]:
        nonlocal num_captions
        for key, file in job.keyed():
            sample = _attempt(job, key, file)
            if isinstance(sample, Skipped):
                skipped.append(sample)
            else:
                num_captions += bool(file.captions)
                yield sample
            tick(1)

    scan = write_shard(job.path, samples())
    return PackedShard(scan, tuple(skipped), num_captions, was_there=False)
