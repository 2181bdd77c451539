r"""Prompt-to-prompt editing: follow the source, but where two prompts disagree, the target.

Source: RefineEdit (arXiv 2609.20633), which edits what the sampler itself draws; editing of given
codes is ours. Two trajectories, of the source and of the edit, take the same steps with the same
random numbers. For one batch of samples on a grid of any rank:

    1. Draw a random map ``x_0``. Both start from it: ``x_s = x_e = x_0`` at ``t = 0``. No element
       was ever selected, no mask is frozen.
    2. For every step ``i``, with ``t = t_i`` and ``t_next = t_{i+1}``:
       a. ask the generator, in one call, for the logits given ``x_s`` and the source's condition
          and for those given ``x_e`` and the target's (and without a condition, where guided);
       b. draw every element of both with the same numbers: ``s`` and ``e``. Given codes need no
          drawing: they are ``s`` at every step;
       c. measure ``d = p_source(s) - p_target(s)`` for every element: how much less the target
          believes in the source's choice; ``D`` is its mean over the elements of a position;
       d. select positions with ``D > position_threshold``, unless the sample's mask is frozen: then
          those of the mask. At the first step with ``t >= freeze_time`` the mask is frozen, if the
          mean of ``D - position_threshold`` over it exceeds ``freeze_threshold``;
       e. select in these positions the elements with ``d > element_threshold``. An element may be
          edited now, and in the ``lock_steps`` steps after it was last selected, but never outside
          a frozen mask;
       f. the edit is ``e`` where it may be edited, ``s`` elsewhere;
       g. keep a share ``t_next`` of both, the same elements, and mix with ``x_0``.
    3. Return the last complete edit. Where it was not edited at the last step, it is the source.

Equal prompts have ``d = 0`` everywhere, so they return the source, exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from grn_lightning.functional.categorical import draw, log_prob_of
from grn_lightning.functional.corruption import corrupt, keep_mask, random_codes
from grn_lightning.functional.guidance import guide
from grn_lightning.functional.random import Stream, counter_uniform
from grn_lightning.samplers.conditions import Condition, concatenate_conditions, expand_rows
from grn_lightning.samplers.refine import ForwardCount, Generator, RefineConfig, Step

_NEVER = 2**30  # steps since an element was selected that never was


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """Which elements an edit may change."""

    position_threshold: float = 0.02
    """Positions whose elements lose more probability than this on average are selected; between -1
    and 1. Infinity selects none, -infinity all."""

    element_threshold: float = 0.5
    """Elements of a selected position that lose more probability than this are selected. Higher
    values keep more of the source; this and the former are the best of some that were tried on
    the embedded clips (docs/sampling.md)."""

    lock_steps: int = 2
    """Steps for which an element may still be edited after it was last selected."""

    freeze_time: float = 1.0
    """Time at which the selected positions may be frozen; 1 never does."""

    freeze_threshold: float = 0.0
    """They are, if on average they exceed `position_threshold` by more than this."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant, all issues at once."""
        issues = []
        for name in ("position_threshold", "element_threshold", "freeze_threshold"):
            if getattr(self, name) != getattr(self, name):
                issues.append(f"{name} must be a number, got nan")
        if self.lock_steps < 0:
            issues.append(f"lock_steps must be at least 0, got {self.lock_steps}")
        if not 0 <= self.freeze_time <= 1:
            issues.append(f"freeze_time must be in [0, 1], got {self.freeze_time}")
        if issues:
            raise ValueError("EditConfig: " + "; ".join(issues) + ".")


@dataclass(frozen=True)
class EditStep:
    """What an observer is told after every step. The tensors are the sampler's own: read only."""

    step: int
    """Number of this step, from 0."""

    num_steps: int
    """Steps of the whole trajectory."""

    t: float
    """Time at which the generator was asked."""

    sample_index: Tensor
    """`(b,)` long: which samples these are."""

    source: Tensor
    """`(b, c, *grid)` long: the complete source of this step."""

    codes: Tensor
    """`(b, c, *grid)` long: the complete edit of this step."""

    difference: Tensor
    """`(b, c, *grid)` float in [-1, 1]: probability that the source's choice loses."""

    editable: Tensor
    """`(b, c, *grid)` bool: where the edit need not be the source."""


@dataclass(frozen=True)
class EditResult:
    """The edits, what they were made from, and what they cost."""

    codes: Tensor
    """`(b, c, *grid)` long in [0, k): the edits."""

    source: Tensor
    """`(b, c, *grid)` long: the sources; exactly `codes` outside `editable`."""

    editable: Tensor
    """`(b, c, *grid)` bool: what was edited at the last step."""

    is_frozen: Tensor
    """`(b,)` bool: whether a sample's positions were frozen on the way."""

    num_forwards: ForwardCount
    """Calls of the generator and rows in them."""


class _State(NamedTuple):
    """All that both trajectories carry from one step to the next."""

    x_0: Tensor  # (b, c, *grid)
    source_t: Tensor
    edit_t: Tensor
    age: Tensor  # (b, c, *grid) long: steps since an element was last selected
    frozen: Tensor  # (b, 1, *grid) bool
    is_frozen: Tensor  # (b,) bool
    share: Tensor  # (b,) float: realised share of kept elements


class _Drawn(NamedTuple):
    """Complete maps of one step, `(b, c, *grid)`."""

    source: Tensor
    edit: Tensor
    difference: Tensor
    editable: Tensor


@dataclass(frozen=True)
class _Prompts:
    """The generator with the rows of both trajectories: source, edit, and both without prompt."""

    generator: Generator
    prompted: Condition
    with_null: Condition | None

    def logits(
        self, source_t: Tensor, edit_t: Tensor, t: Tensor, step: Step
    ) -> tuple[Tensor, Tensor]:
        """Return guided logits of source and edit, `(b, c, *grid, k)`, at times `(b,)`."""
        maps, condition = torch.cat([source_t, edit_t]), self.prompted
        if step.is_guided:
            assert self.with_null is not None, "edit() has looked for guided steps"
            maps, condition = torch.cat([maps, maps]), self.with_null
        logits = self.generator(maps, t.repeat(len(maps) // len(t)), condition)
        if step.is_guided:
            prompted, unprompted = logits.chunk(2)
            logits = guide(prompted, unprompted, step.guidance_scale)
        source, edit = logits.chunk(2)
        return source, edit


def _prompts(
    generator: Generator,
    source: Condition,
    target: Condition,
    null: Condition | None,
    *,
    num_samples: int,
    is_guided: bool,
) -> _Prompts:
    rows = [expand_rows(one, num_samples) for one in (source, target)]
    prompted = concatenate_conditions(*rows)
    if not is_guided:
        return _Prompts(generator, prompted, None)
    if null is None:
        raise ValueError(
            "null_condition is missing, but guidance asks for it; pass the null class or the empty "
            "prompt, or set guidance_scale=1 with a constant schedule."
        )
    null = expand_rows(null, num_samples)
    null = concatenate_conditions(null, null)
    return _Prompts(generator, prompted, concatenate_conditions(prompted, null))


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _route(
    state: _State, difference: Tensor, config: EditConfig, *, is_switch: bool
) -> tuple[_State, Tensor]:
    """Return the state with new ages and masks, and what may be edited (2d and 2e)."""
    mean = difference.mean(1, keepdim=True)  # (b, 1, *grid)
    frozen_rows = _per_sample(state.is_frozen, mean)
    positions = torch.where(frozen_rows, state.frozen, mean > config.position_threshold)
    if is_switch:
        excess = torch.where(positions, mean - config.position_threshold, 0.0).flatten(1).sum(1)
        count = positions.flatten(1).sum(1)
        is_frozen = (count > 0) & (excess > config.freeze_threshold * count)
        state = state._replace(frozen=positions, is_frozen=is_frozen)
    selected = positions & (difference > config.element_threshold)
    age = torch.where(selected, 0, state.age + 1)
    inside = ~_per_sample(state.is_frozen, mean) | state.frozen
    return state._replace(age=age), inside & (age <= config.lock_steps)


def _switch_step(steps: list[Step], freeze_time: float) -> int:
    """Return the number of the first step at or after the time; none if there is no such step."""
    return next((step.number for step in steps if freeze_time < 1 and step.t >= freeze_time), -1)


class _Editor:
    """One job: what stays the same from step to step.

    Args:
        prompts: Whom to ask.
        uniform: Random numbers of the samples.
        config: Which elements may change.
        given: Codes of the sources, or None where the source is drawn.
        realised_time: Whether the generator is told the realised share of kept elements.
    """

    def __init__(
        self,
        prompts: _Prompts,
        uniform: Callable[..., Tensor],
        config: EditConfig,
        *,
        given: Tensor | None,
        realised_time: bool,
    ):
        self.prompts, self.uniform, self.config = prompts, uniform, config
        self.given, self.realised_time = given, realised_time

    def begin(self, alphabet_size: int) -> _State:
        """Return the state before the first step (1 of the algorithm)."""
        u = self.uniform(step=0, stream=Stream.INITIAL)
        x_0 = random_codes(u, alphabet_size=alphabet_size)
        nowhere = torch.zeros_like(x_0[:, :1], dtype=torch.bool)
        is_frozen = torch.zeros(len(x_0), dtype=torch.bool, device=x_0.device)
        share = torch.zeros(len(x_0), device=x_0.device)
        return _State(x_0, x_0, x_0, torch.full_like(x_0, _NEVER), nowhere, is_frozen, share)

    def advance(self, state: _State, step: Step, *, is_switch: bool) -> tuple[_State, _Drawn]:
        """Return the state after one step, and what it has drawn (2 of the algorithm)."""
        t = state.share if self.realised_time else torch.full_like(state.share, step.t)
        logits = self.prompts.logits(state.source_t, state.edit_t, t, step)  # 2a
        u = self.uniform(step=step.number, stream=Stream.DRAW)
        source, edit = (draw(one, u, temperature=step.temperature) for one in logits)  # 2b
        source = source if self.given is None else self.given
        # Greedy drawing, temperature 0, is measured at 1.
        belief = [log_prob_of(one, source, temperature=step.temperature or 1.0) for one in logits]
        difference = belief[0].exp() - belief[1].exp()  # 2c
        state, editable = _route(state, difference, self.config, is_switch=is_switch)  # 2d, 2e
        edit = torch.where(editable, edit, source)  # 2f
        t_next = torch.full_like(state.share, step.t_next)
        keep = keep_mask(self.uniform(step=step.number, stream=Stream.KEEP), t_next)
        state = state._replace(
            source_t=corrupt(source, state.x_0, keep),
            edit_t=corrupt(edit, state.x_0, keep),
            share=keep.flatten(1).float().mean(1),
        )  # 2g
        return state, _Drawn(source, edit, difference, editable)


def _check_given(given: Tensor | None, num_samples: int, shape: tuple[int, ...], k: int) -> None:
    if given is None:
        return
    if given.shape != (num_samples, *shape):
        raise ValueError(
            f"source_codes must be {(num_samples, *shape)}, one map per sample, "
            f"got {tuple(given.shape)}."
        )
    if given.numel() and not 0 <= given.min() <= given.max() < k:
        raise ValueError(
            f"source_codes must be in [0, {k}), got {given.min()} to {given.max()}; are they "
            "elements of the generator's target ('index' or 'bit')?"
        )


@torch.no_grad()
def edit(
    generator: Generator,
    shape: tuple[int, ...],
    *,
    source_condition: Condition,
    target_condition: Condition,
    null_condition: Condition | None = None,
    source_codes: Tensor | None = None,
    sample_index: Tensor,
    seed: int,
    alphabet_size: int,
    config: RefineConfig,
    edit_config: EditConfig,
    observer: Callable[[EditStep], None] | None = None,
) -> EditResult:
    """Draw sources and edit them on the way, or edit given ones.

    Args:
        generator: As in `refine`.
        shape: Elements of one sample, `(c, *grid)`.
        source_condition: What the source shows: `b` rows, or one for all.
        target_condition: What the edit shall show: `b` rows, or one for all.
        null_condition: As in `refine`.
        source_codes: `(b, c, *grid)` long, the sources; None draws them as `refine` would.
        sample_index: `(b,)` long.
        seed: As in `refine`.
        alphabet_size: As in `refine`.
        config: Steps, guidance, temperature; steps cannot be adaptive.
        edit_config: Which elements may change.
        observer: Called with an `EditStep` after every step.

    Returns:
        Edits and sources; the forwards are `num_steps` calls with `2 b (num_steps + guided steps)`
        rows.

    Raises:
        ValueError: If rows or codes do not match, guidance lacks its null condition, or steps are
            adaptive.
    """
    _check_given(source_codes, len(sample_index), tuple(shape), alphabet_size)
    if config.adaptive is not None:
        raise ValueError("editing takes the same steps for all samples; set adaptive to null.")
    steps = config.steps()
    prompts = _prompts(
        generator,
        source_condition,
        target_condition,
        null_condition,
        num_samples=len(sample_index),
        is_guided=any(step.is_guided for step in steps),
    )
    uniform = partial(counter_uniform, sample_index, seed=seed, shape=tuple(shape))
    editor = _Editor(
        prompts, uniform, edit_config, given=source_codes, realised_time=config.realised_time
    )
    state, switch = editor.begin(alphabet_size), _switch_step(steps, edit_config.freeze_time)
    for step in steps:
        state, drawn = editor.advance(state, step, is_switch=step.number == switch)
        if observer is not None:
            observer(
                EditStep(
                    step=step.number,
                    num_steps=len(steps),
                    t=step.t,
                    sample_index=sample_index,
                    source=drawn.source,
                    codes=drawn.edit,
                    difference=drawn.difference,
                    editable=drawn.editable,
                )
            )
    rows = 2 * len(sample_index) * sum(1 + step.is_guided for step in steps)
    return EditResult(
        codes=drawn.edit,
        source=drawn.source,
        editable=drawn.editable,
        is_frozen=state.is_frozen,
        num_forwards=ForwardCount(calls=len(steps), rows=rows),
    )
