"""Exponential moving average of the trained network, for every strategy that keeps whole weights.

Lightning's own callback copies the whole LightningModule, frozen parts and metrics included, and
loses the average under DeepSpeed. This one keeps float32 shadows of the named submodules only, in
its own state, and changes places with the weights during validation.
"""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from grn_lightning.lit.checkpoints import EMA_STATE


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

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with a copy of the weights, unless an average was restored."""
        sources = _averaged_parameters(pl_module)
        if not sources:
            raise ValueError(f"{type(pl_module).__name__} names no submodule to average.")
        for name, source in sources.items():
            shadow = self.shadows.get(name, source.detach())
            self.shadows[name] = shadow.to(source.device, torch.float32, copy=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the step to start from: a batch that only accumulates gradients is none."""
        self._last_step = trainer.global_step

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
        sources = _averaged_parameters(pl_module)
        shadows = [self.shadows[name] for name in sources]
        torch._foreach_lerp_(shadows, [p.detach().float() for p in sources.values()], 1 - decay)

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
        parameters = _averaged_parameters(pl_module)
        self._raw = {name: p.detach().clone() for name, p in parameters.items()}
        for name, parameter in parameters.items():
            parameter.copy_(self.shadows[name])

    @torch.no_grad()
    def _swap_out(self, pl_module: L.LightningModule) -> None:
        if self._raw is None:
            return
        for name, parameter in _averaged_parameters(pl_module).items():
            parameter.copy_(self._raw[name])
        self._raw = None


def _averaged_parameters(pl_module: L.LightningModule) -> dict[str, nn.Parameter]:
    """Trainable parameters of the submodules in `averaged`, by their name in the module."""
    names = tuple(f"{name}." for name in getattr(pl_module, "averaged", ()))
    return {
        name: parameter
        for name, parameter in pl_module.named_parameters()
        if name.startswith(names) and parameter.requires_grad
    }
