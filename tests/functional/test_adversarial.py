"""Losses of the adversarial game against sums written out element by element."""

import math

import pytest
import torch
from torch import Tensor, nn

from grn_lightning.functional import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    lecam_penalty,
    r1_penalty,
)


def logits(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- losses ---------------------------------------------------------------------------------------


def test_hinge_is_half_the_sum_of_two_means():
    real, fake = logits(0, 2, 1, 3, 3), logits(1, 4, 1, 2, 2)  # maps of different size
    means = [
        sum(max(0.0, 1 + sign * float(x)) for x in values.flatten()) / values.numel()
        for sign, values in ((-1, real), (1, fake))
    ]
    assert float(discriminator_loss(real, fake)) == pytest.approx(sum(means) / 2, rel=1e-6)


def test_vanilla_is_half_the_sum_of_two_cross_entropies():
    real, fake = logits(0, 5), logits(1, 7)
    means = [
        sum(math.log1p(math.exp(sign * float(x))) for x in values) / len(values)
        for sign, values in ((-1, real), (1, fake))
    ]
    found = discriminator_loss(real, fake, kind="vanilla")
    assert float(found) == pytest.approx(sum(means) / 2, rel=1e-6)


def test_a_blind_discriminator_has_the_loss_of_chance():
    nothing = torch.zeros(3)
    assert float(discriminator_loss(nothing, nothing)) == 1
    found = float(discriminator_loss(nothing, nothing, kind="vanilla"))
    assert found == pytest.approx(math.log(2))


def test_logits_beyond_the_margin_give_the_hinge_no_gradient():
    real = torch.tensor([2.0, 0.5], requires_grad=True)
    fake = torch.tensor([-2.0, 0.5], requires_grad=True)
    discriminator_loss(real, fake).backward()
    assert real.grad.tolist() == [0.0, -0.25]
    assert fake.grad.tolist() == [0.0, 0.25]


def test_the_generator_wants_high_logits_of_its_fakes():
    fake = logits(2, 3, 1, 4)
    mean = sum(map(float, fake.flatten())) / 12
    assert float(generator_loss(fake)) == pytest.approx(-mean, rel=1e-5)


def test_bfloat16_logits_are_summed_in_float32():
    many = torch.full((4099,), 1.0078125, dtype=torch.bfloat16)
    assert generator_loss(many).dtype == torch.float32
    assert float(generator_loss(many)) == pytest.approx(-1.0078125, rel=1e-6)


# --- penalties ------------------------------------------------------------------------------------


def test_lecam_is_the_mean_squared_excess_over_the_other_average():
    real, fake = logits(0, 6), logits(1, 4)
    averages = {"real_average": torch.tensor(0.7), "fake_average": torch.tensor(-0.2)}
    above = sum(max(0.0, float(x) + 0.2) ** 2 for x in real) / 6
    below = sum(max(0.0, 0.7 - float(x)) ** 2 for x in fake) / 4
    assert float(lecam_penalty(real, fake, **averages)) == pytest.approx(above + below, rel=1e-5)


def test_r1_of_a_linear_discriminator_is_half_its_squared_weights():
    """The gradient of `mean(w_k . x)` is the mean of the rows `w_k`, whatever `x` is."""
    linear = nn.Linear(5, 3).double()
    images = torch.randn(4, 1, 5, dtype=torch.float64, requires_grad=True)
    penalty = r1_penalty(linear(images), images)
    expected = 0.5 * sum(float(w.mean()) ** 2 for w in linear.weight.detach().T)
    assert penalty.item() == pytest.approx(expected, rel=1e-6)
    penalty.backward()  # it can be minimized
    torch.testing.assert_close(
        linear.weight.grad, linear.weight.detach().mean(0).expand(3, 5) / 3, rtol=1e-5, atol=1e-7
    )


def test_r1_is_a_mean_over_samples():
    """Doubling the batch does not double it; the norm is per sample."""
    images = torch.randn(3, 2, 2, requires_grad=True)
    one = r1_penalty(images.pow(2).flatten(1).sum(1, keepdim=True), images)
    norms = [(2 * image).square().sum().item() for image in images]
    assert one.item() == pytest.approx(0.5 * sum(norms) / 3, rel=1e-5)


# --- balance --------------------------------------------------------------------------------------


def test_the_adaptive_weight_makes_both_gradients_equally_long():
    weight = torch.randn(3, 3, requires_grad=True)
    first, second = (weight**2).sum(), (7 * weight.sin()).sum()
    factor = adaptive_weight(first, second, weight)
    assert not factor.requires_grad
    lengths = [
        float(torch.autograd.grad(loss, weight, retain_graph=True)[0].norm())
        for loss in (first, factor * second)
    ]
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-3)


def test_the_adaptive_weight_is_bounded():
    weight = torch.ones(2, requires_grad=True)
    factor = adaptive_weight(weight.sum(), 1e-9 * weight.sum(), weight, largest=50.0)
    assert float(factor) == 50
