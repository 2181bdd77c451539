"""What the benches share: a quiet training of some hundred steps, records, means over seeds."""

import json
import logging
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tqdm import tqdm

from grn_lightning.lit.callbacks import EMA
from grn_lightning.scripts.runs import choose_device

RESULT_FILE = "result.json"
"""Record of a finished arm, in its folder."""

_WARM_UP = 5  # steps that are not timed
RecordT = TypeVar("RecordT")


class Pace(L.Callback):
    """Moves a progress bar and notes how long updates take."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar
        self.seconds: list[float] = []
        self._since = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Note an update."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self._since = now
        self.bar.update()

    @property
    def milliseconds(self) -> float:
        """Median over updates without the first ones."""
        return 1000 * statistics.median(self.seconds[_WARM_UP:] or self.seconds)


def require_bench(output: Path) -> None:
    """Refuse to put a bench among files of somebody else.

    Raises:
        ValueError: If the folder is none, or holds files and no bench.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    begun = ("bench.json", "codes", "*/seed*", "*/m*/seed*")
    if not output.is_dir() or not any(True for one in begun for _ in output.glob(one)):
        raise ValueError(
            f"the folder of a bench must be new, empty, or that of a bench; '{output}' is not."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's words about every trainer off the progress bar; warnings remain."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # lightning's own
            yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True, kw_only=True)
class BriefTraining:
    """How an arm is trained by the real trainer, without checkpoints on the way."""

    folder: Path
    """Takes the events."""
    max_steps: int
    """Updates."""
    ema_decay: float
    """Decay of the averaged weights."""
    device: str
    """ "auto", "cpu" or "cuda"."""
    checkpoint: Path | None = None
    """Where the last state is stored; None stores nothing."""

    def fit(self, module: L.LightningModule, data: L.LightningDataModule, bar: tqdm) -> Pace:
        """Train a module, and leave it with averaged weights; a bar moves at every update."""
        pace, average = Pace(bar), EMA(self.ema_decay)
        with quiet():
            trainer = L.Trainer(
                accelerator=choose_device(self.device).type,
                devices=1,
                max_steps=self.max_steps,
                max_epochs=-1,
                limit_val_batches=0,
                logger=TensorBoardLogger(self.folder, name="", version="", default_hp_metric=False),
                log_every_n_steps=min(20, self.max_steps),
                callbacks=[average, pace],
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
            )
            trainer.fit(module, data)
            if self.checkpoint is not None:
                trainer.save_checkpoint(self.checkpoint)
        module.load_state_dict(module.state_dict() | average.shadows)
        return pace


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds."""

    values: tuple[float, ...]
    """One per seed."""

    @property
    def mean(self) -> float:
        """Mean."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation; None of a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def text(self, digits: int) -> str:
        """Return it as a person reads it."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


def cell(spread: Spread | None, digits: int) -> str:
    """Return a number of a table; "-" where it is not defined."""
    return "-" if spread is None else spread.text(digits)


def as_json(value: Any) -> Any:
    """Return plain data as JSON returns it: tuples are lists, paths are text."""
    return json.loads(json.dumps(value, default=str))


def read_record(file: Path, kind: type[RecordT]) -> RecordT | None:
    """Return the record of an arm, if it was finished.

    Raises:
        ValueError: If the file is none that this version has written.
    """
    if not file.is_file():
        return None
    try:
        return kind(**json.loads(file.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"'{file}' is no result of this version ({error}); give another output folder."
        ) from error
