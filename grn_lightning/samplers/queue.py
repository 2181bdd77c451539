"""Continuous batching: as soon as a sample is done, the next one of the queue takes its place.

Where samples need different numbers of steps, a batch that waits for its slowest one shrinks
until it is done. A queue keeps it full: the generator is always asked about `max_batch` samples,
until there are no more to come. In the end only the longest would be left, one by one, so samples
that turn out to need few steps wait, without their place in the batch, until there is no other
work.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from grn_lightning.samplers.batches import rows_of
from grn_lightning.samplers.conditions import Condition
from grn_lightning.samplers.config import RefineConfig
from grn_lightning.samplers.constraints import Constraint
from grn_lightning.samplers.pool import Finished, Parked, RefineJob, RefinePool, Requests
from grn_lightning.samplers.results import Generator, StepInfo

_MAX_PARKED = 4  # waiting samples per place; each holds its maps, not its condition


@dataclass(frozen=True)
class RefinedSample:
    """One sample of a queue."""

    row: int
    """Its place in the queue."""

    codes: Tensor
    """`(c, *grid)` long in [0, k)."""

    num_steps: int
    """Steps that it took."""

    num_evaluations: int
    """How often the generator was asked about it: see `RefineResult.num_evaluations`."""

    entropy: Tensor
    """`(num_steps,)` float in [0, 1]: see `RefineResult.entropy`."""


def _samples(finished: Finished) -> Iterator[RefinedSample]:
    parts = zip(*finished, strict=True)
    for row, codes, curve, num_steps, num_evaluations in parts:
        yield RefinedSample(row, codes, num_steps, num_evaluations, curve[:num_steps])


def _one_after_the_other(samples: Iterator[RefinedSample]) -> Iterator[RefinedSample]:
    """Hold samples back until all before them have come."""
    waiting: dict[int, RefinedSample] = {}
    row = 0
    for sample in samples:
        waiting[sample.row] = sample
        while row in waiting:
            yield waiting.pop(row)
            row += 1


def _work(
    job: RefineJob, max_batch: int, num_samples: int, requests: Callable[[range], Requests]
) -> Iterator[RefinedSample]:
    """Yield samples as they are done."""
    stop = min(max_batch, num_samples)
    pool = RefinePool(job, requests(range(stop)), is_refilled=stop < num_samples)
    parked: list[Parked] = []
    while pool.num_active:
        finished = pool.step()
        if finished is not None:
            yield from _samples(finished)
        if not job.config.compact:
            if pool.num_active:
                continue
        elif stop < num_samples:
            room = min(_MAX_PARKED * max_batch - len(parked), num_samples - stop)
            parked += pool.park(_short(job.config), max(0, room))
        start, stop = stop, min(stop + pool.num_free, num_samples)
        if stop > start:
            pool.refill(requests(range(start, stop)))
        if pool.num_free and parked:
            parked.sort(key=lambda waiting: waiting.num_remaining)
            for waiting in [parked.pop() for _ in range(min(len(parked), pool.num_free))]:
                pool.unpark([waiting], requests(range(waiting.number, waiting.number + 1)))
        pool.compact()


def _short(config: RefineConfig) -> int:
    """Return how many remaining steps are few: the middle between the fewest and the most."""
    if config.adaptive is None:
        return 0
    return (config.adaptive.min_steps + config.num_steps) // 2 - config.adaptive.decision_step


def refine_queue(
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
    in_order: bool = True,
) -> Iterator[RefinedSample]:
    """Draw any number of samples, `max_batch` of them at any time.

    The samples are those of one large batch. Nothing is computed before the first iteration. With
    a fixed number of steps all samples of a batch are done at once, and this is
    `refine_in_batches`; it pays where steps are adaptive.

    Args:
        generator: As in `refine`.
        shape: As in `refine`.
        condition: `n` rows, or a callable that makes the rows of a slice when their turn comes; all
            of one size. It is asked again about a sample that had to wait.
        null_condition: `n` rows, or one that serves all.
        sample_index: `(n,)` long.
        seed: As in `refine`.
        alphabet_size: As in `refine`.
        config: As in `refine`. With `compact` off, places are filled again when all are free.
        max_batch: Most samples at a time; guided calls have up to twice as many rows.
        observer: As in `refine`, for every step of all samples under way.
        constraint: As in `refine`, `n` rows or one.
        in_order: Whether samples come in the order of the queue; if not, as soon as they are done.

    Returns:
        An iterator of `n` samples.

    Raises:
        ValueError: If `max_batch` is smaller than 1, conditions differ in size, or as in `refine`.
    """
    if max_batch < 1:
        raise ValueError(f"max_batch must be at least 1, got {max_batch}.")
    num_samples = len(sample_index)
    condition_of = condition if callable(condition) else rows_of(condition, num_samples)
    null_of = None if null_condition is None else rows_of(null_condition, num_samples)

    def requests(rows: range) -> Requests:
        part = slice(rows.start, rows.stop)
        return Requests(
            tickets=list(rows),
            sample_index=sample_index[part],
            condition=condition_of(part),
            null_condition=None if null_of is None else null_of(part),
            constraint=None if constraint is None else constraint.select_part(part),
        )

    job = RefineJob(generator, tuple(shape), seed, alphabet_size, config, observer)
    samples = _work(job, max_batch, num_samples, requests)
    return _one_after_the_other(samples) if in_order else samples
