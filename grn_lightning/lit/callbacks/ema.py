"""Exponential moving average of the trained network, under every strategy.

Lightning's own callback copies the whole LightningModule, frozen parts and metrics included, and
loses the average under DeepSpeed. This one keeps float32 shadows of the named submodules only, in
its own state, and changes places with the weights during validation. Where weights are divided
among processes, each process averages its own part, and nothing is sent anywhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor

from grn_lightning.lit.parts import OwnPart, own_parts
from grn_lightning.lit.shards import EMA_STATE


class EMA(L.Callback):
    """Keep the average of the submodules that a module names in `averaged`.

    Args:
        decay: Weight of the old average per optimizer step, in [0, 1).
        warmup: Start with a smaller decay, `(1 + n) / (10 + n)` after n steps, so that short runs
            do not average with their initial weights.

    Raises:
        ValueError: If `decay` is out of range.
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = True):
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be in [0, 1), got {decay}.")
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        self.shadows: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] | None = None
        self._last_step = 0
        self._is_copy = False

    @property
    def state_key(self) -> str:
        """Name of the state in a checkpoint."""
        return EMA_STATE

    def state_dict(self) -> dict[str, Any]:
        """Return the average as plain tensors, named as in the module."""
        return {"shadows": self.shadows, "num_updates": self.num_updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over an average."""
        self.shadows = {name: value.clone() for name, value in state_dict["shadows"].items()}
        self.num_updates = state_dict["num_updates"]
        self._is_copy = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with a copy of the weights, unless an average was restored.

        Raises:
            ValueError: If the module names nothing to average.
        """
        if not _own_parts(pl_module):
            raise ValueError(f"{type(pl_module).__name__} names no submodule to average.")
        self._begin(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin again where a strategy has restored weights or average only after `on_fit_start`.

        The step is noted to start from: a batch that only accumulates gradients is none.
        """
        if self._is_copy:
            self.shadows = {}
        self._begin(pl_module)
        self._last_step = trainer.global_step

    def _begin(self, pl_module: L.LightningModule) -> None:
        self._is_copy = not self.shadows
        for name, part in _own_parts(pl_module).items():
            source = part.master()
            shadow = part.cut(self.shadows[name]) if name in self.shadows else source
            self.shadows[name] = shadow.to(source.device, torch.float32, copy=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Move the average, once per optimizer step."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self.num_updates += 1
        early = (1 + self.num_updates) / (10 + self.num_updates)
        decay = min(self.decay, early) if self.warmup else self.decay
        parts = _own_parts(pl_module)
        shadows = [self.shadows[name] for name in parts]
        torch._foreach_lerp_(shadows, [part.master().float() for part in parts.values()], 1 - decay)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate the average."""
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Train on with the weights."""
        self._swap_out(pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Test the average."""
        self._swap_in(pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the weights back."""
        self._swap_out(pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Predict with the average."""
        self._swap_in(pl_module)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the weights back."""
        self._swap_out(pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Put the weights back, should validation have failed."""
        self._swap_out(pl_module)

    @torch.no_grad()
    def _swap_in(self, pl_module: L.LightningModule) -> None:
        if not self.shadows or self._raw is not None:
            return
        parts = _own_parts(pl_module)
        self._raw = {name: part.weights().clone() for name, part in parts.items()}
        for name, part in parts.items():
            part.weights().copy_(part.cut(self.shadows[name]))

    @torch.no_grad()
    def _swap_out(self, pl_module: L.LightningModule) -> None:
        if self._raw is None:
            return
        for name, part in _own_parts(pl_module).items():
            part.weights().copy_(self._raw[name])
        self._raw = None


def _own_parts(pl_module: L.LightningModule) -> dict[str, OwnPart]:
    """This process's parts of what is trained in the submodules in `averaged`, by name."""
    names = tuple(f"{name}." for name in getattr(pl_module, "averaged", ()))
    return own_parts(pl_module, names)


@contextmanager
def averaged_weights(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """Put the average in place of the weights, on every process, if the run keeps one.

    Validation has it in place already; then nothing happens. All processes have to enter.
    """
    averages = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]
    entered = [average for average in averages if average._raw is None]
    try:
        for average in entered:
            average._swap_in(module)
        yield
    finally:
        for average in entered:
            average._swap_out(module)
