"""What a report tells of a run: its newest checkpoint, evaluations, event files and settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grn_lightning.lit.checkpoints import find_checkpoint
from grn_lightning.scripts.records import read_evaluations
from grn_lightning.scripts.report_curves import History, read_history
from grn_lightning.scripts.runs import STAGES, TrainedRun, open_run


@dataclass(frozen=True)
class Told:
    """All that is known of one run."""

    run: TrainedRun
    """Its newest checkpoint."""
    evaluations: list[dict[str, Any]]
    """The newest evaluation of every set of data, the newest first."""
    history: History | None
    """What it has logged."""
    config: Path | None
    """Its `config.yaml`, if there is one."""

    @property
    def name(self) -> str:
        """Name of the run: of its folder, or of the folder of its versions."""
        folder = self.run.folder.resolve()
        return folder.parent.name if folder.name.startswith("version_") else folder.name

    @property
    def evaluate_command(self) -> str:
        """The command that evaluates it."""
        if self.run.stage in STAGES:
            return f"grn evaluate samples {self._stages}"
        data = self.run.source().get("path", "DATA")
        return f"grn evaluate {self.run.folder} {data}"

    @property
    def _stages(self) -> str:
        """What draws with this stage, and what it may be asked for."""
        found = self.run.configuration
        asked = "--num_samples 50000" if found.get("text_encoder") is None else "--conditions DATA"
        if self.run.stage == "fine":
            return f"STAGE_1 --fine {self.run.folder} {asked}"
        fine = "" if found.get("split") is None else " --fine STAGE_2"
        return f"{self.run.folder}{fine} {asked}"


def find_runs(paths: Sequence[Path]) -> list[TrainedRun]:
    """Return the newest version of every run below some paths, tokenizers last.

    Raises:
        ValueError: If there is none below one of them.
    """
    newest: dict[Path, TrainedRun] = {}
    for path in paths:
        files = [path] if path.is_file() else sorted(path.rglob("last.ckpt"), key=_age)
        for file in files or [find_checkpoint(path)]:
            run = open_run(file)
            is_version = run.folder.name.startswith("version_")
            newest[(run.folder.parent if is_version else run.folder).resolve()] = run
    return sorted(newest.values(), key=lambda run: run.stage == "tokenizer")


def _age(file: Path) -> float:
    return file.stat().st_mtime


def tell(run: TrainedRun) -> Told:
    """Read what a run has left behind."""
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for evaluation in read_evaluations(run.folder):
        newest[evaluation["data"], evaluation["split"]] = evaluation
    configs = sorted(run.folder.rglob("config.yaml"), key=lambda file: len(file.parts))
    return Told(
        run=run,
        evaluations=sorted(newest.values(), key=lambda e: e["date"], reverse=True),
        history=read_history(run.folder),
        config=configs[0] if configs else None,
    )
