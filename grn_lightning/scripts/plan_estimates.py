"""Operations, time and disk of a training, before it begins."""

from dataclasses import dataclass
from typing import Any

from grn_lightning.lit.devices import Device
from grn_lightning.lit.memory import StepMemory
from grn_lightning.lit.rehearsal import BatchSizes, Rehearsal
from grn_lightning.models.costs import Flops, class_flops, encoder_flops, text_flops
from grn_lightning.models.grn_class import GRNClassConfig
from grn_lightning.scripts.plan_settings import Source, Training

_ADVANCE = 1.0 / 3.0
"""A pass forward more, of three passes' worth: what activation checkpointing computes twice."""


@dataclass(frozen=True)
class BatchWork:
    """What one device computes for one micro-batch."""

    tokens: float
    """Visual tokens, captions and times."""
    network: float
    """Operations of the trained network, forwards and backwards."""
    tokenizer: float
    """Operations of the tokenizer, where codes are not cached."""


def batch_work(rehearsal: Rehearsal, sizes: BatchSizes) -> BatchWork:
    """Count the operations of a micro-batch."""
    number = sizes.samples
    shape = rehearsal.tokenizer_config.latent_shape(*sizes.size)
    positions = shape[1] * shape[2] * shape[3]
    config = rehearsal.config
    flops: Flops
    if isinstance(config, GRNClassConfig):
        flops, tokens = class_flops(config), positions + config.num_context_tokens
    else:
        trained = rehearsal.has_trained_encoder
        flops = text_flops(config, positions, sizes.text_tokens, is_text_trained=trained)
        tokens = positions + sizes.text_tokens + 1
    encoding = 0.0
    if not sizes.is_coded:
        encoding = encoder_flops(rehearsal.tokenizer_config, sizes.size).forward
    return BatchWork(number * tokens, number * flops.total, number * encoding)


@dataclass(frozen=True)
class Speed:
    """How fast a training runs, over all devices."""

    samples_per_step: float
    """Of the optimizer."""
    tokens_per_step: float
    """Of the optimizer."""
    flops_per_step: float
    """Of the trained network, of the optimizer's step."""
    seconds_per_step: float
    """Of the optimizer."""
    tokenizer_share: float
    """Share of the time that goes into making codes of pixels."""

    @property
    def tokens_per_second(self) -> float:
        """Over all devices."""
        return self.tokens_per_step / self.seconds_per_step

    @property
    def samples_per_second(self) -> float:
        """Over all devices."""
        return self.samples_per_step / self.seconds_per_step


@dataclass(frozen=True)
class Rates:
    """Operations per second that a device is expected to reach."""

    network: float
    """In the network's precision."""
    tokenizer: float
    """In float32, with TF32 in convolutions."""


def expected_rates(device: Device, precision: str, utilization: float) -> Rates:
    """Return a share of a device's rates."""
    is_low = "16" in precision
    return Rates(utilization * (device.bf16 if is_low else device.fp32), utilization * device.tf32)


def speed_of(
    training: Training, works: list[BatchWork], rates: Rates, world_size: int, *, again: bool
) -> Speed:
    """Return what a training does in a second.

    Args:
        training: Sources and micro-batches.
        works: Of the micro-batch of each source.
        rates: Of one device.
        world_size: Number of devices.
        again: Whether blocks compute their activations a second time.
    """
    batch = _mean_batch(training, works)
    network, tokenizer = batch.work.network, batch.work.tokenizer
    network_time = network * (1 + (_ADVANCE if again else 0)) / rates.network
    tokenizer_time = tokenizer / rates.tokenizer
    micro = training.step.micro_batches
    factor = micro * world_size
    seconds = micro * (network_time + tokenizer_time)
    return Speed(
        samples_per_step=factor * batch.samples,
        tokens_per_step=factor * batch.work.tokens,
        flops_per_step=factor * network,
        seconds_per_step=seconds,
        tokenizer_share=tokenizer_time / (network_time + tokenizer_time),
    )


@dataclass(frozen=True)
class _MeanBatch:
    samples: float
    work: BatchWork


def _mean_batch(training: Training, works: list[BatchWork]) -> _MeanBatch:
    """Return the micro-batch of one device, on average over the sources.

    Weights are shares of the batches, each of one source; those of packs are shares of the
    documents, and a pack holds as many of these as the budget has room for.
    """
    weights = [source.weight for source in training.sources]
    sizes = [float(source.sizes.samples) for source in training.sources]
    if training.token_budget is not None:
        weights = [w / n for w, n in zip(weights, sizes, strict=True)]
    total = sum(weights)

    def mean(values: list[float]) -> float:
        return sum(w * v for w, v in zip(weights, values, strict=True)) / total

    samples, tokens = mean(sizes), mean([work.tokens for work in works])
    full = 1.0 if training.token_budget is None else training.token_budget / tokens
    return _MeanBatch(
        full * samples,
        BatchWork(
            full * tokens,
            full * mean([work.network for work in works]),
            full * mean([work.tokenizer for work in works]),
        ),
    )


@dataclass(frozen=True)
class Disk:
    """Bytes on disk."""

    checkpoint: float
    """Of one checkpoint: weights, optimizer, average."""
    codes: float
    """Of the cached codes of one sample, the largest source's."""
    text: float
    """Of the cached features of one caption; 0 for classes and for an encoder that is trained."""
    code_cache: float | None
    """Of all codes, where the shards are there to be counted."""


def disk_of(rehearsal: Rehearsal, sources: tuple[Source, ...], step: StepMemory) -> Disk:
    """Count what a training writes and what a cache would take."""

    def codes_of(sizes: BatchSizes) -> float:
        channels, *grid = rehearsal.tokenizer_config.latent_shape(*sizes.size)
        bits = channels * rehearsal.tokenizer_config.num_rounds
        return bits * grid[0] * grid[1] * grid[2] / 8

    text: float = 0.0
    config: Any = rehearsal.config
    if rehearsal.is_text and not rehearsal.has_trained_encoder:
        text = 4.0 * config.text_channels * sources[0].sizes.text_tokens
    numbers = [source.num_samples for source in sources]
    total = None
    if all(number is not None for number in numbers):
        total = sum(
            (number or 0) * codes_of(source.sizes)
            for number, source in zip(numbers, sources, strict=True)
        )
    return Disk(
        checkpoint=float(step.parameters + step.optimizer + step.average),
        codes=max(codes_of(source.sizes) for source in sources),
        text=text,
        code_cache=total,
    )
