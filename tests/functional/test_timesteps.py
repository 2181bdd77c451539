"""Times: published values of the shift, quantiles of the logit-normal, laws of the grids."""

import math

import pytest
import torch

from grn_lightning.functional.timesteps import SCHEDULES, logit_normal, shift, step_grid


def test_shift_has_the_published_values():
    t = torch.tensor([0.02, 0.1, 0.5, 0.9, 0.98], dtype=torch.float64)
    expected = torch.tensor([0.0051, 0.0270, 0.2, 0.6923, 0.9245], dtype=torch.float64)
    torch.testing.assert_close(shift(t, 4.0), expected, rtol=0, atol=5e-5)  # four decimals


@pytest.mark.parametrize("alpha", [0.25, 1.0, 4.0, 100.0])
def test_shift_multiplies_the_odds_of_noise_and_has_its_inverse(alpha):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    shifted = shift(t, alpha)
    torch.testing.assert_close((1 - shifted[1:]) / shifted[1:], alpha * (1 - t[1:]) / t[1:])
    torch.testing.assert_close(shift(shifted, 1 / alpha), t)
    assert shifted[0] == 0
    assert shifted[-1] == 1


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_shift_refuses_impossible_odds(alpha):
    with pytest.raises(ValueError, match="alpha must be positive and finite"):
        shift(torch.tensor([0.5]), alpha)


def test_logit_normal_has_the_quantiles_of_the_published_recipe():
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t = logit_normal(u, mean=-0.8, std=0.8)
    quantiles = torch.quantile(t, torch.tensor([0.01, 0.5, 0.99]))
    torch.testing.assert_close(quantiles, torch.tensor([0.065, 0.310, 0.743]), rtol=0, atol=5e-4)
    assert t.mean().item() == pytest.approx(0.331, abs=5e-4)
    logit = torch.logit(t.double())
    assert logit.mean().item() == pytest.approx(-0.8, abs=1e-3)
    assert logit.std().item() == pytest.approx(0.8, abs=1e-3)


def test_logit_normal_never_touches_the_ends():
    u = torch.tensor([0.0, 2.0**-24, 1 - 2.0**-24])
    t = logit_normal(u, mean=0.0, std=2.0)
    assert 0 < t[0] < t[1] < t[2] < 1
    assert t.dtype == torch.float32


def test_logit_normal_refuses_no_spread():
    with pytest.raises(ValueError, match="std must be positive, got -1"):
        logit_normal(torch.rand(1), mean=0.0, std=-1.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0, 1000.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50, 4096])
def test_grids_rise_from_exactly_zero_to_exactly_one(num_steps, alpha, schedule):
    grid = step_grid(num_steps, schedule=schedule, alpha=alpha)
    assert grid.shape == (num_steps + 1,)
    assert grid.dtype == torch.float64
    assert grid[0] == 0
    assert grid[-1] == 1
    assert (grid.diff() > 0).all()


@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_grids_are_the_shifted_steps_under_the_schedule(alpha):
    u = [i / 50 for i in range(51)]
    shifted = [x / (x + alpha * (1 - x)) for x in u]
    cosine = [1 - math.cos(math.pi / 2 * x) for x in shifted]
    for schedule, expected in {"linear": shifted, "cosine": cosine}.items():
        grid = step_grid(50, schedule=schedule, alpha=alpha)
        torch.testing.assert_close(grid, torch.tensor(expected, dtype=torch.float64))


def test_the_cosine_grid_passes_through_the_published_times():
    # Published: 0.999 (1 - cos(pi/2 i/49)), rounded as printed here.
    published = {1: "0.00051", 2: "0.00205", 5: "0.0128", 10: "0.0509", 20: "0.198", 25: "0.304"}
    published |= {30: "0.427", 40: "0.715", 45: "0.871", 48: "0.967", 49: "0.999"}
    grid = 0.999 * step_grid(49, schedule="cosine")
    for i, t in published.items():
        assert f"{grid[i]:.{len(t) - 2}f}" == t


def test_grids_refuse_what_they_cannot_place():
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        step_grid(0)
    with pytest.raises(ValueError, match="schedule must be one of linear, cosine, got 'sine'"):
        step_grid(4, schedule="sine")
    with pytest.raises(ValueError, match="makes steps of no length"):
        step_grid(4, alpha=1e-17)
