"""Many samples, a bounded number at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from grn_lightning.samplers.conditions import Condition, expand_rows, select_rows
from grn_lightning.samplers.config import RefineConfig
from grn_lightning.samplers.constraints import Constraint
from grn_lightning.samplers.refine import refine
from grn_lightning.samplers.results import Generator, RefineResult, StepInfo


@dataclass(frozen=True)
class RefinedBatch:
    """A part of a longer job: rows `start` to `stop` of `num_samples` are done."""

    start: int
    """First row of this part."""

    stop: int
    """Row after the last of this part: so many samples are done."""

    num_samples: int
    """Rows of the whole job."""

    result: RefineResult
    """Codes, forwards and entropies of this part."""


def rows_of(condition: Condition, num_samples: int) -> Callable[[slice], Condition]:
    """Return what takes a slice of a condition of `num_samples` rows, or of one that serves all."""
    return partial(select_rows, expand_rows(condition, num_samples))


def refine_in_batches(
    generator: Generator,
    shape: tuple[int, ...],
    *,
    condition: Condition | Callable[[slice], Condition],
    null_condition: Condition | None = None,
    sample_index: Tensor,
    seed: int,
    alphabet_size: int,
    config: RefineConfig,
    max_batch: int,
    observer: Callable[[StepInfo], None] | None = None,
    constraint: Constraint | None = None,
) -> Iterator[RefinedBatch]:
    """Draw any number of samples, a bounded number at a time.

    The samples are those of one large batch. Nothing is computed before the first iteration, and
    only one part is in memory.

    Args:
        generator: As in `refine`.
        shape: As in `refine`.
        condition: `n` rows, or a callable that makes the rows of a slice when their turn comes (a
            text encoder over many prompts).
        null_condition: `n` rows, or one that serves all.
        sample_index: `(n,)` long.
        seed: As in `refine`.
        alphabet_size: As in `refine`.
        config: As in `refine`.
        max_batch: Most samples in one part; guided calls have twice as many rows.
        observer: As in `refine`, for every step of every part.
        constraint: As in `refine`, `n` rows or one.

    Returns:
        An iterator with one `RefinedBatch` per part, in order.

    Raises:
        ValueError: If `max_batch` is smaller than 1, or as in `refine`.
    """
    if max_batch < 1:
        raise ValueError(f"max_batch must be at least 1, got {max_batch}.")
    num_samples = len(sample_index)
    condition_of = condition if callable(condition) else rows_of(condition, num_samples)
    null_of = None if null_condition is None else rows_of(null_condition, num_samples)

    def part(start: int) -> RefinedBatch:
        rows = slice(start, min(start + max_batch, num_samples))
        result = refine(
            generator,
            shape,
            condition=condition_of(rows),
            null_condition=None if null_of is None else null_of(rows),
            sample_index=sample_index[rows],
            seed=seed,
            alphabet_size=alphabet_size,
            config=config,
            observer=observer,
            constraint=None if constraint is None else constraint.select_part(rows),
        )
        return RefinedBatch(rows.start, rows.stop, num_samples, result)

    return map(part, range(0, num_samples, max_batch))
