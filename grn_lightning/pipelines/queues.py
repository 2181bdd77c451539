"""Many samples through a generator whose places never stay empty, for steps that are adaptive.

`GeneratorPipeline.sample` draws one batch, which shrinks as its samples are done. Here the next
sample takes the place of one that is done (`samplers/queue.py`); the samples are the same. Captions
are read once, beforehand, and cut to one length, which all rows of a queue must have.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grn_lightning.models.grn_text import GRNText, TextCondition
from grn_lightning.pipelines.conditions import Condition, prepare_text, trim_text
from grn_lightning.pipelines.generator import GeneratorPipeline
from grn_lightning.samplers import RefineConfig, RefinedSample, StepInfo, refine_queue
from grn_lightning.samplers.conditions import concatenate_conditions, select_rows


def _read_captions(
    pipeline: GeneratorPipeline, captions: Sequence[str], null: TextCondition, batch_size: int
) -> tuple[TextCondition, TextCondition]:
    """Return the features of all captions and of the null condition, cut to one length."""
    parts = []
    for start in range(0, len(captions), batch_size):
        part: Any = pipeline.condition({"captions": captions[start : start + batch_size]})
        parts += trim_text([part])
    *parts, null = trim_text([*parts, null])
    features = parts[0]
    for part in parts[1:]:
        features = concatenate_conditions(features, part)  # type: ignore[assignment]
    return features, null


def _as_it_is(condition: Any) -> Condition:
    return condition


@dataclass(frozen=True)
class _Prepared:
    """Makes text ready for the generator, some rows at a time."""

    generator: GRNText
    length: int
    rows_per_call: int | None

    def __call__(self, text: Any) -> Condition:
        [ready] = prepare_text(
            self.generator, [text], length=self.length, rows_per_call=self.rows_per_call
        )
        return ready


@torch.no_grad()
def sample_queue(
    pipeline: GeneratorPipeline,
    wanted: Mapping[str, Sequence[Any]],
    sample_index: Tensor,
    *,
    grid: tuple[int, ...],
    config: RefineConfig,
    seed: int,
    max_batch: int,
    null_condition: Condition | None = None,
    observer: Callable[[StepInfo], None] | None = None,
) -> Iterator[RefinedSample]:
    """Draw the elements of one sample per caption or class, `max_batch` of them at any time.

    Args:
        pipeline: The networks.
        wanted: `captions` or `class_labels`, one per sample.
        sample_index: `(n,)` long: names the noise of each sample.
        grid: As in `GeneratorPipeline.sample`.
        config: Steps, guidance, temperature.
        seed: Seed of the job.
        max_batch: Most samples at a time.
        null_condition: What guidance steers away from, one row; by default the empty prompt or the
            null class.
        observer: Called with a `StepInfo` after every step.

    Yields:
        The samples in order.

    Raises:
        ValueError: If the generator draws from something else, or as in `refine_queue`.
    """
    generator = pipeline.generator
    null: Any = pipeline.null_condition(1) if null_condition is None else null_condition
    asked: Condition
    prepared: Callable[[Any], Condition]
    if isinstance(generator, GRNText):
        asked, null = _read_captions(pipeline, wanted["captions"], null, max_batch)
        prepared = _Prepared(generator, null.mask.shape[1], config.rows_per_call)
    else:
        asked = pipeline.condition(wanted)
        prepared = _as_it_is
    with pipeline.precision():
        null = prepared(null)
    samples = refine_queue(
        generator,
        (generator.config.num_elements, *grid),
        condition=lambda rows: prepared(select_rows(asked, rows)),
        null_condition=null,
        sample_index=sample_index,
        seed=seed,
        alphabet_size=generator.config.alphabet_size,
        config=config,
        max_batch=max_batch,
        observer=observer,
    )
    while True:
        # Not around the `yield`: whoever reads the samples computes in a precision of their own.
        with pipeline.precision(), torch.no_grad():
            sample = next(samples, None)
        if sample is None:
            return
        yield sample
