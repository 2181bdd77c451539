"""What of a training step one device holds under each strategy.

The step of a single device is found by taking it (`lit/memory.py`). What a strategy divides among
processes and adds for their talk is told here, from its settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grn_lightning.lit.memory import StepMemory
from grn_lightning.lit.rehearsal import Blocks

_FLOAT = 4
_ZERO_BUCKETS = 2 * 200_000_000 * _FLOAT
"""Two buckets of gradients that overlap, of the size that Lightning's strategy sets."""
_ZERO_LIVE = 1_000_000_000 * _FLOAT
"""Most gathered weights that DeepSpeed keeps for the way back (`stage3_max_live_parameters`)."""

PLANNED = (
    "single",
    "ddp",
    "deepspeed_zero1",
    "deepspeed_zero2",
    "deepspeed_zero2_offload",
    "deepspeed_zero3",
    "deepspeed_zero3_offload",
    "fsdp",
)
"""Strategies that a plan can be made for."""

_SAME = {
    "auto": "ddp",
    "zero1": "deepspeed_zero1",
    "zero2": "deepspeed_zero2",
    "zero3": "deepspeed_zero3",
    "zero2_offload": "deepspeed_zero2_offload",
    "zero3_offload": "deepspeed_zero3_offload",
    "offload": "deepspeed_zero2_offload",
    "deepspeed": "deepspeed_zero2",
    "deepspeed_stage_1": "deepspeed_zero1",
    "deepspeed_stage_2": "deepspeed_zero2",
    "deepspeed_stage_2_offload": "deepspeed_zero2_offload",
    "deepspeed_stage_3": "deepspeed_zero3",
    "deepspeed_stage_3_offload": "deepspeed_zero3_offload",
    "fsdp_full": "fsdp",
    "FSDP": "fsdp",
    "DDPStrategy": "ddp",
    "single_device": "single",
}


def strategy_name(setting: str | Mapping[str, Any] | None) -> str:
    """Return the name of what `trainer.strategy` says.

    Args:
        setting: A name, a class with its arguments, or nothing.
    """
    if not isinstance(setting, Mapping):
        return setting or "auto"
    kind, arguments = setting["class_path"].rpartition(".")[2], setting.get("init_args") or {}
    if kind != "ZeRO":
        return kind
    return f"deepspeed_zero{arguments.get('stage', 2)}" + "_offload" * bool(
        arguments.get("offload")
    )


def planned_name(strategy: str, world_size: int) -> str:
    """Return the strategy of `PLANNED` that a name means.

    Raises:
        ValueError: If it means none, or several devices are to be one.
    """
    name = _SAME.get(strategy, strategy)
    name = name.split("_find_unused")[0]
    if name not in PLANNED:
        raise ValueError(
            f"a plan for strategy {strategy!r} cannot be made; known are {', '.join(PLANNED)}."
        )
    if name == "single" and world_size > 1:
        raise ValueError(f"strategy 'single' has one device, got `world_size` {world_size}.")
    return "single" if name == "ddp" and world_size == 1 else name


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one device at the moment when it holds most."""

    parameters: float
    """Of the trained networks."""
    frozen: float
    """Of the tokenizer, and of a text encoder that computes on the device."""
    gradients: float
    """All that are kept."""
    optimizer: float
    """State of the optimizer, and float32 copies where the strategy makes some."""
    average: float
    """Moving average."""
    activations: float
    """What forward, backward and update need above all that."""
    communication: float
    """Buckets of gradients and gathered weights."""
    host: float = 0.0
    """In the memory of the host instead, per device."""

    @property
    def peak(self) -> float:
        """Everything on the device."""
        return sum(part for _, part in self.rows())

    def rows(self) -> list[tuple[str, float]]:
        """Names and bytes of the parts on the device."""
        return [
            ("parameters", self.parameters),
            ("frozen networks", self.frozen),
            ("gradients", self.gradients),
            ("optimizer state", self.optimizer),
            ("moving average", self.average),
            ("activations, temporaries", self.activations),
            ("communication", self.communication),
        ]


def device_memory(step: StepMemory, strategy: str, world_size: int, blocks: Blocks) -> DeviceMemory:
    """Return what one of `world_size` devices holds.

    Args:
        step: Of a single device.
        strategy: One of `PLANNED`.
        world_size: Number of processes.
        blocks: Units of gathering.
    """
    whole, part = 1.0, 1.0 / world_size
    above: float = max(0, step.peak - step.states)
    if strategy in ("single", "ddp"):
        # DDP adds up gradients in buckets beside them.
        talk = step.gradients if strategy == "ddp" else 0
        return _divided(step, (whole, whole, whole, whole), above, talk)
    compute = step.activations
    if strategy == "fsdp":
        update = max(0, step.update - step.states) * part
        talk = 4 * blocks.largest + 2 * blocks.outside
        return _divided(step, (part, part, part, part), max(compute, update), talk)
    update = max(0, step.update - step.states) * part
    above = max(compute, update)
    stage = int(strategy.removeprefix("deepspeed_zero")[0])
    shares = {
        1: (whole, whole, part, whole),
        2: (whole, part, part, whole),
        3: (part, part, part, part),
    }[stage]
    gathered = min(step.parameters, _ZERO_LIVE) if stage == 3 else 0
    memory = _divided(step, shares, above, _ZERO_BUCKETS + gathered)
    copies = step.parameters * part  # the float32 weights that the optimizer moves
    host = 0.0
    if strategy.endswith("_offload"):
        host = memory.optimizer + memory.gradients + copies
        parameters = memory.parameters
        if stage == 3:
            host, parameters = host + parameters, 0.0
        return DeviceMemory(
            parameters, memory.frozen, 0.0, 0.0, memory.average, above, memory.communication, host
        )
    return DeviceMemory(
        memory.parameters, memory.frozen, memory.gradients, memory.optimizer + copies,
        memory.average, above, memory.communication,
    )  # fmt: skip


def _divided(
    step: StepMemory, shares: tuple[float, float, float, float], above: float, talk: float
) -> DeviceMemory:
    """Hold shares of parameters, gradients, optimizer and average."""
    parameters, gradients, optimizer, average = shares
    return DeviceMemory(
        parameters=step.parameters * parameters,
        frozen=float(step.frozen),
        gradients=step.gradients * gradients,
        optimizer=step.optimizer * optimizer,
        average=step.average * average,
        activations=above,
        communication=talk,
    )
