"""`grn report`: one self-contained page about trained runs."""

from dataclasses import dataclass
from pathlib import Path

from grn_lightning.datasets.manifest import atomic_file
from grn_lightning.scripts.report_page import GENERATOR
from grn_lightning.scripts.report_runs import find_runs, tell
from grn_lightning.scripts.report_sections import build_page

_OUT = Path("runs/report.html")


@dataclass(frozen=True)
class WrittenReport:
    """Where the page lies."""

    file: Path
    """The page."""
    num_bytes: int
    """Its size."""
    runs: tuple[Path, ...]
    """Folders of the runs it tells of."""

    def __str__(self) -> str:
        """Say what to open."""
        names = ", ".join(map(str, self.runs))
        return f"report of {names}: open '{self.file}' ({self.num_bytes / 1e6:.1f} MB)"


def _check_out(out: Path) -> None:
    """Refuse to write over a file that is no report."""
    if not out.exists():
        return
    if not out.is_file() or f'content="{GENERATOR}"' not in out.read_text(errors="replace")[:2000]:
        raise ValueError(f"`out` '{out}' exists and is no report; give another name.")


def report(runs: list[Path] | Path, *, out: Path = _OUT) -> WrittenReport:
    """Write one self-contained page about trained runs.

    It opens with the samples of the last evaluation and their captions; then come the numbers with
    their protocol, reconstructions, curves of the training, and how all of it was made. What was
    not evaluated yet is left out, with the command that makes it. A report that is already there
    is written anew.

    Args:
        runs: Folders of runs, or one that holds them all; the newest version of each run is told.
        out: The HTML file.

    Raises:
        ValueError: If there is no checkpoint below one of the folders, or `out` is something else.
    """
    _check_out(out)
    stories = [tell(run) for run in find_runs(runs if isinstance(runs, list) else [runs])]
    data = build_page(stories).html().encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as stream:
        stream.write(data)
    return WrittenReport(out, len(data), tuple(told.run.folder for told in stories))
