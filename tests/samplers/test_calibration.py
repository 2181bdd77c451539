import pytest
import torch

from grn_lightning.samplers import RefineConfig, refine
from grn_lightning.samplers.calibration import StepBudget, fit_steps, steps_of, until_decision


def entropies(count: int = 300) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return (0.8 + 0.03 * torch.randn(count, generator=rng)).clamp(0, 1)


@pytest.mark.parametrize("mean_steps", [12.0, 20.0, 25.0, 44.0])
@pytest.mark.parametrize("decision_step", [0, 5])
def test_the_wanted_mean_comes_out_within_the_bounds(mean_steps: float, decision_step: int) -> None:
    budget = StepBudget(mean_steps=mean_steps, min_steps=10, decision_step=decision_step)
    steps = steps_of(fit_steps(entropies(), budget, max_steps=50), entropies(), 50)
    assert steps.double().mean().item() == pytest.approx(mean_steps, abs=0.1)
    assert 10 <= steps.min() <= steps.max() <= 50
    order = entropies().argsort()
    assert (steps[order].diff() >= 0).all()  # the more uncertain, the more steps


def test_coverage_says_how_many_are_neither_at_the_least_nor_at_the_most() -> None:
    def inside(coverage: float) -> float:
        budget = StepBudget(mean_steps=30, min_steps=10, coverage=coverage)
        steps = steps_of(fit_steps(entropies(), budget, max_steps=50), entropies(), 50)
        return ((steps > 10) & (steps < 50)).double().mean().item()

    assert inside(0.3) < inside(0.6) < inside(0.95)
    assert inside(0.6) == pytest.approx(0.6, abs=0.08)


def test_equal_samples_all_take_the_mean() -> None:
    equal = torch.full((20,), 0.4)
    rule = fit_steps(equal, StepBudget(mean_steps=17), max_steps=50)
    assert rule.slope == 0
    assert steps_of(rule, equal, 50).tolist() == [17] * 20


def test_calibration_walks_no_further_than_the_decision() -> None:
    def generator(codes: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return ((codes[..., None] * 7 + torch.arange(4) * 11) % 13) / 3 * (1 + t[0])

    config = RefineConfig(num_steps=50, schedule="cosine")
    options = {
        "condition": torch.zeros(3, dtype=torch.long),
        "sample_index": torch.arange(3),
        "seed": 0,
        "alphabet_size": 4,
    }
    whole = refine(generator, (2, 3, 3), config=config, **options)
    short = refine(generator, (2, 3, 3), config=until_decision(config, 5), **options)
    assert short.num_forwards.calls == 6
    assert torch.equal(short.entropy, whole.entropy[:6])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean_steps": 8}, "mean_steps must be between .* got 8, 10 and 50"),
        ({"mean_steps": 60}, "mean_steps must be between"),
        ({"min_steps": 5}, "decision_step < min_steps"),
        ({"coverage": 0.0}, r"coverage must be in \(0, 1\], got 0.0"),
    ],
)
def test_budgets_that_nothing_can_meet_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match="StepBudget: .*" + message):
        fit_steps(entropies(), StepBudget(**settings), max_steps=50)


def test_one_sample_is_too_few() -> None:
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        fit_steps(entropies(1), StepBudget(), max_steps=50)
