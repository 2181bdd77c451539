"""What a set of samples is asked to show: every class equally often, or captions of a file."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from grn_lightning.datasets.shards import ShardSet

_MANY = 10_000  # reading so many takes a while


@dataclass(frozen=True)
class Asked:
    """One caption or class per sample; the place in the list is the number of the sample."""

    field: str
    """`captions` or `class_labels`."""
    values: tuple[Any, ...]
    """What is asked for."""
    origin: str
    """Where that comes from."""
    labels: tuple[int, ...] | None = None
    """Class of every sample, where it is known; captions may come with one."""

    @property
    def sha256(self) -> str:
        """Hash of what is asked for, in order."""
        text = json.dumps([self.field, self.values], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def part(self, rows: slice) -> dict[str, list[Any]]:
        """Return what some samples are asked for, under the name that the generator understands."""
        return {self.field: list(self.values[rows])}


def balanced_classes(num_classes: int, num_samples: int) -> Asked:
    """Ask for every class equally often, one class after the other, as publications do.

    Raises:
        ValueError: If the classes do not divide the samples.
    """
    if num_samples % num_classes:
        low = num_samples // num_classes * num_classes
        near = " or ".join(str(n) for n in (low, low + num_classes) if n > 0)
        raise ValueError(
            f"`num_samples` must be a multiple of the {num_classes} classes, so that each is drawn "
            f"equally often, got {num_samples}; take {near}."
        )
    each = num_samples // num_classes
    labels = tuple(label for label in range(num_classes) for _ in range(each))
    return Asked("class_labels", labels, f"every class {each} times", labels)


def read_lines(file: Path) -> list[str]:
    """Return the prompts of a text file, one a line; empty lines do not count.

    Raises:
        ValueError: If there is no such file, it is no text, or it holds none.
    """
    if not file.is_file():
        raise ValueError(f"there is no file of prompts at '{file}'.")
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"'{file}' is no text in UTF-8; write one prompt a line.") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"'{file}' holds no prompt; write one a line.")
    return prompts


def _from_shards(
    folder: Path, split: str, field: str, count: int | None
) -> tuple[list[Any], list[int] | None]:
    """Return captions or classes of the first samples of a split, and all classes if they have."""
    shards = ShardSet.open(folder, split)
    extension = "txt" if field == "captions" else "cls"
    if extension not in shards.fields:
        what = "captions (txt)" if field == "captions" else "classes (cls)"
        raise ValueError(f"the generator needs {what}, and the shards in '{folder}' have none.")
    captions: list[str] = []
    labels: list[int] = []
    numbers = range(min(len(shards), count or len(shards)))
    for number in tqdm(numbers, desc="conditions", disable=len(numbers) < _MANY):
        fields = shards.read(number, ("txt", "cls")).fields
        if extension not in fields:
            raise ValueError(f"{shards.describe(number)} has no {extension}; build the set again.")
        captions += [fields["txt"].decode("utf-8").strip()] if "txt" in fields else []
        labels += [int(fields["cls"])] if "cls" in fields else []
    known = labels if len(labels) == len(numbers) else None
    return (captions if field == "captions" else labels), known


def _repeated(values: Sequence[Any], num_samples: int | None, origin: str) -> tuple[Any, ...]:
    """Ask for everything equally often, one after the other."""
    count = len(values)
    if num_samples is None or num_samples <= count:
        return tuple(values[:num_samples])
    if num_samples % count:
        raise ValueError(
            f"`num_samples` must be at most {count}, which {origin} has, or a multiple of it, got "
            f"{num_samples}."
        )
    return tuple(value for value in values for _ in range(num_samples // count))


def what_to_ask(
    num_classes: int | None,
    *,
    num_samples: int | None,
    conditions: Path | None,
    split: str,
) -> Asked:
    """Return what every sample of an evaluation is asked to show.

    Args:
        num_classes: Classes that the generator draws; None draws from text.
        num_samples: How many; None takes one for every condition there is.
        conditions: Folder of shards whose captions or classes are taken, or a text file with one
            prompt a line; None asks for every class equally often.
        split: Split of the shards.

    Raises:
        ValueError: If the generator draws something else, or the numbers do not fit.
    """
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1, got {num_samples}.")
    if conditions is not None and not conditions.exists():
        raise ValueError(
            f"there is nothing at '{conditions}'; `--conditions` must be a folder of shards, or a "
            "text file with one prompt a line."
        )
    if conditions is None:
        if num_classes is None:
            raise ValueError(
                "this generator draws from text: give `--conditions`, a folder of shards with "
                "captions or a text file with one prompt a line."
            )
        if num_samples is None:
            raise ValueError("give `--num_samples`, such as 50000: how many are to be drawn.")
        return balanced_classes(num_classes, num_samples)
    field = "captions" if num_classes is None else "class_labels"
    if conditions.is_dir():
        origin = f"split {split!r} of '{conditions}'"
        values, labels = _from_shards(conditions, split, field, num_samples)
    else:
        origin = f"'{conditions}'"
        if num_classes is not None:
            raise ValueError(
                f"this generator draws classes, and {origin} holds prompts; give a folder of "
                "shards with classes, or leave `--conditions` out."
            )
        values, labels = read_lines(conditions), None
    wrong = sorted({v for v in values if not 0 <= v < num_classes}) if num_classes else []
    if wrong:
        raise ValueError(f"{origin} has classes that the generator does not know: {wrong[:5]}.")
    classes = None if labels is None else _repeated(labels, num_samples, origin)
    return Asked(field, _repeated(values, num_samples, origin), origin, classes)
