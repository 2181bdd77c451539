"""Laws of adaptive steps: the rule, the walk that follows from it, and who leaves when."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from grn_lightning.functional import step_grid
from grn_lightning.samplers import (
    AdaptiveSteps,
    Constraint,
    RefineConfig,
    RefineResult,
    StepInfo,
    get_preset,
    refine,
)

SHAPE = (2, 4, 3)
RULE = AdaptiveSteps(slope=20.0, offset=-2.0, decision_step=3, min_steps=5)
INTERVAL = {"guidance_scale": 2.0, "guidance_schedule": "interval", "guidance_interval": (0.3, 0.9)}


def generator(codes: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Logits that are the more certain the larger the label, and depend on all that is given."""
    per_row = (labels * 5 + (t * 100).round().long()).view(-1, *[1] * codes.ndim)
    mixed = (codes * 7 + codes.flatten(1).roll(1, 1).view_as(codes) * 3)[..., None]
    logits = ((mixed + per_row + torch.arange(4) * 11) % 13) / 3
    return logits * (labels / 3).view(-1, *[1] * codes.ndim)


def run(labels: list[int], **settings) -> tuple[RefineResult, list[StepInfo]]:
    seen: list[StepInfo] = []
    ask = settings.pop("generator", generator)
    constraint = settings.pop("constraint", None)
    result = refine(
        ask,
        SHAPE,
        condition=torch.tensor(labels),
        null_condition=torch.tensor([3]),
        sample_index=torch.tensor(labels) * 10,
        seed=7,
        alphabet_size=4,
        config=RefineConfig(**{"num_steps": 16, "adaptive": RULE, **settings}),
        observer=seen.append,
        constraint=constraint,
    )
    return result, seen


def test_the_published_table_comes_out() -> None:
    config = get_preset("c2i-b-adaptive")
    assert config.adaptive is not None
    table = {0.90: 15, 0.907: 15, 0.91: 17, 0.92: 24, 0.93: 31, 0.94: 38, 0.95: 45, 1.0: 45}
    factors = {15: 0.625, 17: 0.675, 24: 0.85, 31: 1.0, 38: 1.0, 45: 1.0}
    for entropy, remaining in table.items():
        assert config.adaptive.num_remaining(entropy, 50) == remaining
        assert config.adaptive.temperature_factor(remaining) == pytest.approx(factors[remaining])
        steps = config.steps(num_remaining=remaining)
        assert len(steps) == 5 + remaining
        for i, step in enumerate(steps):  # the formula of the published program
            t_next = (i + 1) / 50 if i < 5 else 0.1 + 0.9 * (i + 1 - 5) / remaining
            assert step.t_next == pytest.approx(t_next, abs=1e-12)
            factor = 1.0 if i < 5 else factors[remaining]
            assert step.temperature == pytest.approx(1.31 * factor)


@pytest.mark.parametrize("cap", [1.0, 0.95])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_as_many_steps_as_planned_change_nothing(cap: float, schedule: str) -> None:
    settings = {"schedule": schedule, "alpha": 2.0, "cap": cap}
    paced = step_grid(12, decision_step=4, num_remaining=8, **settings)
    assert torch.equal(paced, step_grid(12, **settings))


@pytest.mark.parametrize("cap", [1.0, 0.95])
@pytest.mark.parametrize("num_remaining", [1, 2, 7, 8, 20])
def test_the_way_after_the_decision_is_walked_in_equal_steps(
    cap: float, num_remaining: int
) -> None:
    plain = step_grid(12, cap=cap)
    paced = step_grid(12, cap=cap, decision_step=4, num_remaining=num_remaining)
    assert len(paced) == 4 + num_remaining + 1
    assert torch.equal(paced[:5], plain[:5])
    assert paced[-1] == 1
    rest = paced[4:] if cap == 1 else paced[4:-1]
    if len(rest) > 1:
        assert rest[-1].item() == pytest.approx(cap)
        torch.testing.assert_close(rest.diff(), rest.diff()[:1].expand(len(rest) - 1))


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 2.0}, INTERVAL])
def test_everybody_gets_the_steps_of_the_rule_and_is_asked_about_no_more(
    compact: bool, guidance: dict
) -> None:
    labels = [1, 2, 4, 6, 9, 12]
    result, seen = run(labels, compact=compact, **guidance)
    for row, label in enumerate(labels):
        remaining = RULE.num_remaining(result.entropy[3, row].item(), 16)
        assert result.num_steps[row] == 3 + remaining
        steps = RefineConfig(num_steps=16, adaptive=RULE, **guidance).steps(num_remaining=remaining)
        asked = len(steps) + sum(step.is_guided for step in steps)
        assert result.num_evaluations[row] == asked
        mine = [info for info in seen if label * 10 in info.sample_index.tolist()]
        assert len(mine) == len(steps)
        assert len(result.entropy_curve(row)) == len(steps)
        assert (result.entropy[len(steps) :, row] == 0).all()
    assert len(set(result.num_steps.tolist())) >= 4
    if compact:
        assert result.num_forwards.rows == result.num_evaluations.sum()
        assert result.num_forwards.calls == result.num_steps.max()


def test_the_fixed_walk_is_the_one_that_asks_for_all_steps() -> None:
    always = AdaptiveSteps(slope=0.0, offset=50.0, decision_step=3, min_steps=5)
    adaptive, _ = run([1, 5, 9], adaptive=always, **INTERVAL)
    fixed, _ = run([1, 5, 9], adaptive=None, **INTERVAL)
    assert torch.equal(adaptive.codes, fixed.codes)
    assert torch.equal(adaptive.entropy, fixed.entropy)
    assert torch.equal(adaptive.num_evaluations, fixed.num_evaluations)


@pytest.mark.parametrize("temperature_by_steps", [False, True])
def test_a_sample_does_not_notice_who_leaves(temperature_by_steps: bool) -> None:
    rule = AdaptiveSteps(
        slope=20.0,
        offset=-2.0,
        decision_step=3,
        min_steps=5,
        temperature_by_steps=temperature_by_steps,
    )
    labels = [12, 1, 9, 2, 6, 4]
    settings = {"adaptive": rule, **INTERVAL}
    together, _ = run(labels, **settings)
    for other in (
        run(labels, **settings, compact=False)[0],
        run(labels, **settings, rows_per_call=4)[0],
    ):
        assert torch.equal(other.codes, together.codes)
        assert torch.equal(other.entropy, together.entropy)
        assert torch.equal(other.num_steps, together.num_steps)
    for row, label in enumerate(labels):
        alone, _ = run([label], **settings)
        assert torch.equal(alone.codes[0], together.codes[row])
        assert torch.equal(alone.entropy_curve(0), together.entropy_curve(row))


def test_without_a_condition_only_rows_with_a_weight_are_asked_about() -> None:
    asked: Counter[int] = Counter()

    def watching(codes: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        asked.update(labels.tolist())
        return generator(codes, t, labels)

    result, seen = run([1, 12], generator=watching, **INTERVAL)
    guided = sum((info.guidance_scale != 1).sum().item() for info in seen)
    assert asked[3] == guided
    assert 0 < guided < result.num_forwards.rows / 2
    assert any(len(set(info.guidance_scale.tolist())) == 2 for info in seen)


def test_every_call_has_the_same_number_of_rows() -> None:
    sizes: Counter[int] = Counter()

    def watching(codes: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        assert len(codes) == len(t) == len(labels)
        sizes[len(codes)] += 1
        return generator(codes, t, labels)

    result, _ = run([1, 12, 4, 5, 6], generator=watching, rows_per_call=4, **INTERVAL)
    assert set(sizes) == {4}
    assert result.num_forwards.calls == sizes[4]
    assert result.num_forwards.rows == result.num_evaluations.sum()


def test_the_realised_share_is_what_the_generator_is_told() -> None:
    told: list[Tensor] = []

    def watching(codes: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        told.append(t)
        return generator(codes, t, labels)

    settings = {"num_steps": 6, "schedule": "cosine", "time_cap": 0.95, "realised_time": True}
    result, seen = run([1, 5], generator=watching, adaptive=None, **settings)
    assert result.num_forwards.calls == 6
    assert (told[0] == 0).all()
    for info, t in zip(seen[:-1], told[1:], strict=True):
        assert torch.equal(t, info.keep.flatten(1).float().mean(1))
    assert seen[-2].t_next.tolist() == pytest.approx([0.95] * 2)
    assert seen[-1].keep.all()


@pytest.mark.parametrize("mode", ["clean", "renoised"])
def test_constraints_hold_at_any_pace(mode: str) -> None:
    codes = torch.randint(0, 4, (4, *SHAPE), generator=torch.Generator().manual_seed(1))
    mask = torch.rand(codes.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    result, _ = run([1, 12, 4, 6], constraint=Constraint(codes, mask, mode))
    assert torch.equal(result.codes[mask], codes[mask])
    assert len(set(result.num_steps.tolist())) > 1


def test_a_start_behind_the_decision_takes_the_steps_that_are_left() -> None:
    codes = torch.zeros(1, *SHAPE, dtype=torch.long)
    late = Constraint(codes, torch.zeros_like(codes, dtype=torch.bool), start_time=0.5)
    result, _ = run([1, 12], constraint=late)
    assert result.num_steps.tolist() == [8, 8]


def test_certainty_makes_no_nan() -> None:
    def certain(codes: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return torch.tensor([-torch.inf, 0.0, -torch.inf, -1e30]).expand(*codes.shape, 4)

    result, _ = run([1, 2], generator=certain)
    assert result.num_steps.tolist() == [5, 5]
    assert (result.entropy == 0).all()
    assert (result.codes == 1).all()


def test_a_generator_that_returns_nan_is_named() -> None:
    def broken(codes: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return torch.full((*codes.shape, 4), torch.nan)

    with pytest.raises(ValueError, match="entropy at step 3 is NaN.*generator returned NaN"):
        run([1], generator=broken)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_steps": 2}, "decision_step < min_steps <= num_steps must hold, got 3, 2 and 16"),
        ({"min_steps": 17}, "must hold, got 3, 17 and 16"),
        ({"decision_step": -1}, "0 <= decision_step"),
        ({"slope": float("nan")}, "slope and offset must be finite, got nan"),
    ],
)
def test_rules_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    values = {"slope": 20.0, "offset": -2.0, "decision_step": 3, "min_steps": 5, **settings}
    with pytest.raises(ValueError, match="adaptive: .*" + message):
        RefineConfig(num_steps=16, adaptive=AdaptiveSteps(**values))
