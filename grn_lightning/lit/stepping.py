"""Updates by hand, for a stage with two players whose trainer counts one of them.

Lightning leaves optimizers, clipping and accumulation to a module with several optimizers, and its
`global_step` counts the steps of all of them. Here only one player is counted, by `step`: the other
takes the same way through strategy and precision, past the counter. So `max_steps`, names of
checkpoints, schedules and axes all count updates of the tokenizer.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import lightning as L
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, kw_only=True)
class ProcedureConfig:
    """How an update is computed; what it is, but for clipping and `trains`, does not change."""

    gradient_clip_val: float = 1.0
    """Largest norm of the gradients, of the tokenizer and of each discriminator; 0 for any."""
    micro_batches: int = 1
    """Parts of a batch, one after the other, whose gradients add up: the update of a whole batch
    in the memory of a part. Only batch norm notices: a discriminator judges a part at a time."""
    trains: Literal["all", "decoder"] = "all"
    """What is trained. "decoder" keeps the codes as they are: encoder and quantizer are frozen."""
    activation_checkpointing: bool = False
    """Compute residual blocks once more on the way back instead of keeping their activations."""
    compile: str | None = None
    """Backend of torch.compile for encoder and decoder, such as "inductor"; null does not."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        rules = {
            f"`gradient_clip_val` must be at least 0, got {self.gradient_clip_val}": (
                self.gradient_clip_val >= 0
            ),
            f"`micro_batches` must be at least 1, got {self.micro_batches}": (
                self.micro_batches >= 1
            ),
            f"`trains` must be 'all' or 'decoder', got {self.trains!r}": (
                self.trains in ("all", "decoder")
            ),
        }
        issues = [text for text, is_right in rules.items() if not is_right]
        if issues:
            raise ValueError("ProcedureConfig: " + "; ".join(issues) + ".")


def refuse_trainer_flags(trainer: L.Trainer) -> None:
    """Refuse what a trainer cannot do for two optimizers, and say where it is set instead.

    Raises:
        ValueError: If clipping, accumulation, strategy or precision are not for this stage.
    """
    issues = []
    if trainer.gradient_clip_val:
        issues.append(
            f"`trainer.gradient_clip_val` is {trainer.gradient_clip_val}, but this stage clips by "
            "itself: set it to null and use `model.procedure.gradient_clip_val`"
        )
    if trainer.accumulate_grad_batches != 1:
        issues.append(
            f"`trainer.accumulate_grad_batches` is {trainer.accumulate_grad_batches}, but a batch "
            "is an update here: raise `batch_size` of the sources and split it by "
            "`model.procedure.micro_batches`"
        )
    is_sharded = isinstance(trainer.strategy, DeepSpeedStrategy)  # which is a kind of DDP
    if is_sharded or not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
        issues.append(
            f"strategy {type(trainer.strategy).__name__} takes a single optimizer; set "
            "`trainer.strategy` to ddp or auto"
        )
    if str(trainer.precision) not in ("32-true", "64-true", "bf16-mixed"):
        issues.append(
            f"`trainer.precision` is {trainer.precision}, but two players share no loss scaling, "
            "and weights stay in float32: take bf16-mixed or 32-true"
        )
    if issues:
        raise ValueError("the tokenizer stage: " + "; ".join(issues) + ".")


def parts_of(clips: Tensor, number: int) -> Iterator[tuple[Tensor, float]]:
    """Yield the micro-batches of a batch and the share that each has of it."""
    for part in clips.tensor_split(min(number, len(clips))):
        yield part, len(part) / len(clips)


def unsynchronized(trainer: L.Trainer, *, is_last: bool) -> AbstractContextManager[None]:
    """Keep processes from adding up gradients before the last micro-batch has been seen."""
    if is_last or not isinstance(trainer.strategy, ParallelStrategy):
        return nullcontext()
    return trainer.strategy.block_backward_sync()


def clip(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Return the norm of all gradients together, and shorten them if it exceeds `largest` > 0."""
    return nn.utils.clip_grad_norm_(parameters, largest if largest > 0 else float("inf"))


def step(module: L.LightningModule, optimizer: LightningOptimizer, *, is_counted: bool) -> None:
    """Move the parameters and forget their gradients; the trainer counts the step or does not."""
    if is_counted:
        optimizer.step()
    else:
        module.trainer.strategy.optimizer_step(optimizer.optimizer, closure=lambda: None)
    optimizer.zero_grad()


def checkpoint_activations(network: nn.Module, kind: type[nn.Module]) -> None:
    """Make every module of a kind compute its activations once more on the way back.

    Names of parameters stay as they are.
    """
    for module in network.modules():
        if isinstance(module, kind):
            # Nothing in there draws random numbers.
            again = partial(
                checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False
            )
            object.__setattr__(module, "forward", again)
