"""Guidance: the convention at 0 and 1, and the published schedules rewritten in it."""

import math

import pytest
import torch

from grn_lightning.functional.guidance import guidance_scale_at, guide
from grn_lightning.functional.timesteps import step_grid


def test_scale_one_is_exactly_the_conditional_and_zero_the_unconditional():
    cond, uncond = torch.randn(2, 3, 5) * 100, torch.randn(2, 3, 5)
    torch.testing.assert_close(guide(cond, uncond, 1.0), cond, rtol=0, atol=0)
    torch.testing.assert_close(guide(cond, uncond, 0.0), uncond, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [0.3, 1.7, 7.5])
def test_guidance_is_linear_in_the_difference(scale):
    cond, uncond = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(guide(cond, uncond, scale), uncond + scale * (cond - uncond))


def test_every_sample_may_have_its_own_scale():
    cond, uncond = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    scales = torch.tensor([0.0, 1.0, 4.0])
    guided = guide(cond, uncond, scales)
    for i, scale in enumerate(scales.tolist()):
        torch.testing.assert_close(
            guided[i : i + 1], guide(cond[i : i + 1], uncond[i : i + 1], scale)
        )


def test_half_precision_is_combined_in_single():
    cond, uncond = torch.randn(2, 3).bfloat16(), torch.randn(2, 3).bfloat16()
    expected = guide(cond.float(), uncond.float(), 4.0)
    torch.testing.assert_close(guide(cond, uncond, 4.0), expected, rtol=0, atol=0)


def test_constant_guidance_ignores_time():
    assert {guidance_scale_at(t, scale=3.0) for t in (0.0, 0.5, 1.0)} == {3.0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_published_interval_guides_the_last_27_of_50_steps(dtype):
    times = step_grid(50).to(dtype)[:-1].tolist()
    scales = [
        guidance_scale_at(t, scale=2.35, schedule="interval", interval=(0.44, 1.0)) for t in times
    ]
    assert scales == [1.0] * 23 + [2.35] * 27


def test_an_interval_is_open_but_for_a_lower_end_of_zero():
    def scale_at(t, interval):
        return guidance_scale_at(t, scale=3.0, schedule="interval", interval=interval)

    assert scale_at(0.0, (0.0, 0.5)) == 3.0
    assert scale_at(0.1, (0.1, 0.5)) == 1.0
    assert scale_at(0.3, (0.1, 0.5)) == 3.0
    assert scale_at(0.5, (0.1, 0.5)) == 1.0


@pytest.mark.parametrize("power", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("strength", [0.0, 1.9, 4.0])
def test_power_cosine_is_the_published_formula_in_our_convention(strength, power):
    cond, uncond = torch.randn(2, 3, 5).double(), torch.randn(2, 3, 5).double()
    for t in (0.0, 0.02, 0.5, 0.98, 1.0):
        g = (1 - math.cos(math.pi * t**power)) / 2
        published = cond + strength * g * (cond - uncond)
        scale = guidance_scale_at(t, scale=strength, schedule="power_cosine", power=power)
        torch.testing.assert_close(guide(cond, uncond, scale), published.float())


def test_power_cosine_rises_from_the_plain_conditional():
    scales = [
        guidance_scale_at(t, scale=2.0, schedule="power_cosine", power=2.0)
        for t in step_grid(20).tolist()
    ]
    assert scales[0] == 1.0
    assert scales[-1] == 3.0
    assert scales == sorted(scales)


def test_refusals_name_what_is_allowed():
    with pytest.raises(ValueError, match="one of constant, interval, power_cosine, got 'linear'"):
        guidance_scale_at(0.5, scale=2.0, schedule="linear")
    for interval in ((0.5, 0.5), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(ValueError, match="0 <= low < high <= 1, got"):
            guidance_scale_at(0.5, scale=2.0, schedule="interval", interval=interval)
    with pytest.raises(ValueError, match="guidance power must be positive, got 0"):
        guidance_scale_at(0.5, scale=2.0, schedule="power_cosine", power=0.0)
