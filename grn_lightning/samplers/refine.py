r"""Global refinement sampling: draw the whole map, keep a growing part, draw it all again (GRN).

The algorithm, for one batch of samples on a grid of any rank:

    1. Draw a random map ``x_0``, every element uniform over the alphabet. It stays fixed; start
       from ``x_t = x_0`` at ``t = t_0 = 0``.
    2. For every step ``i = 0 .. S - 1``, with ``t = t_i`` and ``t_next = t_{i+1}``:
       a. ask the generator for the logits of *every* element given ``x_t`` and ``t``: both branches
          in one call where the guidance scale is not 1, the conditional branch alone where it is;
       b. note the entropy of the conditional branch, before guidance and temperature;
       c. guide, divide by the temperature, and draw every element on its own: ``x_hat``;
       d. draw a fresh mask, True with probability ``t_next`` for every element, and mix:
          ``x_t = x_hat`` where True, ``x_0`` elsewhere.
    3. Return the last complete sample ``x_hat``. Since ``t_S = 1`` keeps everything, it is also
       the last ``x_t``: no element of the answer is left unpredicted.

Choices where the published samplers differ from one another:

* ``t`` is the nominal value of the schedule, as published for class-conditional sampling; one
  revision of the text-conditional sampler feeds back the realised share of kept elements.
* The cosine schedule ends at exactly 1, not at 0.999, so every step is one step of the schedule
  and the number of forwards is ``S``.
* The branch without a condition is skipped where it would have no weight; published code computes
  and discards it.
* Every random number is a function of (seed, sample index, step, purpose, element). A sample is the
  same in any batch, at any place in it, on any rank.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from grn_lightning.functional.categorical import draw, entropy
from grn_lightning.functional.corruption import corrupt, keep_mask, random_codes
from grn_lightning.functional.guidance import GUIDANCE_SCHEDULES, guidance_scale_at, guide
from grn_lightning.functional.random import Stream, counter_uniform
from grn_lightning.functional.timesteps import SCHEDULES, step_grid
from grn_lightning.samplers.conditions import Condition, concatenate_conditions, expand_rows
from grn_lightning.samplers.constraints import Constraint


class Generator(Protocol):
    """Anything that predicts a whole code map: a network, a compiled one, a closure."""

    def __call__(self, codes: Tensor, t: Tensor, condition: Condition, /) -> Tensor:
        """Map codes `(b, c, *grid)`, times `(b,)` and a condition to logits `(b, c, *grid, k)`."""


class Step(NamedTuple):
    """One step of the schedule."""

    number: int
    """Number of the step, from 0."""

    t: float
    """Time at which the generator is asked."""

    t_next: float
    """Share of elements that the step keeps, in expectation; 1 at the last step."""

    guidance_scale: float
    """Weight of the condition; where it is exactly 1, the unconditional branch is not evaluated."""

    @property
    def is_guided(self) -> bool:
        """Whether the unconditional branch is evaluated."""
        return self.guidance_scale != 1.0


def _is_positive(value: float) -> bool:
    return 0 < value < math.inf


@dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """How to walk from noise to data; independent of the model and of what is asked from it."""

    num_steps: int = 50
    """Steps, each one call of the generator."""

    schedule: Literal["linear", "cosine"] = "linear"
    """Spacing of the steps in t; "cosine" takes small steps at first."""

    alpha: float = 1.0
    """Shift of the schedule, t / (t + alpha (1 - t)); above 1 spends more steps near the noise."""

    guidance_scale: float = 1.0
    """Weight of the condition; 1 is the plain conditional prediction. In "power_cosine" alone it is
    what is added to 1 in the end, so that published values carry over: there 0 does not guide."""

    guidance_schedule: Literal["constant", "interval", "power_cosine"] = "constant"
    """How the scale depends on t."""

    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times (low, high) between which "interval" guides."""

    guidance_power: float = 1.0
    """Exponent of t in "power_cosine"; above 1 guides later."""

    temperature: float = 1.0
    """Divides the guided logits; below 1 is greedier, 0 takes the most likely value."""

    def __post_init__(self) -> None:
        issues = [text for is_wrong, text in self._rules() if is_wrong]
        if issues:
            raise ValueError("RefineConfig: " + "; ".join(issues) + ".")
        if self.guidance_schedule != "interval" and tuple(self.guidance_interval) != (0.0, 1.0):
            warnings.warn(
                f"guidance_interval={self.guidance_interval} is ignored, "
                f"because guidance_schedule is {self.guidance_schedule!r} and not 'interval'.",
                stacklevel=3,
            )

    def _rules(self) -> list[tuple[bool, str]]:
        low, high = self.guidance_interval

        def must(name: str, is_right: bool, allowed: str) -> tuple[bool, str]:
            return not is_right, f"{name} must be {allowed}, got {getattr(self, name)!r}"

        return [
            must("num_steps", self.num_steps >= 1, "at least 1"),
            must("schedule", self.schedule in SCHEDULES, f"one of {SCHEDULES}"),
            must("alpha", _is_positive(self.alpha), "positive and finite"),
            must("guidance_scale", 0 <= self.guidance_scale < math.inf, "finite and at least 0"),
            must(
                "guidance_schedule",
                self.guidance_schedule in GUIDANCE_SCHEDULES,
                f"one of {GUIDANCE_SCHEDULES}",
            ),
            must("guidance_interval", 0 <= low < high <= 1, "(low, high), 0 <= low < high <= 1"),
            must("guidance_power", _is_positive(self.guidance_power), "positive and finite"),
            must("temperature", 0 <= self.temperature < math.inf, "finite and at least 0"),
        ]

    def steps(self, start_time: float = 0.0) -> list[Step]:
        """Return what every step does, in order.

        Args:
            start_time: Where to start; steps that end before are left out, and the first one
                that is left starts here. Numbers of steps stay what they are.
        """
        times = step_grid(self.num_steps, schedule=self.schedule, alpha=self.alpha).tolist()
        scale_at = partial(
            guidance_scale_at,
            scale=self.guidance_scale,
            schedule=self.guidance_schedule,
            interval=self.guidance_interval,
            power=self.guidance_power,
        )
        pairs = enumerate(pairwise(times))
        left = [(i, max(t, start_time), t_next) for i, (t, t_next) in pairs if t_next > start_time]
        return [Step(number, t, t_next, scale_at(t)) for number, t, t_next in left]


@dataclass(frozen=True)
class RefineState:
    """All that a trajectory carries from one step to the next."""

    x_0: Tensor
    """`(b, c, *grid)` long in [0, k): the initial random map; never changes."""

    x_t: Tensor
    """`(b, c, *grid)` long: the next input, `x_hat` where kept and `x_0` elsewhere."""

    x_hat: Tensor
    """`(b, c, *grid)` long: the last complete sample; `x_0` before the first step."""

    keep: Tensor
    """`(b, c, *grid)` bool: where `x_t` is `x_hat` by choice; nowhere before the first step."""

    entropy: Tensor
    """`(b,)` float in [0, 1]: mean normalized entropy of the last conditional prediction; 1 before
    the first step."""


@dataclass(frozen=True)
class StepInfo:
    """What an observer is told after every step. The tensors are the sampler's own: read only."""

    step: Tensor
    """`(b,)` long: number of this step, from 0; samples may stand at different steps."""

    num_steps: Tensor
    """`(b,)` long: number after that of the last step, as planned so far."""

    t: Tensor
    """`(b,)` float: time at which the generator was asked."""

    t_next: Tensor
    """`(b,)` float: share of elements that this step kept, in expectation; 1 at the last step."""

    guidance_scale: Tensor
    """`(b,)` float: scale used at this step; 1 means that the unconditional branch was not
    evaluated."""

    sample_index: Tensor
    """`(b,)` long: which samples these are."""

    entropy: Tensor
    """`(b,)` float in [0, 1]: mean normalized entropy of the conditional prediction."""

    codes: Tensor
    """`(b, c, *grid)` long: the complete sample `x_hat` of this step."""

    keep: Tensor
    """`(b, c, *grid)` bool: True where `codes` enter the next input."""

    x_t: Tensor
    """`(b, c, *grid)` long: the next input."""

    changed_fraction: Tensor
    """`(b,)` float in [0, 1]: share of elements that differ from the complete sample of the step
    before (at step 0: from the random map)."""


class ForwardCount(NamedTuple):
    """How often the generator was asked."""

    calls: int
    """Calls: one per step."""

    rows: int
    """Samples in these calls: `b` per step, twice that where the step is guided."""


@dataclass(frozen=True)
class RefineResult:
    """The samples and what they cost."""

    codes: Tensor
    """`(b, c, *grid)` long in [0, k)."""

    num_forwards: ForwardCount
    """Calls of the generator and rows in them."""

    entropy: Tensor
    """`(num_steps, b)` float in [0, 1]: mean normalized entropy of the conditional prediction,
    before guidance and temperature."""

    num_steps: Tensor
    """`(b,)` long: steps that each sample took."""


@dataclass(frozen=True)
class _Branches:
    """The generator with the rows it is asked for: conditional, and conditional + unconditional."""

    generator: Generator
    alphabet_size: int
    conditional: Condition
    both: Condition | None

    def logits(self, x_t: Tensor, t: float, scale: float) -> tuple[Tensor, Tensor]:
        """Return conditional and guided logits, `(b, c, *grid, k)`."""
        if scale == 1.0:
            conditional = self._ask(x_t, t, self.conditional)
            return conditional, conditional
        assert self.both is not None, "refine() has looked for guided steps"
        conditional, unconditional = self._ask(torch.cat([x_t, x_t]), t, self.both).chunk(2)
        return conditional, guide(conditional, unconditional, scale)

    def _ask(self, x_t: Tensor, t: float, condition: Condition) -> Tensor:
        times = torch.full((len(x_t),), t, dtype=torch.float32, device=x_t.device)
        logits = self.generator(x_t, times, condition)
        if logits.shape != (*x_t.shape, self.alphabet_size):
            raise ValueError(
                f"the generator must return logits {(*x_t.shape, self.alphabet_size)} for codes "
                f"{tuple(x_t.shape)} and alphabet_size={self.alphabet_size}, "
                f"got {tuple(logits.shape)}; is the target ('index' or 'bit') the one it was "
                "built for?"
            )
        return logits


def _branches(
    generator: Generator,
    alphabet_size: int,
    *,
    condition: Condition,
    null_condition: Condition | None,
    num_samples: int,
    is_guided: bool,
) -> _Branches:
    condition = expand_rows(condition, num_samples)
    if not is_guided:
        return _Branches(generator, alphabet_size, condition, None)
    if null_condition is None:
        raise ValueError(
            "null_condition is missing, but guidance asks for it; pass the null class or the empty "
            "prompt, or set guidance_scale=1 with a constant schedule."
        )
    null = expand_rows(null_condition, num_samples)
    return _Branches(generator, alphabet_size, condition, concatenate_conditions(condition, null))


def _begin(
    uniform: Callable[..., Tensor], alphabet_size: int, constraint: Constraint | None
) -> RefineState:
    """Return the state before the first step (1 of the algorithm)."""
    x_0 = random_codes(uniform(step=0, stream=Stream.INITIAL), alphabet_size=alphabet_size)
    keep = torch.zeros_like(x_0, dtype=torch.bool)
    ones = torch.ones(len(x_0), device=x_0.device)
    if constraint is None:
        return RefineState(x_0, x_0, x_0, keep, ones)
    if constraint.start_time > 0:
        keep = keep_mask(uniform(step=0, stream=Stream.START), constraint.start_time * ones)
    x_t, x_hat, keep = constraint.begin(x_0, keep)
    return RefineState(x_0, x_t, x_hat, keep, ones)


def _advance(
    state: RefineState,
    step: Step,
    branches: _Branches,
    uniform: Callable[..., Tensor],
    temperature: float,
    constraint: Constraint | None,
) -> RefineState:
    """Return the state after one step (2 of the algorithm)."""
    conditional, guided = branches.logits(state.x_t, step.t, step.guidance_scale)  # 2a
    mean_entropy = entropy(conditional).flatten(1).mean(1)  # 2b
    u = uniform(step=step.number, stream=Stream.DRAW)
    x_hat = draw(guided, u, temperature=temperature)  # 2c
    t_next = mean_entropy.new_full((len(x_hat),), step.t_next)
    keep = keep_mask(uniform(step=step.number, stream=Stream.KEEP), t_next)
    if constraint is not None:
        x_hat, keep = constraint.complete(x_hat), constraint.shown(keep)
    return RefineState(state.x_0, corrupt(x_hat, state.x_0, keep), x_hat, keep, mean_entropy)  # 2d


def _step_info(
    step: Step, num_steps: int, sample_index: Tensor, previous: RefineState, state: RefineState
) -> StepInfo:
    ones = torch.ones_like(state.entropy)
    return StepInfo(
        step=torch.full_like(sample_index, step.number),
        num_steps=torch.full_like(sample_index, num_steps),
        t=step.t * ones,
        t_next=step.t_next * ones,
        guidance_scale=step.guidance_scale * ones,
        sample_index=sample_index,
        entropy=state.entropy,
        codes=state.x_hat,
        keep=state.keep,
        x_t=state.x_t,
        changed_fraction=(state.x_hat != previous.x_hat).flatten(1).float().mean(1),
    )


@torch.no_grad()
def refine(
    generator: Generator,
    shape: tuple[int, ...],
    *,
    condition: Condition,
    null_condition: Condition | None = None,
    sample_index: Tensor,
    seed: int,
    alphabet_size: int,
    config: RefineConfig,
    observer: Callable[[StepInfo], None] | None = None,
    constraint: Constraint | None = None,
) -> RefineResult:
    """Draw one batch of samples by global refinement.

    Args:
        generator: Callable `(codes, t, condition) -> logits`; it is asked in the mode (evaluation,
            autocast, compiled) in which the caller left it.
        shape: Elements of one sample, `(c, *grid)`.
        condition: What to draw, `b` rows.
        null_condition: What guidance steers away from: `b` rows, or one that serves all. Needed
            only if some step is guided.
        sample_index: `(b,)` long, the running number of every sample; with `seed` it fixes all
            random numbers of that sample. Everything is computed on its device.
        seed: Another seed gives other samples.
        alphabet_size: Number of values `k` of an element.
        config: Steps, guidance, temperature.
        observer: Called with a `StepInfo` after every step.
        constraint: Elements that are known beforehand, and where to start. The answer has exactly
            the known codes.

    Returns:
        Codes `(b, c, *grid)`, number of forwards and entropies; the forwards are `num_steps` calls
        with `b (num_steps + guided steps)` rows. A constraint that starts later leaves out the
        steps before.

    Raises:
        ValueError: If rows do not match, if guidance lacks its null condition, if the constraint
            does not fit, or if the generator returns logits of another shape.
    """
    if constraint is not None:
        constraint = constraint.expand(len(sample_index), shape, alphabet_size=alphabet_size)
    steps = config.steps(0.0 if constraint is None else constraint.start_time)
    branches = _branches(
        generator,
        alphabet_size,
        condition=condition,
        null_condition=null_condition,
        num_samples=len(sample_index),
        is_guided=any(step.is_guided for step in steps),
    )
    uniform = partial(counter_uniform, sample_index, seed=seed, shape=tuple(shape))
    state = _begin(uniform, alphabet_size, constraint)
    entropies = []
    for step in steps:
        previous = state
        state = _advance(state, step, branches, uniform, config.temperature, constraint)
        entropies.append(state.entropy)
        if observer is not None:
            observer(_step_info(step, config.num_steps, sample_index, previous, state))
    num_forwards = ForwardCount(
        calls=len(steps), rows=len(sample_index) * sum(1 + step.is_guided for step in steps)
    )
    num_steps = torch.full_like(sample_index, len(steps))
    return RefineResult(state.x_hat, num_forwards, torch.stack(entropies), num_steps)
