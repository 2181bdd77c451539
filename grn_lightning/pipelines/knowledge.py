"""What a generator knows: which bits of held-out maps it gets right, by time and by round.

Nothing is drawn: the network is shown true maps, corrupted as in training at times spread evenly
over [0, 1], and asked for all of their elements.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from grn_lightning.functional import (
    Stream,
    corrupt,
    counter_uniform,
    keep_mask,
    random_codes,
    round_accuracy,
    token_accuracy,
    token_cross_entropy,
)
from grn_lightning.media.figures import line_figure
from grn_lightning.media.heat_maps import heat_map
from grn_lightning.metrics.rounds import RoundAccuracy, RoundAccuracyResult
from grn_lightning.models.grn_text import FirstFrameCondition
from grn_lightning.pipelines.conditions import Condition
from grn_lightning.pipelines.generator import GeneratorPipeline
from grn_lightning.samplers import select_rows


def asked_for(
    pipeline: GeneratorPipeline, conditions: Condition | Sequence[str] | Sequence[int]
) -> tuple[Condition, list[str] | None]:
    """Return a condition and what to call its rows, if that is known.

    Args:
        pipeline: Whose condition it is.
        conditions: Captions or classes, or a condition.

    Raises:
        ValueError: If samples start from a first frame.
    """
    if isinstance(conditions, Tensor):
        return conditions, [str(label) for label in conditions.tolist()]
    if isinstance(conditions, FirstFrameCondition):
        raise ValueError("a refinement that starts from a first frame cannot be inspected yet.")
    if hasattr(conditions, "_fields"):
        return cast(Condition, conditions), None
    asked = list(cast(Sequence[str], conditions))
    name = "captions" if pipeline.is_text else "class_labels"
    return pipeline.condition({name: asked}), [str(one) for one in asked]


@torch.no_grad()
def count_accuracy(
    metric: RoundAccuracy,
    pipeline: GeneratorPipeline,
    elements: Tensor,
    condition: Condition,
    *,
    sample_index: Tensor,
    t: Tensor,
    weights: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
) -> None:
    """Show the network one batch of corrupted maps and count what it gets right.

    Args:
        metric: Where to count.
        pipeline: Its generator is asked in the mode in which the caller left it.
        elements: `(b, c, *grid)` long: true maps.
        condition: `b` rows.
        sample_index: `(b,)` long; names the noise of each sample.
        t: `(b,)` float in [0, 1]: share of elements that are left as they are.
        weights: `(b,)`; samples of weight 0 do not count.
        seed: Seed of the noise.
        step: Another number gives other noise.
    """
    shape = tuple(elements.shape[1:])

    def uniform(stream: Stream) -> Tensor:
        return counter_uniform(sample_index, seed=seed, step=step, stream=stream, shape=shape)

    x_0 = random_codes(uniform(Stream.INITIAL), alphabet_size=pipeline.config.alphabet_size)
    x_t = corrupt(elements, x_0, keep_mask(uniform(Stream.KEEP), t))
    device, dtype = pipeline.device.type, pipeline.autocast
    with nullcontext() if dtype is None else torch.autocast(device, dtype):
        logits = pipeline.generator(x_t, t, condition)
    by_round = round_accuracy(
        logits.argmax(-1),
        elements,
        num_rounds=pipeline.tokenizer.config.num_rounds,
        target=pipeline.target,
    )
    weights = torch.ones_like(t) if weights is None else weights
    loss, accuracy = token_cross_entropy(logits, elements), token_accuracy(logits, elements)
    metric.update(loss, accuracy, by_round, t, weights)


@torch.no_grad()
def accuracy_at_times(
    metric: RoundAccuracy,
    pipeline: GeneratorPipeline,
    elements: Tensor,
    condition: Condition,
    *,
    sample_index: Tensor,
    weights: Tensor | None = None,
    seed: int = 0,
) -> None:
    """Show the network one batch of maps at the middle of every bin of the metric.

    Args:
        metric: Where to count.
        pipeline: As in `count_accuracy`.
        elements: As in `count_accuracy`.
        condition: As in `count_accuracy`.
        sample_index: As in `count_accuracy`.
        weights: As in `count_accuracy`.
        seed: Seed of the noise, which differs from time to time.
    """
    for step in range(metric.num_bins):
        t = torch.full((len(elements),), (step + 0.5) / metric.num_bins, device=elements.device)
        count_accuracy(
            metric,
            pipeline,
            elements,
            condition,
            sample_index=sample_index,
            t=t,
            weights=weights,
            seed=seed,
            step=step,
        )


@dataclass(frozen=True, eq=False)
class AccuracyInspection:
    """What a generator gets right of held-out maps; `n` times, `m` rounds."""

    t: Tensor
    """`(n,)` float: share of elements that were left as they are."""
    result: RoundAccuracyResult
    """Loss and accuracy at these times."""

    def figure(self) -> Image.Image:
        """Draw the accuracy of every round by time."""
        return accuracy_figure(self.result)

    def map(self) -> Image.Image:
        """Draw the accuracy of rounds (rows) and times (columns) as colours."""
        return heat_map(
            self.result.by_round.t(),
            title="share of right bits",
            rows=[f"round {number}" for number in range(self.result.by_round.shape[1])],
            x_label="bin of t, from noise to data",
            limits=(0.5, 1.0),
        )


def accuracy_figure(result: RoundAccuracyResult) -> Image.Image:
    """Draw the accuracy of every round by time, above what the network is shown.

    Of the bits of a corrupted map `t + (1 - t) / 2` are right: those that were left, and half of
    the random ones.
    """
    num_bins, num_rounds = result.by_round.shape
    t = (torch.arange(num_bins) + 0.5) / num_bins
    return line_figure(
        {f"round {number}": result.by_round[:, number] for number in range(num_rounds)},
        title="right bits of held-out samples, by round",
        x_label="t (0 noise, 1 data)",
        x=t,
        y_limits=(0.45, 1.01),
        reference={"shown": t + (1 - t) / 2},
    )


@torch.no_grad()
def inspect_accuracy(
    pipeline: GeneratorPipeline,
    elements: Tensor,
    conditions: Condition | Sequence[str] | Sequence[int],
    sample_index: Tensor | None = None,
    *,
    num_times: int = 10,
    seed: int = 0,
    max_batch: int = 64,
) -> AccuracyInspection:
    """Count what a generator gets right of true maps at evenly spread times.

    Every map is corrupted at every time, as in training, with noise of its own.

    Args:
        pipeline: Networks to look into.
        elements: `(b, c, *grid)` long, from `GeneratorPipeline.tokenize`.
        conditions: As in `inspect_refinement`.
        sample_index: `(b,)` long, names the noise; None counts from 0.
        num_times: Times, the middles of so many equal parts of [0, 1].
        seed: Seed of the noise.
        max_batch: Most maps in one call.

    Raises:
        ValueError: If `num_times` or `max_batch` is smaller than 1.
    """
    if num_times < 1 or max_batch < 1:
        raise ValueError(
            f"`num_times` and `max_batch` must be at least 1, got {num_times} and {max_batch}."
        )
    condition, _ = asked_for(pipeline, conditions)
    device = pipeline.device
    index = torch.arange(len(elements)) if sample_index is None else sample_index
    times = (torch.arange(num_times) + 0.5) / num_times
    metric = RoundAccuracy(num_rounds=pipeline.tokenizer.config.num_rounds, num_bins=num_times).to(
        device
    )
    for start in range(0, len(elements), max_batch):
        rows = slice(start, start + max_batch)
        accuracy_at_times(
            metric,
            pipeline,
            elements[rows].to(device),
            cast(Condition, select_rows(condition, rows)),
            sample_index=index[rows].to(device),
            seed=seed,
        )
    result = metric.compute()
    return AccuracyInspection(times, RoundAccuracyResult(*(part.cpu() for part in result)))
