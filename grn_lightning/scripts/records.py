"""What was measured and how: figures with their protocol, and the files that keep them."""

import dataclasses
import inspect
import json
import math
import os
import platform
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from grn_lightning.datasets.manifest import write_json

EVALUATION_FILE = "evaluation.json"
"""Name of a run's list of evaluations."""

_FORMAT = 1
_PACKAGES = (
    "grn-lightning",
    "torch",
    "torchvision",
    "lightning",
    "torchmetrics",
    "torch-fidelity",
    "open-clip-torch",
    "av",
)
_PERCENT = "%"


@dataclass(frozen=True)
class Figure:
    """A number that is never printed without how it came about."""

    name: str
    """What was measured, such as "PSNR"."""
    protocol: tuple[str, ...]
    """With what, on how many samples, of which split."""
    value: float
    """The number; shares are in [0, 1]."""
    unit: str = ""
    """Unit; "%" shows a share as a percentage."""
    meaning: str = ""
    """One line for a reader who meets the name for the first time."""
    measured: Mapping[str, Any] | None = None
    """For a distance, `Measurement.as_dict()`: the whole protocol, and caveats."""

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a reader should know before comparing the number, a sentence each."""
        return () if self.measured is None else tuple(self.measured["caveats"])

    @property
    def tag(self) -> str:
        """Name and protocol, such as "FID[digits-cnn,200,val]"."""
        return f"{self.name}[{','.join(self.protocol)}]"

    @property
    def text(self) -> str:
        """The number as a person reads it, with its unit."""
        if math.isnan(self.value):
            return "not defined"
        if self.unit == _PERCENT:
            return f"{100 * self.value:.1f} %"
        digits = 2 if abs(self.value) < 100 else 1
        return f"{self.value:.{digits if abs(self.value) >= 1 else 3}f} {self.unit}".rstrip()


@dataclass(frozen=True)
class Picture:
    """A file for people to look at."""

    file: str
    """Path relative to the run's folder."""
    kind: str
    """ "sheet", "strip" or "sample"."""
    caption: str
    """What it shows."""
    reading: str = ""
    """What the judge reads from it, for a sample."""
    is_right: bool | None = None
    """Whether that is what was asked for."""


@dataclass(frozen=True)
class Findings:
    """What the evaluation of one stage has found."""

    figures: list[Figure]
    """The numbers, the most important ones first."""
    pictures: list[Picture]
    """What to look at."""
    by_rounds: list[Figure] = field(default_factory=list)
    """For a tokenizer: PSNR of decoding 1, 2, ... rounds."""
    codes: dict[str, float] = field(default_factory=dict)
    """For a tokenizer: how well the codes use their bits."""
    rounds: list[dict[str, Any]] = field(default_factory=list)
    """For a tokenizer: bits per pixel and all scores of 1, 2, ... rounds; 0 is unquantized."""
    left_out: list[str] = field(default_factory=list)
    """What could not be judged, and why."""


# --- how it came about ----------------------------------------------------------------------------


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def environment(device: torch.device) -> dict[str, str]:
    """Return versions of the packages that matter, and the machine, as plain texts."""
    facts = {package: _version(package) for package in _PACKAGES}
    facts |= {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores; threads: {torch.get_num_threads()}",
    }
    if device.type == "cuda":
        facts["gpu"] = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return facts


def code_version() -> dict[str, Any]:
    """Return version and, in a checkout, commit of this package, and whether it was changed since.

    An installed package has no commit.
    """
    here = Path(__file__).parents[2]
    facts: dict[str, Any] = {"version": _version("grn-lightning")}
    if not (here / ".git").exists():
        return facts
    try:
        commit = _git(here, "rev-parse", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no", "--", "grn_lightning")
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout of somebody else
        return facts
    return facts | {"commit": commit, "changed": bool(changed)}


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return json.dumps([_as_json(item) for item in value], ensure_ascii=False)
    return str(value)


def _as_json(value: Any) -> Any:
    return value if isinstance(value, int | float) else str(value)


def command_line(tool: Callable[..., Any], given: Mapping[str, Any]) -> str:
    """Return the command that calls a tool again, with the options that are not at their default.

    Args:
        tool: Function of a sub-command of `grn`.
        given: What it was called with; configurations become one option per field.

    Example:
        >>> def draw(run: str, *, seed: int = 0, size: int = 32): ...
        >>> command_line(draw, {"run": "a b", "seed": 3, "size": 32})
        "grn draw 'a b' --seed=3"
    """
    words = ["grn", *tool.__name__.split("_")]
    for name, parameter in inspect.signature(tool).parameters.items():
        value, default = given[name], parameter.default
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            many = default is inspect.Parameter.empty and isinstance(value, list)
            words += [*map(str, value)] if many else [] if value is None else [_plain(value)]
        elif dataclasses.is_dataclass(value):
            prefix = "" if name == "config" else f"{name}."  # whose fields are options themselves
            words += _field_options(prefix, value, default)
        elif value != default:
            words.append(f"--{name}={_plain(value)}")
    return shlex.join(words)


def _field_options(prefix: str, value: Any, default: Any) -> list[str]:
    """Return an option for every field of a configuration that is not as in another one."""
    words = []
    for one in dataclasses.fields(value):
        a, b = getattr(value, one.name), getattr(default, one.name)
        if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
            words += _field_options(f"{prefix}{one.name}.", a, b)
        elif a != b:
            words.append(f"--{prefix}{one.name}={_plain(a)}")
    return words


# --- evaluation.json ------------------------------------------------------------------------------


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Return the evaluations of a run, oldest first; none if there is no file.

    Raises:
        ValueError: If the file is not one that `grn evaluate` has written.
    """
    file = folder / EVALUATION_FILE
    if not file.is_file():
        return []
    try:
        content = json.loads(file.read_text())
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']} instead of {_FORMAT}")
        return content["evaluations"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"'{file}' is not a list of evaluations of this version ({error}); move it away and "
            "evaluate again."
        ) from error


def add_evaluation(folder: Path, record: Mapping[str, Any]) -> Path:
    """Append an evaluation to those of a run; earlier ones stay."""
    evaluations = [*read_evaluations(folder), dict(record)]
    folder.mkdir(parents=True, exist_ok=True)  # beside an export there is none yet
    write_json(folder / EVALUATION_FILE, {"format": _FORMAT, "evaluations": evaluations})
    return folder / EVALUATION_FILE


def figures_as_json(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """Return figures as plain data, their tag included; what is not defined becomes null."""
    return [
        asdict(figure)
        | {"tag": figure.tag, "value": None if math.isnan(figure.value) else figure.value}
        for figure in figures
    ]


def figures_from_json(rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Return what `figures_as_json` has made plain."""
    return [
        Figure(
            name=row["name"],
            protocol=tuple(row["protocol"]),
            value=math.nan if row["value"] is None else row["value"],
            unit=row["unit"],
            meaning=row["meaning"],
            measured=row.get("measured"),  # older files lack it
        )
        for row in rows
    ]
