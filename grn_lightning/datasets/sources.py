"""Which files a data set is made of: a folder, a folder per class, or a table of files.

Captions come from a text file of the same name beside each picture or video (``cat.jpg``,
``cat.txt``), or from a table. Nothing here opens a picture or changes a file.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from grn_lightning.datasets.tars import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

IMAGE_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
VIDEO_SUFFIXES = tuple(f".{extension}" for extension in VIDEO_EXTENSIONS)
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")

# Names of the columns in tables that are around; the first one present is taken.
_FILE_COLUMNS = ("file", "path", "filename", "file_name", "image", "video")
_CAPTION_COLUMNS = ("caption", "text", "prompt")
_CLASS_COLUMNS = ("class", "label", "cls")

_NUM_READERS = 16  # threads; small files on a network disk are bound by latency
_CHUNK = 10_000  # files asked for at a time
_FEW = 5  # names that a message lists


class SourceFile(NamedTuple):
    """One picture or video and what is said about it."""

    name: str
    """Path relative to the root, with forward slashes; absolute where a table says so."""
    num_bytes: int
    """Size of the file; -1 if it cannot be asked, a broken link for instance."""
    captions: tuple[str, ...] = ()
    """Captions, of which the first is the usual one."""
    class_index: int | None = None
    """Number of the class."""


@dataclass(frozen=True)
class SourceList:
    """All files of a data set, sorted by name."""

    root: Path
    """Folder that the names are relative to."""
    files: tuple[SourceFile, ...]
    """Pictures and videos."""
    class_names: tuple[str, ...] = ()
    """Name of class 0, 1, ...; empty without classes, and where a table gives numbers."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of files of other kinds in the folder, by suffix."""


class _Row(NamedTuple):
    captions: tuple[str, ...]
    class_name: str | None


def _few(names: Sequence[str]) -> str:
    """List the first names of many."""
    return ", ".join(names[:_FEW]) + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")


def stable_order(names: Iterable[str], *, salt: str) -> list[str]:
    """Shuffle names by a hash: the same on every machine, and alike when names come or go."""
    return sorted(names, key=lambda name: blake2b(f"{salt}/{name}".encode()).digest())


# --- tables ---------------------------------------------------------------------------------------


def _json_object(line: str) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object: {line[:40]}")
    return row


def _table_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV, TSV or JSONL file by column name."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        if path.suffix.lower() == ".jsonl":
            yield from (_json_object(line) for line in stream if line.strip())
        else:
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
            yield from csv.DictReader(stream, delimiter=delimiter)


def _value(row: Mapping[str, Any], columns: Sequence[str]) -> str | None:
    """Take the first of some columns that is there; nothing written in it is None."""
    for column in columns:
        if row.get(column) is not None:
            return str(row[column]).strip() or None
    return None


def _add_row(table: dict[str, _Row], row: Mapping[str, Any]) -> None:
    name = _value(row, _FILE_COLUMNS)
    if name is None:
        columns = ", ".join(str(column) for column in row)
        raise ValueError(f"no file in {' or '.join(_FILE_COLUMNS)}; it has {columns}")
    name = Path(name).as_posix()
    caption, class_name = _value(row, _CAPTION_COLUMNS), _value(row, _CLASS_COLUMNS)
    old = table.get(name, _Row((), class_name))
    if old.class_name != class_name:
        raise ValueError(f"{name} gets a second class, {class_name} after {old.class_name}")
    table[name] = _Row((*old.captions, *([caption] if caption else [])), class_name)


def _read_table(path: Path) -> dict[str, _Row]:
    """Read captions and classes by file; several rows of one file are several captions."""
    table: dict[str, _Row] = {}
    num_rows = 0
    try:
        for row in _table_rows(path):
            _add_row(table, row)
            num_rows += 1
    except (ValueError, OSError, csv.Error) as error:
        raise ValueError(f"cannot use row {num_rows + 1} of {path}: {error}.") from error
    return table


# --- folders --------------------------------------------------------------------------------------


def _walk(root: Path, skip: Path) -> Iterator[str]:
    """Yield all files below a folder but hidden ones; links to folders are followed, once."""
    seen = {skip.resolve()}
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        place = Path(folder).resolve()
        if place in seen:
            subfolders.clear()
            continue
        seen.add(place)
        prefix = Path(folder).relative_to(root)
        yield from ((prefix / name).as_posix() for name in names if not name.startswith("."))


def _is_media(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in name)  # Python's mark of bad bytes


def _describe(root: Path, name: str, row: _Row | None) -> SourceFile:
    """Ask for the size of a file, and read the text beside it unless a table has spoken."""
    path = root / name
    try:
        num_bytes = path.stat().st_size
    except OSError:
        return SourceFile(name, -1)
    if row is not None and row.captions:
        return SourceFile(name, num_bytes, row.captions)
    try:
        text = path.with_suffix(".txt").read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        text = ""
    except ValueError as error:
        raise ValueError(
            f"the caption {path.with_suffix('.txt')} is not UTF-8: {error}."
        ) from error
    return SourceFile(name, num_bytes, (text,) if text else ())


# --- classes --------------------------------------------------------------------------------------


def _sorted_classes(names: Iterable[str]) -> list[str]:
    """Sort class names, numbers by value."""
    unique = sorted(set(names))
    return sorted(unique, key=int) if all(name.isdecimal() for name in unique) else unique


def _number_classes(
    class_of: Mapping[str, str], known: Sequence[str]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Number the classes of files by sorted name, or as the names that are known already."""
    names = _sorted_classes(class_of.values())
    unknown = [name for name in names if name not in set(known)]
    if known and unknown:
        raise ValueError(
            f"the target's classes.json has {len(known)} classes but not {_few(unknown)}; build "
            "the split that has all classes first, or choose another target."
        )
    index = {name: n for n, name in enumerate(known or names)}
    return {file: index[name] for file, name in class_of.items()}, tuple(known or names)


def _classes_of_folders(names: Sequence[str]) -> dict[str, str]:
    loose = [name for name in names if "/" not in name]
    if loose:
        raise ValueError(
            f"with classes_from_folders every file must lie in the folder of its class, but "
            f"{_few(loose)} do not."
        )
    return {name: name.partition("/")[0] for name in names}


def _classes_of_table(table: Mapping[str, _Row]) -> dict[str, str]:
    named = {name: row.class_name for name, row in table.items() if row.class_name is not None}
    bare = [name for name in table if name not in named]
    if named and bare:
        raise ValueError(f"the table gives a class to some files but none to {_few(bare)}.")
    return named


def _assign_classes(
    names: Sequence[str], table: Mapping[str, _Row], *, from_folders: bool, known: Sequence[str]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Give the class number of every file that has one, and the names of the classes."""
    if from_folders:
        return _number_classes(_classes_of_folders(names), known)
    class_of = _classes_of_table(table)
    if all(name.isdecimal() for name in class_of.values()):  # a table may number them itself
        return {file: int(name) for file, name in class_of.items()}, ()
    return _number_classes(class_of, known)


# --- all together ---------------------------------------------------------------------------------


def _find_names(
    root: Path, table: Mapping[str, _Row] | None, skip: Path
) -> tuple[list[str], Counter[str]]:
    """Name the pictures and videos, sorted, and count what else there is."""
    found = list(table) if table is not None else list(_walk(root, skip))
    names = sorted(name for name in found if _is_media(name))
    strange = [ascii(name) for name in names if not _is_utf8(name)]
    if strange:
        raise ValueError(f"rename these files, their names are not UTF-8: {_few(strange)}.")
    texts = {str(Path(name).with_suffix(".txt")) for name in names}
    others = Counter(Path(n).suffix.lower() for n in found if not _is_media(n) and n not in texts)
    if table is not None and others:
        unknown = sorted(name for name in found if not _is_media(name))
        raise ValueError(f"the table names files of unknown kinds: {_few(unknown)}.")
    if not names:
        kinds = ", ".join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)
        rest = f"only {count_suffixes(others)}" if others else "nothing"
        raise ValueError(f"no pictures or videos ({kinds}) in {root}: there is {rest}.")
    return names, others


def count_suffixes(counts: Mapping[str, int]) -> str:
    """Write counts by suffix, for people: "3 .bmp, 1 without suffix"."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in ordered)


def _find_table(source: Path, captions: Path | None) -> Path | None:
    """Check what was given, and return the table in it."""
    for path in (source, captions):
        if path is not None and not path.exists():
            raise ValueError(f"there is no file or folder {path}.")
    tables = [path for path in (source, captions) if path is not None and path.is_file()]
    strange = [path for path in tables if path.suffix.lower() not in TABLE_SUFFIXES]
    if strange or len(tables) > 1 or (captions is not None and not captions.is_file()):
        raise ValueError(
            f"the source must be a folder, with or without a table of captions, or one table "
            f"({', '.join(TABLE_SUFFIXES)}); got {source}{f' and {captions}' if captions else ''}."
        )
    return tables[0] if tables else None


def _describe_all(root: Path, names: Sequence[str], table: Mapping[str, _Row]) -> list[SourceFile]:
    files: list[SourceFile] = []
    with (
        ThreadPoolExecutor(_NUM_READERS) as pool,
        tqdm(desc="listing", unit="file", total=len(names), leave=False) as bar,
    ):
        for start in range(0, len(names), _CHUNK):
            chunk = names[start : start + _CHUNK]
            files += pool.map(lambda name: _describe(root, name, table.get(name)), chunk)
            bar.update(len(chunk))
    return files


def list_sources(
    source: Path,
    *,
    captions: Path | None = None,
    classes_from_folders: bool = False,
    known_classes: Sequence[str] = (),
    skip: Path = Path(os.devnull),
) -> SourceList:
    """List the pictures and videos of a data set with captions and classes.

    Args:
        source: A folder, which is searched with all its subfolders; or a table of files (CSV, TSV,
            JSONL), whose paths are relative to its own folder.
        captions: A table beside a folder: the files it names are the data set. Its columns are
            ``file`` (or path, filename, image, video), ``caption`` (text, prompt) and ``class``
            (label, cls); several rows of one file are several captions.
        classes_from_folders: The folder at the first level names the class.
        known_classes: Class names in the order of their numbers; sorted names by default.
        skip: A folder to leave out.

    Raises:
        ValueError: If there is nothing, a named file is missing, or classes contradict each other.
    """
    table_path = _find_table(source, captions)
    root = source if source.is_dir() else source.parent
    table = _read_table(table_path) if table_path else None
    names, others = _find_names(root, table, skip)
    files = _describe_all(root, names, table or {})
    missing = [file.name for file in files if file.num_bytes < 0]
    if table is not None and missing:
        raise ValueError(f"{table_path} names {len(missing)} missing files: {_few(missing)}.")
    index, class_names = _assign_classes(
        names, table or {}, from_folders=classes_from_folders, known=known_classes
    )
    labelled = tuple(file._replace(class_index=index.get(file.name)) for file in files)
    return SourceList(root, labelled, class_names, dict(others))
