"""Samples under refinement, each at its own step; they come and go between two steps.

A pool owns its rows and works on them in place where that is safe. Everything that a plan can tell
beforehand (times, scales, temperatures, who is done) is known to the host, so that a GPU has to be
waited for only where an entropy decides.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from grn_lightning.functional.categorical import draw, mean_entropy
from grn_lightning.functional.corruption import corrupt, keep_mask, random_codes
from grn_lightning.functional.guidance import guide
from grn_lightning.functional.random import Stream, counter_uniform
from grn_lightning.samplers.conditions import (
    Condition,
    concatenate_conditions,
    expand_rows,
    own_rows,
    put_rows,
    replace_rows,
    select_rows,
)
from grn_lightning.samplers.config import RefineConfig, Step
from grn_lightning.samplers.constraints import Constraint
from grn_lightning.samplers.results import ForwardCount, Generator, StepInfo


@dataclass(frozen=True)
class RefineJob:
    """What all samples of a pool share."""

    generator: Generator
    shape: tuple[int, ...]
    seed: int
    alphabet_size: int
    config: RefineConfig
    observer: Callable[[StepInfo], None] | None = None


@dataclass(frozen=True)
class Requests:
    """Samples that are asked for, `n` of them."""

    tickets: list[int]
    """What the asker calls them."""
    sample_index: Tensor
    """`(n,)` long."""
    condition: Condition
    """`n` rows, or one for all."""
    null_condition: Condition | None = None
    """The same; needed where some step is guided."""
    constraint: Constraint | None = None
    """The same; mode and start time are those of the first requests of a pool."""


class Finished(NamedTuple):
    """Samples that are done after a step, `n` of them."""

    tickets: list[int]
    codes: Tensor
    """`(n, c, *grid)` long."""
    entropy: Tensor
    """`(n, max_steps)` float: see `RefineResult.entropy`."""
    num_steps: list[int]
    num_evaluations: list[int]


class _Rows(NamedTuple):
    """What the device holds of every sample."""

    sample_index: Tensor  # (b,)
    x_0: Tensor  # (b, c, *grid): the initial random map
    x_t: Tensor  # the next input
    x_hat: Tensor  # the last complete sample
    t: Tensor  # (b,): realised share of kept elements
    curve: Tensor  # (b, max_steps): entropies so far
    known: tuple[Tensor, ...]  # codes and mask of the constraint, if there is one


@dataclass
class _Ticket:
    """What the host knows of one sample."""

    number: int
    plan: list[Step]
    position: int = 0
    num_evaluations: int = 0

    @property
    def is_done(self) -> bool:
        return self.position == len(self.plan)

    @property
    def step(self) -> Step:
        return self.plan[min(self.position, len(self.plan) - 1)]


@dataclass(frozen=True)
class Parked:
    """A sample that waits on its way, without its condition."""

    ticket: _Ticket
    rows: _Rows

    @property
    def number(self) -> int:
        """What its asker calls it."""
        return self.ticket.number

    @property
    def num_remaining(self) -> int:
        """Steps that it still needs."""
        return len(self.ticket.plan) - self.ticket.position


class RefinePool:
    """Some samples on their way from noise to data.

    Args:
        job: What they share.
        requests: The first samples; later ones take the places of those that are done.
        is_refilled: Whether that will happen: the pool then copies the conditions.

    Raises:
        ValueError: If rows do not match, or guidance lacks its null condition.
    """

    def __init__(self, job: RefineJob, requests: Requests, *, is_refilled: bool = False):
        self.job, self.config = job, job.config
        self.constraint = requests.constraint
        start_time = 0.0 if self.constraint is None else self.constraint.start_time
        self._start_time = start_time
        self._plans: dict[int | None, list[Step]] = {None: job.config.steps(start_time)}
        # At another pace a step may fall into an interval in which the plain one has none.
        may_guide = job.config.adaptive is not None and job.config.is_guided
        self._is_guided = may_guide or any(step.is_guided for step in self._plan(None))
        self.num_forwards = ForwardCount(0, 0)
        self._tickets = [_Ticket(number, self._plan(None)) for number in requests.tickets]
        self._rows = self._begin(requests)
        self._condition = self._conditions(requests)
        if is_refilled or job.config.rows_per_call is not None:
            self._condition = own_rows(self._condition)
        self._guided_condition: tuple[tuple[int, ...], Condition] | None = None

    # --- who is there ---------------------------------------------------------------------------

    @property
    def num_active(self) -> int:
        """Samples that are not done yet."""
        return sum(not ticket.is_done for ticket in self._tickets)

    @property
    def num_free(self) -> int:
        """Samples that are done and still take a place."""
        return len(self._tickets) - self.num_active

    def refill(self, requests: Requests) -> None:
        """Put new samples into the places of some that are done.

        Raises:
            ValueError: If their conditions have another make than those of the first samples.
        """
        free = [row for row, ticket in enumerate(self._tickets) if ticket.is_done]
        slots = free[: len(requests.tickets)]
        for row, number in zip(slots, requests.tickets, strict=True):
            self._tickets[row] = _Ticket(number, self._plan(None))
        where = self._indices(slots)
        self._rows = _Rows(*replace_rows(self._rows, where, self._begin(requests)))
        if self._is_guided:
            where = torch.cat([where, where + len(self._tickets)])
        put_rows(self._condition, where, self._conditions(requests))
        self._guided_condition = None

    def park(self, most_remaining: int, limit: int) -> list[Parked]:
        """Take out samples that have just been told their number of steps, and need few.

        Args:
            most_remaining: Those that need more stay.
            limit: Most samples to take out; the rest stays as well.
        """
        adaptive, parked = self.config.adaptive, list[Parked]()
        if adaptive is None:
            return parked
        for row, ticket in enumerate(self._tickets):
            is_told = not ticket.is_done and ticket.step.number == adaptive.decision_step + 1
            if is_told and len(ticket.plan) - ticket.position <= most_remaining:
                if len(parked) == limit:
                    break
                rows = _Rows(*select_rows(self._rows, self._indices([row])))
                parked.append(Parked(ticket, rows))
                self._tickets[row] = _Ticket(-1, [])
        return parked

    def unpark(self, parked: list[Parked], requests: Requests) -> None:
        """Put waiting samples into the places of some that are done; `requests` are theirs."""
        free = [row for row, ticket in enumerate(self._tickets) if ticket.is_done]
        self.refill(requests)
        for row, waiting in zip(free, parked, strict=False):
            self._tickets[row] = waiting.ticket
            where = self._indices([row])
            self._rows = _Rows(*replace_rows(self._rows, where, waiting.rows))

    def compact(self) -> None:
        """Let the samples that are done leave."""
        if self.num_free == 0:
            return
        left = [row for row, ticket in enumerate(self._tickets) if not ticket.is_done]
        rows = self._indices(left)
        self._rows = _Rows(*select_rows(self._rows, rows))
        if self._is_guided:
            rows = torch.cat([rows, rows + len(self._tickets)])
        self._condition = select_rows(self._condition, rows)
        self._tickets = [self._tickets[row] for row in left]
        self._guided_condition = None

    def _conditions(self, requests: Requests) -> Condition:
        """Return the rows with a condition and, where it guides, those without behind them."""
        count = len(requests.tickets)
        condition = expand_rows(requests.condition, count)
        if not self._is_guided:
            return condition
        if requests.null_condition is None:
            raise ValueError(
                "null_condition is missing, but guidance asks for it; pass the null class or the "
                "empty prompt, or set guidance_scale=1 with a constant schedule."
            )
        return concatenate_conditions(condition, expand_rows(requests.null_condition, count))

    def _begin(self, requests: Requests) -> _Rows:
        """Return rows before their first step (1 of the algorithm)."""
        index, constraint, k = requests.sample_index, requests.constraint, self.job.alphabet_size
        x_0 = random_codes(self._uniform(index, 0, Stream.INITIAL), alphabet_size=k)
        t = torch.full((len(index),), self._start_time, device=index.device)
        curve = torch.zeros(len(index), self.config.num_steps, device=index.device)
        rows = _Rows(index, x_0, x_0, x_0, t, curve, ())
        if constraint is None:
            return rows
        constraint = constraint.expand(len(index), self.job.shape, alphabet_size=k)
        keep = torch.zeros_like(x_0, dtype=torch.bool)
        if self._start_time > 0:
            keep = keep_mask(self._uniform(index, 0, Stream.START), t)
        x_t, x_hat, _ = constraint.begin(x_0, keep)
        known = (constraint.known_codes.contiguous(), constraint.known_mask.contiguous())
        return rows._replace(x_t=x_t, x_hat=x_hat.contiguous(), known=known)

    # --- one step -------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> Finished | None:
        """Take one step with every sample (2 of the algorithm); return those that are done."""
        rows, tickets = self._rows, self._tickets
        was_done = [ticket.is_done for ticket in tickets]
        scales = [ticket.step.guidance_scale for ticket in tickets]
        t = rows.t
        if not self.config.realised_time:
            t = self._floats([ticket.step.t for ticket in tickets])
        conditional, guided = self._logits(rows.x_t, t, scales)  # 2a
        mean = mean_entropy(conditional)  # 2b
        if self.config.adaptive is not None:
            self._decide(mean)
        steps = [ticket.step for ticket in tickets]
        numbers = self._numbers([step.number for step in steps])
        u = self._uniform(rows.sample_index, numbers, Stream.DRAW)
        x_hat = draw(guided, u, temperature=self._temperature(steps))  # 2c
        del conditional, guided
        t_next = self._floats([step.t_next for step in steps])
        keep = keep_mask(self._uniform(rows.sample_index, numbers, Stream.KEEP), t_next)
        if self.constraint is not None:
            codes, mask = rows.known
            constraint = replace(self.constraint, known_codes=codes, known_mask=mask)
            x_hat, keep = constraint.complete(x_hat), constraint.shown(keep)
        x_t = corrupt(x_hat, rows.x_0, keep)  # 2d
        columns = self._indices([min(k.position, len(k.plan) - 1) for k in tickets])
        rows.curve.scatter_(1, columns[:, None], mean[:, None])
        if self.config.realised_time:
            rows = rows._replace(t=keep.flatten(1).float().mean(1))
        self._rows = rows._replace(x_t=x_t, x_hat=x_hat)
        if self.job.observer is not None:
            self._tell(steps, t, t_next, scales, mean, keep, rows.x_hat)
        return self._finish(was_done, scales)

    def _temperature(self, steps: list[Step]) -> float | Tensor:
        # Always a tensor, because a GPU divides by a number in another way than by a tensor.
        return (
            self._floats([step.temperature for step in steps]) if self.config.temperature else 0.0
        )

    def _numbers(self, numbers: list[int]) -> int | Tensor:
        """Return one number for all if it is; a tensor stays with the host, which looks at it."""
        return numbers[0] if len(set(numbers)) == 1 else torch.tensor(numbers)

    def _decide(self, mean: Tensor) -> None:
        """Give those at their decision step as many steps as their entropy asks for."""
        adaptive = self.config.adaptive
        assert adaptive is not None
        deciding = [
            row
            for row, ticket in enumerate(self._tickets)
            if not ticket.is_done and ticket.step.number == adaptive.decision_step
        ]
        if not deciding:
            return
        entropies = mean.tolist()
        for row in deciding:
            remaining = adaptive.num_remaining(entropies[row], self.config.num_steps)
            self._tickets[row].plan = self._plan(remaining)

    def _plan(self, num_remaining: int | None) -> list[Step]:
        if num_remaining not in self._plans:
            plan = self.config.steps(self._start_time, num_remaining=num_remaining)
            self._plans[num_remaining] = plan
        return self._plans[num_remaining]

    def _finish(self, was_done: list[bool], scales: list[float]) -> Finished | None:
        """Count the step; return the samples for which it was the last."""
        for ticket, done, scale in zip(self._tickets, was_done, scales, strict=True):
            if not done:
                ticket.position += 1
                ticket.num_evaluations += 1 + (scale != 1.0)
        done_now = [
            row for row, ticket in enumerate(self._tickets) if ticket.is_done and not was_done[row]
        ]
        if not done_now:
            return None
        codes, curve = self._rows.x_hat, self._rows.curve
        if len(done_now) < len(self._tickets):
            where = self._indices(done_now)
            codes, curve = codes[where], curve[where]
        tickets = [self._tickets[row] for row in done_now]
        return Finished(
            tickets=[ticket.number for ticket in tickets],
            codes=codes,
            entropy=curve,
            num_steps=[ticket.position for ticket in tickets],
            num_evaluations=[ticket.num_evaluations for ticket in tickets],
        )

    def _tell(
        self,
        steps: list[Step],
        t: Tensor,
        t_next: Tensor,
        scales: list[float],
        mean: Tensor,
        keep: Tensor,
        before: Tensor,
    ) -> None:
        """Tell the observer of the samples that are not done yet."""
        rows = self._rows
        info = StepInfo(
            step=self._indices([step.number for step in steps]),
            num_steps=self._indices([ticket.plan[-1].number + 1 for ticket in self._tickets]),
            t=t,
            t_next=t_next,
            guidance_scale=self._floats(scales),
            sample_index=rows.sample_index,
            entropy=mean,
            codes=rows.x_hat,
            keep=keep,
            x_t=rows.x_t,
            changed_fraction=(rows.x_hat != before).flatten(1).float().mean(1),
        )
        active = [row for row, ticket in enumerate(self._tickets) if not ticket.is_done]
        if len(active) < len(self._tickets):
            where = self._indices(active)
            info = StepInfo(*(getattr(info, name)[where] for name in info.__dataclass_fields__))
        assert self.job.observer is not None
        self.job.observer(info)

    # --- asking ---------------------------------------------------------------------------------

    def _logits(self, x_t: Tensor, t: Tensor, scales: list[float]) -> tuple[Tensor, Tensor]:
        """Return conditional and guided logits, `(b, c, *grid, k)`.

        Rows whose scale is 1 are not asked about without their condition.
        """
        guided = tuple(row for row, scale in enumerate(scales) if scale != 1.0)
        if not guided:
            conditional = self._ask(x_t, t, self._condition_of(guided))
            return conditional, conditional
        everyone = len(guided) == len(scales)
        where = None if everyone else self._indices(list(guided))
        more, more_t = (x_t, t) if where is None else (x_t[where], t[where])
        condition = self._condition_of(guided)
        logits = self._ask(torch.cat([x_t, more]), torch.cat([t, more_t]), condition)
        conditional, unconditional = logits[: len(x_t)], logits[len(x_t) :]
        scale = self._floats([scales[row] for row in guided])
        if where is None:
            return conditional, guide(conditional, unconditional, scale)
        some = guide(conditional[where], unconditional, scale)
        return conditional, conditional.float().index_copy(0, where, some)

    def _condition_of(self, guided: tuple[int, ...]) -> Condition:
        """Return all rows with their condition, then the guided ones without."""
        count = len(self._tickets)
        if not self._is_guided or len(guided) == count:
            return self._condition
        if not guided:
            return select_rows(self._condition, slice(0, count))
        if self._guided_condition is None or self._guided_condition[0] != guided:
            rows = self._indices([*range(count), *(count + row for row in guided)])
            self._guided_condition = (guided, select_rows(self._condition, rows))
        return self._guided_condition[1]

    def _ask(self, codes: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Ask about all rows at once, or in calls of `rows_per_call` rows."""
        count, size = len(codes), self.config.rows_per_call
        calls = 1 if size is None else -(-count // size)
        self.num_forwards = ForwardCount(
            self.num_forwards.calls + calls, self.num_forwards.rows + count
        )
        if size is None or size == count:
            return self._call(codes, t, condition)
        parts = []
        for start in range(0, count, size):
            rows: slice | Tensor = slice(start, start + size)
            if start + size > count:  # the last row fills up the last call
                rows = torch.arange(start, start + size, device=codes.device).clamp(max=count - 1)
            logits = self._call(codes[rows], t[rows], select_rows(condition, rows))
            parts.append(logits[: count - start])
        return torch.cat(parts)

    def _call(self, codes: Tensor, t: Tensor, condition: Condition) -> Tensor:
        expected = (*codes.shape, self.job.alphabet_size)
        logits = self.job.generator(codes, t, condition)
        if logits.shape != expected:
            raise ValueError(
                f"the generator must return logits {expected} for codes {tuple(codes.shape)} and "
                f"alphabet_size={self.job.alphabet_size}, got {tuple(logits.shape)}; is the target "
                "('index' or 'bit') the one it was built for?"
            )
        return logits

    # --- numbers --------------------------------------------------------------------------------

    def _uniform(self, index: Tensor, step: int | Tensor, stream: Stream) -> Tensor:
        job = self.job
        return counter_uniform(index, seed=job.seed, step=step, stream=stream, shape=job.shape)

    def _indices(self, values: list[int]) -> Tensor:
        return self._to_device(torch.tensor(values, dtype=torch.long))

    def _floats(self, values: list[float]) -> Tensor:
        return self._to_device(torch.tensor(values, dtype=torch.float32))

    def _to_device(self, values: Tensor) -> Tensor:
        """Send host numbers without waiting for the device."""
        device = self._rows.sample_index.device
        return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)
