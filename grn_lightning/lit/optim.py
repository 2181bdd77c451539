"""Optimizers, parameter groups and learning-rate schedules from one configuration.

`adamw` is what the published recipes use. `muon` orthogonalizes the momentum of every matrix
(Jordan et al. 2024) and leaves gains, biases and embeddings to AdamW; in the embedded runs it
needs a fraction of the steps (`experiments/LOG.md`). PyTorch's own Muon takes 2-D parameters only;
here a convolution kernel counts as the matrix `(out, in * taps)`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from grn_lightning.functional.lr import LRSchedule, lr_multiplier
from grn_lightning.functional.orthogonalize import orthogonalize


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How weights are moved. Counts are samples over all devices, so that batch size is free."""

    name: Literal["adamw", "muon"] = "adamw"
    """Optimizer; with "muon" everything that is no matrix is still moved by AdamW."""
    lr: float = 2e-4
    """Learning rate of AdamW."""
    muon_lr: float = 0.02
    """Learning rate of the orthogonalized updates; their spectral norm is about 1."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    momentum: float = 0.95
    """Muon's momentum (Nesterov)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of tensors with two or more axes; gains and biases have none."""
    warmup_samples: int = 0
    """Samples of the linear warm-up."""
    schedule: LRSchedule = "constant"
    """What follows the warm-up."""
    total_samples: int | None = None
    """Samples of the whole training; null asks the trainer: max_steps x global batch size."""
    decay_fraction: float = 1.0
    """Share of the training over which "linear" and "cosine" decay to zero, at its end."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        names, schedules = ("adamw", "muon"), get_args(LRSchedule)
        total, fraction = self.total_samples, self.decay_fraction
        rules = {
            f"`name` must be one of {names}, got {self.name!r}": self.name in names,
            f"`lr` must be positive, got {self.lr}": self.lr > 0,
            f"`muon_lr` must be positive, got {self.muon_lr}": self.muon_lr > 0,
            f"`betas` must be in [0, 1), got {self.betas}": all(0 <= b < 1 for b in self.betas),
            f"`momentum` must be in [0, 1), got {self.momentum}": 0 <= self.momentum < 1,
            f"`weight_decay` must be at least 0, got {self.weight_decay}": self.weight_decay >= 0,
            f"`warmup_samples` must be at least 0, got {self.warmup_samples}": (
                self.warmup_samples >= 0
            ),
            f"`schedule` must be one of {schedules}, got {self.schedule!r}": (
                self.schedule in schedules
            ),
            f"`total_samples` must be positive or null, got {total}": total is None or total > 0,
            f"`decay_fraction` must be in (0, 1], got {fraction}": 0 < fraction <= 1,
        }
        issues = [text for text, is_right in rules.items() if not is_right]
        if issues:
            raise ValueError("OptimConfig: " + "; ".join(issues) + ".")


class Muon(Optimizer):
    """Momentum, orthogonalized; AdamW for groups that say so.

    A group with `use_muon` holds tensors of two or more axes, read as `(out, rest)`. Its update is
    `lr * sqrt(max(1, out / rest)) * orthogonalize(momentum)` (Jordan et al. 2024). Under FSDP every
    process keeps its part of the momentum and gathers it to orthogonalize the whole.

    Args:
        groups: Parameter groups with `params`, `lr`, `weight_decay` and `use_muon`.
        betas: Decay rates of AdamW's moments.
        momentum: Decay rate of Muon's momentum.
        eps: AdamW's denominator offset.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        eps: float = 1e-8,
    ):
        super().__init__(groups, {"betas": betas, "momentum": momentum, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            if group["use_muon"]:
                self._muon(parameters, group)
            else:
                for parameter in parameters:
                    self._adamw(parameter, group)
        return loss

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Move matrices; those of one shape together, which is where the time goes."""
        by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            by_shape[parameter.shape[0], parameter.shape[1:].numel()].append(parameter)
        for (rows, columns), alike in by_shape.items():
            momenta = [whole_tensor(self._momentum(p, group)) for p in alike]
            updates = torch.stack([momentum.view(rows, columns) for momentum in momenta])
            scale = max(1.0, rows / columns) ** 0.5
            for parameter, update in zip(alike, orthogonalize(updates), strict=True):
                whole = update.reshape(parameter.shape)
                parameter.add_(own_part(whole, parameter), alpha=-group["lr"] * scale)

    def _momentum(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Update the momentum and look ahead (Nesterov)."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        return parameter.grad.lerp(state["momentum"], group["momentum"]).contiguous()

    def _adamw(self, parameter: Tensor, group: dict[str, Any]) -> None:
        grad = parameter.grad
        assert grad is not None
        state, (beta_1, beta_2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros(())
            state["mean"] = torch.zeros_like(parameter)
            state["square"] = torch.zeros_like(parameter)
        state["step"] += 1
        step = int(state["step"])
        state["mean"].lerp_(grad, 1 - beta_1)
        state["square"].lerp_(grad.square(), 1 - beta_2)
        denominator = (state["square"] / (1 - beta_2**step)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["mean"], denominator, value=-group["lr"] / (1 - beta_1**step))


def whole_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor of which FSDP has given every process a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """Divide a tensor, which every process has, as FSDP has divided another; nothing is sent."""
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, like.placements)


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Divide the trainable parameters: matrices, embeddings, and vectors without weight decay.

    Args:
        module: Its parameters with `requires_grad` are taken, each once.
        config: Learning rates and weight decay.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `use_muon`; none is empty.
    """
    tables = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    matrices: list[Tensor] = []
    embeddings: list[Tensor] = []
    vectors: list[Tensor] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        # Gains of the tokenizer's norms are stored as (channels, 1, 1, 1): vectors all the same.
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO has divided the parameter
        is_vector = shape.numel() == max(shape, default=1)
        # Learned positions are plain parameters, and tables too: they multiply nothing.
        is_table = id(parameter) in tables or not name.endswith("weight")
        (vectors if is_vector else embeddings if is_table else matrices).append(parameter)
    is_muon = config.name == "muon"
    groups = [
        {"params": matrices, "lr": config.muon_lr if is_muon else config.lr, "use_muon": is_muon},
        {"params": embeddings, "lr": config.lr, "use_muon": False},
        {"params": vectors, "lr": config.lr, "use_muon": False},
    ]
    for group, weight_decay in zip(groups, (config.weight_decay,) * 2 + (0.0,), strict=True):
        group["weight_decay"] = weight_decay
    return [group for group in groups if group["params"]]


class SampleSchedule(LRScheduler):
    """Learning rates as a function of the samples seen.

    There is nothing to store. When a run is resumed, its own configuration and not the checkpoint
    decides about learning rates, decay and momentum, so that the command line can change them.

    Args:
        optimizer: Its groups hold the rates that are multiplied.
        multiplier: Factor at this moment.
    """

    def __init__(self, optimizer: Optimizer, multiplier: Callable[[], float]):
        self.multiplier = multiplier
        self.settings = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of each group."""
        return [settings["lr"] * self.multiplier() for settings in self.settings]

    def refresh(self) -> None:
        """Set the rates of this moment, whether or not the optimizer has taken a step."""
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the samples seen are counted elsewhere."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undo what the optimizer has just read of another configuration."""
        groups = zip(self.optimizer.param_groups, self.settings, self.get_lr(), strict=True)
        for group, settings, lr in groups:
            group.update(settings | {"lr": lr})


def configure_optimizers(
    module: nn.Module,
    config: OptimConfig,
    *,
    total_samples: int | None,
    samples_seen: Callable[[], int],
) -> OptimizerLRSchedulerConfig:
    """Return optimizer and per-step schedule as a LightningModule returns them.

    Args:
        module: What is trained.
        config: How.
        total_samples: Samples of the whole training, if `config.total_samples` does not say.
        samples_seen: Tells the samples trained on so far; asked at every step.

    Raises:
        ValueError: If a decaying schedule has no end.
    """
    total = config.total_samples or total_samples
    groups = parameter_groups(module, config)
    optimizer: Optimizer
    if config.name == "muon":
        optimizer = Muon(groups, betas=config.betas, momentum=config.momentum)
    else:
        plain = [{k: v for k, v in group.items() if k != "use_muon"} for group in groups]
        optimizer = AdamW(plain, betas=config.betas)

    def multiplier() -> float:
        return lr_multiplier(
            samples_seen(),
            warmup_samples=config.warmup_samples,
            total_samples=total,
            schedule=config.schedule,
            decay_fraction=config.decay_fraction,
        )

    schedule = SampleSchedule(optimizer, multiplier)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
