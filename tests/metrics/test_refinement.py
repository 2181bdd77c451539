"""Drawn codes beside true ones: shares and ratios by hand, and alarms that ring for a reason."""

import math

import pytest
import torch

from grn_lightning.functional import codes_to_bits
from grn_lightning.metrics.refinement import RefinementAlarms, compare_codes
from grn_lightning.metrics.rounds import RoundAccuracy

SHAPE = (12, 3, 4, 4)


def codes(seed: int, low: int = 0, high: int = 8) -> torch.Tensor:
    return torch.randint(low, high, SHAPE, generator=torch.Generator().manual_seed(seed))


def test_gaps_and_ratios_are_those_of_a_count() -> None:
    drawn, true = codes(0, 0, 5), codes(1)
    found = compare_codes(drawn, true, num_rounds=3)
    shares = [
        codes_to_bits(part, num_rounds=3).unflatten(1, (3, -1)).double().mean((0, 2, 3, 4))
        for part in (drawn, true)
    ]
    torch.testing.assert_close(found.balance_gap, (shares[0] - shares[1]).abs())

    def entropy(part: torch.Tensor) -> float:
        total = 0.0
        for channel in range(3):
            values = part[:, channel].flatten().tolist()
            shares = [values.count(v) / len(values) for v in set(values)]
            total -= sum(share * math.log(share) for share in shares)
        return total

    def difference(part: torch.Tensor) -> float:
        pairs = [(i, j) for i in range(12) for j in range(i)]
        return sum(float((part[i] != part[j]).double().mean()) for i, j in pairs) / len(pairs)

    assert found.entropy_ratio == pytest.approx(entropy(drawn) / entropy(true))
    assert found.difference_ratio == pytest.approx(difference(drawn) / difference(true))


def test_like_codes_ring_no_alarm() -> None:
    found = compare_codes(codes(0), codes(1), num_rounds=3)
    assert RefinementAlarms().sentences(found, torch.rand(5, 12)) == []


def test_one_sample_for_all_rings() -> None:
    drawn = codes(0)[:1].expand(SHAPE)
    [text] = RefinementAlarms().sentences(compare_codes(drawn, codes(1), num_rounds=3))
    assert text.startswith("drawn samples differ from one another 0% as much as true ones")


def test_few_values_ring_for_entropy_and_balance() -> None:
    drawn = codes(0, 6, 8)  # bits 1, 1, x
    texts = RefinementAlarms().sentences(compare_codes(drawn, codes(1), num_rounds=3))
    assert [text[:17] for text in texts[:2]] == ["bits of round 0 a", "bits of round 1 a"]
    assert "ones in 100% of drawn codes and in 5" in texts[0]
    assert any(text.startswith("codes of drawn samples carry 3") for text in texts)


def test_nan_is_told_even_of_two_samples_and_the_rest_is_not() -> None:
    drawn = codes(0)[:1].expand(2, 3, 4, 4)
    found = compare_codes(drawn, codes(1)[:2], num_rounds=3)
    entropy = torch.tensor([[0.5, math.nan], [0.5, 0.5]])
    assert RefinementAlarms().sentences(found) == []
    [text] = RefinementAlarms().sentences(found, entropy)
    assert "returned NaN" in text
    shorter = torch.tensor([[0.5, 0.5], [0.5, math.nan]])  # one sample took one step
    assert RefinementAlarms().sentences(found, shorter) == []


def test_a_single_sample_has_no_difference() -> None:
    found = compare_codes(codes(0)[:1], codes(1)[:1], num_rounds=3)
    assert math.isnan(found.difference_ratio)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(12, 3, 4, 4\) and \(2, 3, 4, 4\)"):
        compare_codes(codes(0), codes(1)[:2], num_rounds=3)
    with pytest.raises(ValueError, match=r"max_balance_gap must be in \[0, 1\], got 2"):
        RefinementAlarms(max_balance_gap=2)
    with pytest.raises(ValueError, match="must be at least 1, got 2 and 0"):
        RoundAccuracy(num_rounds=2, num_bins=0)


def test_sums_of_accuracy_do_not_depend_on_batches() -> None:
    torch.manual_seed(0)
    loss, accuracy, t = torch.rand(3, 40).unbind()
    by_round, weights = torch.rand(40, 2), (torch.rand(40) < 0.8).float()
    whole, parts = (RoundAccuracy(num_rounds=2, num_bins=4) for _ in range(2))
    whole.update(loss, accuracy, by_round, t, weights)
    for start in range(0, 40, 7):
        rows = slice(start, start + 7)
        parts.update(loss[rows], accuracy[rows], by_round[rows], t[rows], weights[rows])
    result = whole.compute()
    for one, other in zip(result, parts.compute(), strict=True):
        torch.testing.assert_close(one, other)
    for number in range(4):
        rows = ((t * 4).long() == number) & (weights > 0)
        assert result.num_samples[number] == rows.sum()
        torch.testing.assert_close(result.by_round[number], by_round[rows].double().mean(0))
        torch.testing.assert_close(result.loss[number], loss[rows].double().mean())
