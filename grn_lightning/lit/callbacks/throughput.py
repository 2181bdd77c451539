"""How fast a training runs, how busy it keeps its devices, and how much of it is waiting."""

import resource
import sys
import time
from dataclasses import astuple
from typing import Any

import lightning as L
import torch

from grn_lightning.lit.devices import peak_rate
from grn_lightning.lit.strategies import asked_precision
from grn_lightning.lit.work import Work


class Throughput(L.Callback):
    """Log speed, utilization and memory at the trainer's logging steps.

    Counts are those of all devices since the last log; validation is left out of the time.

    | tag | meaning |
    |---|---|
    | `perf/samples_per_second` | samples trained on, also on the progress bar |
    | `perf/tokens_per_second` | positions and caption tokens, without padding |
    | `perf/tflops_per_device` | 10^12 operations of the network, forwards and backwards |
    | `perf/utilization` | the same as a share of the device's peak, also on the progress bar |
    | `perf/data_wait` | share of the time between two batches: loading, and saving checkpoints |
    | `perf/fill` | tokens among tokens and padding |
    | `perf/peak_memory_gib` | most memory of a device since the start; on a CPU, of the process |

    Operations are counted as of the model, not of the machine: padding, frozen networks and what
    activation checkpointing computes twice do not count.

    Args:
        peak_tflops: What a device can do, in 10^12 operations per second; null looks the device up,
            and where that is in vain there is no `perf/utilization`.

    Raises:
        ValueError: If `peak_tflops` is not positive.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and peak_tflops <= 0:
            raise ValueError(f"`peak_tflops` must be positive or null, got {peak_tflops}.")
        self.peak_tflops = peak_tflops
        self._last_step = 0
        self._reset()

    def _reset(self) -> None:
        self._since = self._free_since = self._pause_start = time.perf_counter()
        self._waited = self._paused = 0.0
        self._work = Work(0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        self._last_step = trainer.global_step
        self._reset()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock: validation is no training."""
        self._pause_start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._free_since = time.perf_counter()
        self._paused += self._free_since - self._pause_start

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Add what passed since the last batch ended, and what this one will be."""
        self._waited += time.perf_counter() - self._free_since
        self._work = self._work.plus(pl_module.work_of(batch))  # type: ignore[operator]

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log, once for every logging step of the optimizer."""
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and step != self._last_step and step % every == 0:
            self._log(trainer, pl_module)
            self._reset()
        self._last_step = step
        self._free_since = time.perf_counter()

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        seconds = time.perf_counter() - self._since - self._paused
        sums = torch.tensor(
            [*map(float, astuple(self._work)), self._waited / seconds, seconds],
            dtype=torch.float64,
            device=pl_module.device,
        )
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums, reduce_op="sum")
        samples, tokens, capacity, flops, waits, all_seconds = sums.tolist()
        seconds = all_seconds / trainer.world_size
        pl_module.log("perf/samples_per_second", samples / seconds, prog_bar=True)
        pl_module.log("perf/data_wait", waits / trainer.world_size)
        if tokens:
            pl_module.log("perf/tokens_per_second", tokens / seconds)
            pl_module.log("perf/fill", tokens / capacity)
        if flops:
            tflops = flops / all_seconds / 1e12
            pl_module.log("perf/tflops_per_device", tflops)
            if (peak := self._peak(trainer, pl_module)) is not None:
                pl_module.log("perf/utilization", tflops / peak, prog_bar=True)
        pl_module.log("perf/peak_memory_gib", peak_memory(pl_module.device) / 2**30)

    def _peak(self, trainer: L.Trainer, pl_module: L.LightningModule) -> float | None:
        if self.peak_tflops is None:
            rate = peak_rate(pl_module.device, asked_precision(trainer))
            return None if rate is None else rate / 1e12
        return self.peak_tflops


def peak_memory(device: torch.device) -> float:
    """Return the most bytes that tensors had on a CUDA device, or that this process had at all."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(used * (1 if sys.platform == "darwin" else 1024))
