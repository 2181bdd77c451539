"""The tool behind `grn plan`: what a training will need, before the first GPU hour."""

import json as json_format
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from grn_lightning.lit.devices import Device, described, find_device
from grn_lightning.lit.memory import StepMemory
from grn_lightning.lit.rehearsal import TEXT_TOKENS, Rehearsal
from grn_lightning.scripts.plan_advice import Advice, Choice, advise
from grn_lightning.scripts.plan_estimates import (
    Disk,
    Rates,
    Speed,
    batch_work,
    disk_of,
    expected_rates,
    speed_of,
)
from grn_lightning.scripts.plan_settings import (
    Training,
    as_training,
    model_of,
    read_settings,
    trained_tokenizer,
)
from grn_lightning.scripts.plan_strategies import DeviceMemory, device_memory, planned_name

_GIB = 2.0**30


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Where the training is to run, and what is assumed."""

    device: str = "H100"
    """H100, H200, A100, A100-40, L40S, 4090, or cpu for this machine."""
    world_size: int | None = None
    """Devices over all machines; null takes those of the files, or one."""
    strategy: str | None = None
    """single, ddp, zero1, zero2, zero3, with `_offload`, or fsdp; null takes that of the files."""
    memory: float | None = None
    """GiB of the device, if not those of the table."""
    tflops: float | None = None
    """Operations per second of the device in 10^12, if not those of the table."""
    utilization: float = 0.4
    """Share of these operations that the training reaches."""
    measure: bool = False
    """Take a few steps on this machine's CPU, and plan with the rate that they reach."""
    price: float | None = None
    """Money per device and hour."""
    checkpointing: bool | None = None
    """Activation checkpointing; null takes what the files say."""
    text_tokens: int = TEXT_TOKENS
    """Tokens of a caption, where the text encoder does not fix them."""
    json: Path | None = None
    """File to write the plan to as well."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        rules = {
            f"`utilization` must be in (0, 1], got {self.utilization}": 0 < self.utilization <= 1,
            f"`world_size` must be at least 1, got {self.world_size}": (
                self.world_size is None or self.world_size >= 1
            ),
            f"`text_tokens` must be at least 1, got {self.text_tokens}": self.text_tokens >= 1,
        }
        positive = {"memory": self.memory, "tflops": self.tflops, "price": self.price}
        for name, value in positive.items():
            rules[f"`{name}` must be positive, got {value}"] = value is None or value > 0
        issues = [text for text, is_right in rules.items() if not is_right]
        if issues:
            raise ValueError("plan: " + "; ".join(issues) + ".")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training needs; prints as tables."""

    title: str
    """Files it was made of."""
    device: Device
    """Where it is to run."""
    world_size: int
    """How many of them."""
    strategy: str
    """How the work is divided."""
    precision: str
    """Of the step."""
    parameters: dict[str, int]
    """Parameters of each network."""
    batches: dict[str, str]
    """Micro-batch of each source, in words."""
    micro_batches: int
    """Micro-batches of a step."""
    memory: DeviceMemory
    """Of one device, for the largest source."""
    speed: Speed
    """Of all devices."""
    rate: str
    """Where the speed comes from."""
    max_steps: int
    """Steps of the training; -1 for no end."""
    price: float | None
    """Money per device and hour."""
    disk: Disk
    """Checkpoints and caches."""
    advice: tuple[Advice, ...]
    """What to change, the least first; of one that fits, nothing."""
    notes: tuple[str, ...]
    """What was assumed."""

    @property
    def fits(self) -> bool:
        """Whether the peak is within what tensors can have."""
        return self.memory.peak <= self.device.usable

    @property
    def hours(self) -> float | None:
        """Of the whole training."""
        steps = self.max_steps
        return None if steps < 1 else steps * self.speed.seconds_per_step / 3600

    @property
    def cost(self) -> float | None:
        """Of the whole training, in money."""
        if self.hours is None or self.price is None:
            return None
        return self.hours * self.world_size * self.price

    def plain(self) -> dict[str, Any]:
        """Return it as plain data."""
        derived = {"fits": self.fits, "hours": self.hours, "cost": self.cost}
        memory = {"peak": self.memory.peak, "usable": self.device.usable}
        return asdict(self) | derived | {"memory": asdict(self.memory) | memory}

    def __str__(self) -> str:
        """Return tables that a person can read."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        devices = f"{self.world_size} x {self.device.name}"
        yield f"{self.title}: {devices}, {self.strategy}, {self.precision}"
        yield ""
        for name, number in self.parameters.items():
            yield _row(name, f"{number / 1e6:,.1f} M parameters")
        for name, text in self.batches.items():
            yield _row(f"source {name}", text)
        yield ""
        yield from self._memory_lines()
        yield ""
        yield from self._time_lines()
        yield ""
        yield _row("a checkpoint", _size(self.disk.checkpoint))
        total = "" if self.disk.code_cache is None else f", {_size(self.disk.code_cache)} in all"
        yield _row("cached codes", f"{_size(self.disk.codes)} a sample{total}")
        if self.disk.text:
            yield _row("cached captions", f"{_size(self.disk.text)} a caption")
        for number, one in enumerate(self.advice):
            yield (
                "\nto make it fit, the least change first:\n" if number == 0 else ""
            ) + f"  {one}"
        for number, note in enumerate(self.notes):
            yield ("\n" if number == 0 else "") + f"note: {note}"

    def _memory_lines(self) -> Iterator[str]:
        for name, size in self.memory.rows():
            if size:
                yield _row(name, f"{size / _GIB:9.3f} GiB")
        verdict = "fits" if self.fits else "DOES NOT FIT"
        room = f"{self.device.usable / _GIB:.1f} GiB usable"
        yield _row("peak of a device", f"{self.memory.peak / _GIB:9.3f} GiB of {room}: {verdict}")
        if self.memory.host:
            yield _row("host, per device", f"{self.memory.host / _GIB:9.3f} GiB")

    def _time_lines(self) -> Iterator[str]:
        speed = self.speed
        yield _row("a step", f"{speed.samples_per_step:,.0f} samples, "
                   f"{speed.tokens_per_step:,.0f} tokens, {speed.flops_per_step:.3g} operations, "
                   f"{speed.seconds_per_step:.3g} s")  # fmt: skip
        yield _row("a second", f"{speed.samples_per_second:,.1f} samples, "
                   f"{speed.tokens_per_second:,.0f} tokens ({self.rate})")  # fmt: skip
        if speed.tokenizer_share > 0.01:
            yield _row("of that, tokenizer", f"{speed.tokenizer_share:.0%} of the time")
        if self.hours is not None:
            days = f" ({self.hours / 24:,.1f} days)" if self.hours >= 48 else ""
            device_hours = self.hours * self.world_size
            money = "" if self.cost is None else f", {self.cost:,.0f} of money"
            yield _row(f"{self.max_steps:,} steps", f"{self.hours:,.3g} hours{days}, "
                       f"{device_hours:,.3g} device hours{money}")  # fmt: skip


def _row(name: str, text: str) -> str:
    return f"  {name:<26}{text}"


def _size(number: float) -> str:
    """Write bytes as a person does."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"


def plan(configs: list[str], *, config: PlanConfig) -> Plan:
    """Tell memory, time and disk of a training from its files, on any kind of device.

    The stage takes two steps with tensors that have sizes but no contents, so that nothing needs to
    be there: no device, no data, no tokenizer.

    Args:
        configs: Files as after `-c` of `grn fit`, and overrides such as `trainer.max_steps=100`.
        config: Where it is to run.

    Raises:
        ValueError: If there are no such files, or their training cannot be planned.
    """
    settings = read_settings(configs)
    model = model_of(settings)
    tokenizer = trained_tokenizer(str(model["tokenizer"]))
    rehearsal = Rehearsal(model, tokenizer)
    training = as_training(settings, rehearsal.tokenizer_config, text_tokens=config.text_tokens)
    if config.checkpointing is not None:
        training = replace(
            training, step=replace(training.step, is_checkpointed=config.checkpointing)
        )
    world = config.world_size or training.world_size or 1
    choice = Choice(planned_name(config.strategy or training.strategy, world), training)
    device = described(find_device(config.device), memory=config.memory, tflops=config.tflops)
    step = _largest(rehearsal, training)
    works = [batch_work(rehearsal, source.sizes) for source in training.sources]
    rates, rate = _rates(rehearsal, training, device, config)
    again = training.step.is_checkpointed
    result = Plan(
        title=" + ".join(word if "=" in word else Path(word).name for word in configs),
        device=device,
        world_size=world,
        strategy=choice.strategy,
        precision=training.step.precision,
        parameters={name: n for name, n in rehearsal.num_parameters().items() if n},
        batches=_batches(training),
        micro_batches=training.step.micro_batches,
        memory=device_memory(step, choice.strategy, world, rehearsal.blocks()),
        speed=speed_of(training, works, rates, world, again=again),
        rate=rate,
        max_steps=training.max_steps,
        price=config.price,
        disk=disk_of(rehearsal, training.sources, step),
        advice=(),
        notes=_notes(rehearsal, training, config, tokenizer is None),
    )
    if not result.fits:
        result = replace(result, advice=advise(rehearsal, choice, step, world, device))
    if config.json is not None:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json_format.dumps(result.plain(), indent=2) + "\n")
    return result


def _largest(rehearsal: Rehearsal, training: Training) -> StepMemory:
    """Take a step of every source and return that of the highest peak."""
    sizes = {source.sizes for source in training.sources}
    steps = [rehearsal.measure(one, training.step) for one in sizes]
    return max(steps, key=lambda step: step.peak)


def _rates(
    rehearsal: Rehearsal, training: Training, device: Device, config: PlanConfig
) -> tuple[Rates, str]:
    """Return operations per second, and where they come from."""
    if not config.measure:
        rates = expected_rates(device, training.step.precision, config.utilization)
        return rates, f"{config.utilization:.0%} of {rates.network / config.utilization:.3g} FLOP/s"
    sizes = training.sources[0].sizes
    seconds = rehearsal.time(replace(sizes, is_coded=True), training.step)
    reached = batch_work(rehearsal, sizes).network / seconds
    tokenizer = expected_rates(find_device("cpu"), "32-true", config.utilization).tokenizer
    return Rates(reached, tokenizer), f"measured here, {reached:.3g} FLOP/s"


def _batches(training: Training) -> dict[str, str]:
    micro = training.step.micro_batches
    times = f", {micro} micro-batches a step" if micro > 1 else ""
    total, is_packed = sum(one.weight for one in training.sources), bool(training.token_budget)
    return {
        one.title: (f"{one.weight / total:.0%} of documents, " if is_packed else "")
        + f"{'up to ' if is_packed else ''}{one.sizes.samples} x "
        f"{' x '.join(map(str, one.sizes.size))} pixels"
        f"{' from cached codes' if one.sizes.is_coded else ''}{times}"
        for one in training.sources
    }


def _notes(
    rehearsal: Rehearsal, training: Training, config: PlanConfig, is_guessed: bool
) -> tuple[str, ...]:
    """Say what was assumed."""
    notes = []
    if is_guessed:
        notes.append(
            f"no tokenizer at '{training.model['tokenizer']}' yet: taken to be "
            f"{rehearsal.tokenizer_name}, whose codes the generator learns."
        )
    if any(source.num_samples is None for source in training.sources):
        notes.append("not all shards are here: they are taken to hold pixels, not codes.")
    if training.token_budget is not None:
        notes.append(
            f"packs of {training.token_budget:,} tokens: memory is that of documents of one size, "
            "time that of the mixture, each source at its largest preset and length; attention "
            "takes no room for masks (FlexAttention)."
        )
    if rehearsal.is_text and not rehearsal.has_trained_encoder:
        place = "on the device" if rehearsal.encoder_bytes else "elsewhere, or not at all"
        notes.append(
            f"captions of {training.sources[0].sizes.text_tokens} tokens (`--text_tokens`); the "
            f"text encoder computes {place}, and its time is not counted."
        )
    if not config.measure:
        notes.append(
            f"utilization {config.utilization:.0%} is assumed (`--utilization`); loading and "
            "communication are taken to hide behind computing."
        )
    return tuple(notes)
