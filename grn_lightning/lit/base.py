"""What the LightningModules of both stages share: counting, seeding, optimizer, step logs.

One count rules schedules, axes and names: `samples_seen`, over all devices. Random numbers of a
training step are functions of (seed, samples seen), so that a resumed run is the run that never
stopped.
"""

from abc import ABC
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler, OptimizerLRSchedulerConfig
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from grn_lightning.lit.checkpoints import averaged_state
from grn_lightning.lit.optim import OptimConfig, configure_optimizers
from grn_lightning.lit.strategies import refuse_lightnings_own
from grn_lightning.lit.work import Work

ConfigT = TypeVar("ConfigT")


def as_config(kind: type[ConfigT], value: Any) -> ConfigT:
    """Return a configuration from itself, from the plain data of a checkpoint, or from nothing."""
    if value is None:
        return kind()
    return kind(**value) if isinstance(value, dict) else value


def as_plain(value: Any) -> Any:
    """Return a configuration as plain data, which a checkpoint may hold and load safely."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def require_stage(
    callback: L.Callback, module: L.LightningModule, stage: type[L.LightningModule]
) -> None:
    """Refuse a callback that was given to a run of another stage.

    Raises:
        ValueError: If the module is not of that class.
    """
    if not isinstance(module, stage):
        raise ValueError(
            f"{type(callback).__name__} is for runs of {stage.__name__}, got "
            f"{type(module).__name__}; take it out of `trainer.callbacks`."
        )


class StageModule(L.LightningModule, ABC):
    """Base of the tokenizer stage and the generator stage.

    Attributes:
        averaged: Names of the submodules whose moving average validation, samples and exports use.
        samples_seen: Samples trained on, over all devices.
        seed: Seed of the noise of training.
    """

    averaged: tuple[str, ...] = ()

    def __init__(self, *, optim: OptimConfig | dict[str, Any] | None, seed: int):
        super().__init__()
        self.optim = as_config(OptimConfig, optim)
        self.seed = seed
        self.samples_seen = 0
        self._is_norm_due = False

    def count_samples(self, batch_size: int) -> None:
        """Count a training batch; every device has one of the same size."""
        self.samples_seen += batch_size * self.trainer.world_size

    def work_of(self, batch: Any) -> Work:
        """Return what this device does with a batch; stages that can tell more than its size do."""
        return Work(len(batch["keys"]))

    @property
    def is_logging_step(self) -> bool:
        """Whether the trainer writes the logs of this step; costly ones are made only then.

        To be asked before the optimizer has moved: the step then counts itself.
        """
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool(every) and (self.trainer.global_step + 1) % every == 0

    def configure_callbacks(self) -> Sequence[L.Callback]:
        """Refuse a strategy that would lose the average, before processes are started."""
        refuse_lightnings_own(self.trainer.strategy)
        return []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build optimizer and schedule from `optim`."""
        return self.optimizer_of(self, self.optim)

    def optimizer_of(
        self, module: nn.Module, config: OptimConfig, *, first_sample: int = 0
    ) -> OptimizerLRSchedulerConfig:
        """Return optimizer and schedule of a part, whose training begins at `first_sample`."""
        planned = self._planned_samples()
        return configure_optimizers(
            module,
            config,
            total_samples=None if planned is None else max(1, planned - first_sample),
            samples_seen=lambda: max(0, self.samples_seen - first_sample),
        )

    def _planned_samples(self) -> int | None:
        """Samples of the whole training, if the trainer has a `max_steps`."""
        data = getattr(self.trainer, "datamodule", None)
        if self.trainer.max_steps < 1 or data is None:
            return None
        per_step = data.samples_per_step(self.trainer.world_size)
        return round(self.trainer.max_steps * self.trainer.accumulate_grad_batches * per_step)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed what draws from the global generator (dropout) by the samples seen."""
        mixed = (self.seed * 1_000_003 + self.samples_seen) * 4099 + self.trainer.global_rank
        torch.manual_seed(mixed % 2**63)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the gradient's global norm, before clipping."""
        if not self.is_logging_step:
            return
        self.log("train/samples_seen", float(self.samples_seen))
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            self._is_norm_due = True  # DeepSpeed tells it behind the step
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.log("train/grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the gradient's norm where only DeepSpeed knows it."""
        strategy = self.trainer.strategy
        if self._is_norm_due and isinstance(strategy, DeepSpeedStrategy):
            self._is_norm_due = False
            norm = strategy.deepspeed_engine.get_global_grad_norm()
            if norm is not None:  # gradients that only add up have none yet
                self.log("train/grad_norm", float(norm))

    @property
    def _is_resuming(self) -> bool:
        """Whether a checkpoint that is read now is one to go on training from."""
        return self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the count."""
        checkpoint["samples_seen"] = self.samples_seen

    def _is_of_this_stage(self, hyper_parameters: dict[str, Any]) -> bool:
        """Whether a run with these hyper-parameters was one of this class."""
        return isinstance(hyper_parameters.get(self.averaged[0]), dict)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the count; give the average to whatever does not go on training.

        Lightning restores callbacks, and with them the average, only when training is resumed.

        Raises:
            ValueError: If the checkpoint is one of another stage.
        """
        hyper_parameters = checkpoint.get("hyper_parameters", {})
        if not self._is_of_this_stage(hyper_parameters):
            raise ValueError(
                f"the checkpoint is not one of a {type(self).__name__} run: its hyper-parameters "
                f"are {sorted(hyper_parameters)}. Resume from one that this stage has written."
            )
        self.samples_seen = checkpoint["samples_seen"]
        if self._is_resuming:
            self._refuse_without_moments(checkpoint)
        else:
            checkpoint["state_dict"] = averaged_state(checkpoint)

    def _refuse_without_moments(self, checkpoint: dict[str, Any]) -> None:
        strategy = self.trainer.strategy
        keeps_own = isinstance(strategy, (DeepSpeedStrategy, ModelParallelStrategy))
        if "optimizer_states" not in checkpoint and not keeps_own:
            raise ValueError(
                "the checkpoint was written by several processes together, and the strategy of "
                f"this run, {type(strategy).__name__}, cannot go on from its parts: go on with the "
                "strategy that has written it, or start from its weights by `model.init_from`."
            )
