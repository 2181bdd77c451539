"""How fast a training runs, and how much of it is waiting for data."""

import time
from typing import Any

import lightning as L


class Throughput(L.Callback):
    """Log `perf/samples_per_second` over all devices and `perf/data_wait`, the share of time in
    which the trainer waited for the next batch; both over the steps since the last log.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._since = time.perf_counter()
        self._batch_end: float | None = None
        self._waited = 0.0
        self._samples = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        self._reset()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget what was counted: validation is no training."""
        self._reset()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Add what passed since the last batch ended."""
        if self._batch_end is not None:
            self._waited += time.perf_counter() - self._batch_end

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count, and log at the trainer's logging steps."""
        self._samples += len(batch["keys"]) * trainer.world_size
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            seconds = time.perf_counter() - self._since
            pl_module.log("perf/samples_per_second", self._samples / seconds)
            pl_module.log("perf/data_wait", self._waited / seconds)
            self._reset()
        self._batch_end = time.perf_counter()
