"""What to change in a training that does not fit, the least change first."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from grn_lightning.lit.devices import Device
from grn_lightning.lit.memory import StepMemory
from grn_lightning.lit.rehearsal import Rehearsal
from grn_lightning.scripts.plan_settings import Training
from grn_lightning.scripts.plan_strategies import device_memory

_SLOWER = {
    "single": 1.0,
    "ddp": 1.0,
    "deepspeed_zero1": 1.02,
    "deepspeed_zero2": 1.05,
    "fsdp": 1.15,
    "deepspeed_zero3": 1.2,
    "deepspeed_zero2_offload": 1.8,
    "deepspeed_zero3_offload": 2.5,
}
"""Rough order of what strategies cost in time; it ranks advice and enters no figure."""
_AGAIN = 4.0 / 3.0
_PART = 1.04  # smaller products keep a device less busy
_MOST = 3


@dataclass(frozen=True)
class Choice:
    """How a training is divided."""

    strategy: str
    """Name of the strategy."""
    training: Training
    """With its micro-batches."""


@dataclass(frozen=True)
class Advice:
    """A change that makes a training fit."""

    changes: tuple[str, ...]
    """What to set."""
    peak: float
    """Bytes of a device with it."""

    def __str__(self) -> str:
        """Return one line."""
        what = ", ".join(self.changes) or "nothing"
        return f"{self.peak / 2**30:7.1f} GiB  {what}"


@dataclass(frozen=True)
class _Variant:
    strategy: str
    is_checkpointed: bool
    parts: int

    @property
    def slowness(self) -> float:
        again = _AGAIN if self.is_checkpointed else 1.0
        return _SLOWER[self.strategy] * again * _PART ** (self.parts.bit_length() - 1)


def _variants(choice: Choice, world_size: int, optimizer: str) -> Iterator[_Variant]:
    smallest = min(source.sizes.samples for source in choice.training.sources)
    strategies = [choice.strategy]
    if world_size > 1:
        strategies += ["deepspeed_zero2", "fsdp", "deepspeed_zero3"]
    strategies += ["deepspeed_zero2_offload", "deepspeed_zero3_offload"]
    if optimizer == "muon":  # ZeRO cuts the matrices that Muon needs whole
        strategies = [one for one in strategies if not one.startswith("deepspeed")]
    was = choice.training.step.is_checkpointed
    for strategy in dict.fromkeys(strategies):
        for again in {was, True}:
            parts = 1
            while parts <= smallest:
                yield _Variant(strategy, again, parts)
                parts *= 2


def advise(
    rehearsal: Rehearsal, choice: Choice, step: StepMemory, world_size: int, device: Device
) -> tuple[Advice, ...]:
    """Return what makes a training fit, the cheapest in time first; empty if nothing does.

    Args:
        rehearsal: The stage.
        choice: What does not fit.
        step: Memory of its step on a single device.
        world_size: Number of devices.
        device: What it is to fit.
    """
    training = choice.training
    was = training.step.is_checkpointed
    steps = {was: step}
    if not was:
        sizes = max((s.sizes for s in training.sources), key=lambda one: _pixels(one.samples, one))
        again = replace(training.step, is_checkpointed=True)
        steps[True] = rehearsal.measure(sizes, again)
    blocks, found, kinds = rehearsal.blocks(), list[Advice](), set[tuple[str, bool]]()
    variants = sorted(
        _variants(choice, world_size, rehearsal.optim.name), key=lambda one: one.slowness
    )
    for variant in variants:
        kind = (variant.strategy, variant.is_checkpointed)
        if kind in kinds:  # smaller parts than are needed
            continue
        smaller = _scaled(steps[variant.is_checkpointed], variant.parts)
        memory = device_memory(smaller, variant.strategy, world_size, blocks)
        if memory.peak <= device.usable:
            found.append(Advice(_changes(variant, choice), memory.peak))
            kinds.add(kind)
        if len(found) == _MOST:
            break
    return tuple(found)


def _pixels(samples: int, sizes: object) -> int:
    frames, height, width = sizes.size  # type: ignore[attr-defined]
    return samples * frames * height * width


def _scaled(step: StepMemory, parts: int) -> StepMemory:
    """Return the step of a smaller micro-batch: activations go with its samples."""
    compute = step.states + step.activations // parts
    return replace(step, compute=compute, update=min(step.update, max(compute, step.update)))


def _smaller(training: Training, parts: int) -> str:
    """Say what makes micro-batches smaller; of packs `batch_size` is that of validation."""
    if training.token_budget is not None:
        return f"data.init_args.token_budget: {training.token_budget // parts}"
    sizes = [-(-source.sizes.samples // parts) for source in training.sources]
    return f"batch_size: {', '.join(map(str, dict.fromkeys(sizes)))}"


def _changes(variant: _Variant, choice: Choice) -> tuple[str, ...]:
    training, changes = choice.training, []
    if variant.strategy != choice.strategy:
        changes.append(f"trainer.strategy: {variant.strategy}")
    if variant.is_checkpointed and not training.step.is_checkpointed:
        changes.append("model.init_args.activation_checkpointing: true")
    if variant.parts > 1:
        number = training.step.micro_batches * variant.parts
        changes.append(_smaller(training, variant.parts))
        changes.append(f"trainer.accumulate_grad_batches: {number}")
    return tuple(changes)
