"""Baselines of HBQ against an independent library, and against loops."""

import math
from itertools import product

import pytest
import torch
from vector_quantize_pytorch import FSQ, LFQ

from grn_lightning.functional import (
    fsq_decode,
    fsq_encode,
    fsq_squash,
    sign_decode,
    sign_encode,
    sign_entropies,
    straight_through,
)


@pytest.mark.parametrize("num_levels", [3, 5, 6, 8, 16])
def test_finite_scalars_are_those_of_an_independent_library(num_levels: int) -> None:
    x = torch.randn(2, 50, 4) * 2
    theirs = FSQ([num_levels], num_codebooks=4, dim=4)
    z_hat, codes = theirs(x)
    z = fsq_squash(x, num_levels=num_levels)
    assert torch.equal(fsq_encode(z, num_levels=num_levels), codes.long())
    torch.testing.assert_close(fsq_decode(codes.long(), num_levels=num_levels), z_hat)


@pytest.mark.parametrize("num_levels", [3, 4, 5, 8])
def test_every_level_is_reached_and_survives_a_round_trip(num_levels: int) -> None:
    z = fsq_squash(torch.linspace(-20, 20, 4001), num_levels=num_levels)
    assert fsq_encode(z, num_levels=num_levels).unique().tolist() == list(range(num_levels))
    levels = fsq_decode(torch.arange(num_levels), num_levels=num_levels)
    assert torch.equal(fsq_encode(levels, num_levels=num_levels), torch.arange(num_levels))
    assert levels.abs().max() <= 1


def test_squashing_keeps_zero_and_order() -> None:
    for num_levels in (5, 8):
        assert abs(float(fsq_squash(torch.zeros(()), num_levels=num_levels))) < 1e-6
        z = fsq_squash(torch.linspace(-3, 3, 100), num_levels=num_levels)
        assert (z.diff() > 0).all()


def test_latents_that_are_not_finite_get_the_outermost_codes_or_zero() -> None:
    z = torch.tensor([-math.inf, math.inf, math.nan, 9.0])
    assert fsq_encode(z, num_levels=5).tolist() == [0, 4, 0, 4]


@pytest.mark.parametrize("function", [fsq_squash, fsq_encode, fsq_decode])
def test_fewer_than_three_levels_are_refused(function) -> None:
    with pytest.raises(ValueError, match="at least 3, got 2; two levels are signs"):
        function(torch.zeros(1, dtype=torch.long if function is fsq_decode else None), num_levels=2)


def test_signs_survive_a_round_trip_and_zero_is_no_positive_number() -> None:
    bits = torch.tensor([0, 1, 1, 0])
    assert torch.equal(sign_encode(sign_decode(bits)), bits)
    assert sign_encode(torch.tensor([0.0, -0.0, math.nan, 1e-30])).tolist() == [0, 0, 0, 1]


def test_straight_through_is_exact_and_passes_the_gradient() -> None:
    z = torch.randn(100, dtype=torch.float64).requires_grad_()
    z_hat = (z.detach() * 3).round() / 3
    passed = straight_through(z, z_hat)
    assert torch.equal(passed, z_hat)
    (passed * torch.arange(100)).sum().backward()
    assert torch.equal(z.grad, torch.arange(100, dtype=torch.float64))


# ------------------------------------------------------------------ entropies


def entropy_bits(probabilities: torch.Tensor) -> float:
    return float(-sum(p * math.log2(p) for p in probabilities.flatten().tolist() if p > 0))


@pytest.mark.parametrize("group_bits", [1, 2, 3, 5])
def test_entropies_equal_a_loop_over_all_words(group_bits: int) -> None:
    z, temperature = torch.randn(2, 5, 3, dtype=torch.float64), 0.7
    own = overall = 0.0
    for group in z.split(group_bits, dim=1):
        rows = group.movedim(1, -1).flatten(0, -2)
        words = torch.zeros(len(rows), 2 ** rows.shape[1], dtype=torch.float64)
        for row, latents in enumerate(rows):
            for index, word in enumerate(product((-1, 1), repeat=rows.shape[1])):
                pairs = zip(word, latents, strict=True)
                chance = [torch.sigmoid(s * x / temperature) for s, x in pairs]
                words[row, index] = math.prod(float(p) for p in chance)
        own += sum(entropy_bits(row) for row in words) / len(words)
        overall += entropy_bits(words.mean(0))
    found = sign_entropies(z, group_bits=group_bits, temperature=temperature)
    assert float(found.per_position) == pytest.approx(own / 5)
    assert float(found.overall) == pytest.approx(overall / 5)


def test_entropies_are_those_of_an_independent_library() -> None:
    z = torch.randn(4, 6, 3, 3) * 0.1
    theirs = LFQ(codebook_size=8, num_codebooks=2, dim=6)
    _, parts = theirs(z, inv_temperature=5.0, return_loss_breakdown=True)
    ours = sign_entropies(z, group_bits=3, temperature=1 / (4 * 5.0))
    nats_per_group = 3 * math.log(2)
    assert float(ours.per_position) * nats_per_group == pytest.approx(
        float(parts.per_sample_entropy.detach()), abs=1e-3
    )  # theirs takes the logarithm of 1e-5 for smaller probabilities
    assert float(ours.overall) * nats_per_group == pytest.approx(
        float(parts.batch_entropy.detach()), abs=1e-3
    )


def test_certain_and_even_bits_are_the_best_there_is_and_collapsed_ones_the_worst() -> None:
    even = sign_decode(torch.tensor(list(product((0, 1), repeat=3)))) * 50
    best = sign_entropies(even, group_bits=3, temperature=1.0)
    assert float(best.per_position) == pytest.approx(0, abs=1e-6)
    assert float(best.overall) == pytest.approx(1)
    collapsed = sign_entropies(even[:1].expand(8, 3), group_bits=3, temperature=1.0)
    assert float(collapsed.overall) == pytest.approx(0, abs=1e-6)


def test_bits_that_repeat_each_other_are_noticed_within_a_group_only() -> None:
    bit = sign_decode(torch.tensor([[0, 0], [1, 1]])) * 50
    assert float(sign_entropies(bit, group_bits=2, temperature=1.0).overall) == pytest.approx(0.5)
    assert float(sign_entropies(bit, group_bits=1, temperature=1.0).overall) == pytest.approx(1)


def test_entropies_have_finite_gradients_where_bits_are_certain() -> None:
    z = torch.tensor([[1e4, -1e4], [1e-4, 0.0]], requires_grad=True)
    found = sign_entropies(z, group_bits=2, temperature=0.01)
    (found.per_position - found.overall).backward()
    assert z.grad.isfinite().all()


def test_impossible_groups_and_temperatures_are_refused() -> None:
    with pytest.raises(ValueError, match="got 0 and 1.0"):
        sign_entropies(torch.zeros(1, 2), group_bits=0, temperature=1.0)
    with pytest.raises(ValueError, match="temperature positive, got 2 and 0.0"):
        sign_entropies(torch.zeros(1, 2), group_bits=2, temperature=0.0)
