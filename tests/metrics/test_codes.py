import math

import pytest
import torch

from grn_lightning.functional import bit_statistics
from grn_lightning.metrics import CodeAlarms, CodeStatistics


def report(codes: torch.Tensor, num_rounds: int, **options):
    metric = CodeStatistics(num_channels=codes.shape[1], num_rounds=num_rounds)
    metric.update(codes, **options)
    return metric.compute()


@pytest.mark.parametrize("grid", [(4, 4), (2, 3, 3)])
@pytest.mark.parametrize("num_rounds", [1, 2, 4])
def test_it_equals_the_statistics_of_one_batch(grid: tuple, num_rounds: int) -> None:
    codes = torch.randint(0, 2**num_rounds, (3, 5, *grid))
    codes[:, 0] = 0  # a channel whose bits are all dead
    expected = bit_statistics(codes, num_rounds=num_rounds)
    ours = report(codes, num_rounds)
    for name in expected._fields:
        torch.testing.assert_close(
            getattr(ours, name).reshape(-1).float(), getattr(expected, name), msg=name
        )
    assert ours.dead_fraction.min() >= 1 / 5


def test_batches_add_up_to_the_whole() -> None:
    codes = torch.randint(0, 16, (7, 3, 2, 4, 4))
    metric = CodeStatistics(num_channels=3, num_rounds=4)
    for part in codes.split(3):
        metric.update(part)
    for ours, expected in zip(metric.compute(), report(codes, 4), strict=True):
        assert torch.equal(ours, expected)


def test_a_report_does_not_change_when_counting_goes_on() -> None:
    metric = CodeStatistics(num_channels=1, num_rounds=2)
    metric.update(torch.zeros(1, 1, 4, dtype=torch.long))
    before = metric.compute()
    metric.update(torch.ones(1, 1, 4, dtype=torch.long))
    assert before.histogram.tolist() == [[4, 0, 0, 0]]
    assert metric.compute().histogram.tolist() == [[4, 4, 0, 0]]


def test_usage_and_perplexity_count_values_per_channel() -> None:
    always, often, evenly = [3] * 8, [0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 2, 2, 3, 3]
    ours = report(torch.tensor([[always, often, evenly]]), 2)
    torch.testing.assert_close(ours.usage, torch.tensor([0.25, 0.5, 1.0]).double())
    skewed = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    torch.testing.assert_close(ours.perplexity, torch.tensor([1.0, skewed, 4.0]).double())


def test_one_flipped_bit_among_very_many_is_not_dead() -> None:
    metric = CodeStatistics(num_channels=1, num_rounds=1)
    metric.update(torch.tensor([[[0, 1]]]))
    metric.histogram[0, 1] = 2**52  # as after a very long count
    assert metric.compute().dead_fraction == 0


def test_padding_is_not_counted() -> None:
    codes = torch.randint(0, 4, (4, 2, 3))
    ours = report(codes, 2, weights=torch.tensor([1.0, 0.0, 1.0, 0.0]))
    assert torch.equal(ours.histogram, report(codes[::2], 2).histogram)


def test_scalars_name_every_round_even_if_there_is_one() -> None:
    names = {"ones_fraction_round_0", "entropy_round_0", "dead_fraction_round_0"}
    scalars = report(torch.tensor([[[0, 1]]]), 1).scalars()
    names |= {"usage", "perplexity", "channel_entropy", "dead_channels"}
    assert set(scalars) == names
    assert all(value.ndim == 0 for value in scalars.values())
    assert scalars["entropy_round_0"] == 1


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((1, 2, 3), 4), r"\[0, 4\) for num_rounds=2, got 4 to 4"),
        (torch.full((1, 2, 3), -1), r"got -1 to -1"),
        (torch.zeros(1, 3, 3, dtype=torch.long), r"2 channels on axis 1, got \(1, 3, 3\)"),
    ],
)
def test_codes_of_another_tokenizer_are_refused(codes: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodeStatistics(num_channels=2, num_rounds=2).update(codes)


# ------------------------------------------------------------------ other alphabets


def test_codes_without_rounds_have_usage_and_perplexity_but_no_bits() -> None:
    metric = CodeStatistics(num_channels=2, alphabet_size=5)
    metric.update(torch.tensor([[[0, 1, 2, 3, 4], [2, 2, 2, 2, 2]]]))
    ours = metric.compute()
    torch.testing.assert_close(ours.usage, torch.tensor([1.0, 0.2]).double())
    torch.testing.assert_close(ours.channel_entropy, torch.tensor([1.0, 0.0]).double())
    assert ours.dead_channels.tolist() == [False, True]
    assert ours.entropy.numel() == ours.bit_entropy.numel() == 0
    assert not [name for name in ours.scalars() if "round" in name]


def test_the_entropy_of_a_bit_in_a_channel_averages_to_that_of_the_round() -> None:
    ours = report(torch.randint(0, 8, (5, 4, 7)), 3)
    assert ours.bit_entropy.shape == (3, 4)
    torch.testing.assert_close(ours.bit_entropy.mean(1), ours.entropy)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_channels": 2}, "at least 1, and num_rounds too unless an alphabet_size"),
        ({"num_channels": 2, "alphabet_size": 1}, "alphabet_size of at least 2"),
        ({"num_channels": 2, "num_rounds": 3, "alphabet_size": 5}, "have 8 values, got .*=5"),
    ],
)
def test_sizes_that_contradict_are_refused(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodeStatistics(**sizes)


# ------------------------------------------------------------------ alarms


def healthy(num_channels: int = 10, num_rounds: int = 2) -> torch.Tensor:
    """Every channel takes every value equally often, 32 times."""
    values = torch.arange(2**num_rounds).repeat(32)
    return values.expand(1, num_channels, -1).clone()


def test_healthy_codes_give_no_alarm() -> None:
    assert CodeAlarms().sentences(report(healthy(), 2)) == []


def test_too_few_codes_give_no_alarm() -> None:
    collapsed = torch.zeros(1, 10, 15, dtype=torch.long)
    assert CodeAlarms().sentences(report(collapsed, 2)) == []
    assert CodeAlarms().sentences(report(collapsed.repeat(1, 1, 2), 2))


def test_a_tenth_of_dead_channels_is_borne_and_more_is_named() -> None:
    codes = healthy()
    codes[:, 3] = 1
    assert CodeAlarms().sentences(report(codes, 2)) == []
    codes[:, 7] = 2
    channels, bits = CodeAlarms().sentences(report(codes, 2))
    assert channels.startswith(
        "2 of 10 code channels (20%, alarm above 10%) take a single value: 3, 7; lower the learning"
    )
    assert bits.startswith("4 of 20 bits of a position (20%, alarm above 10%) never change")
    assert CodeAlarms(max_dead_channels=0.2, max_dead_bits=0.2).sentences(report(codes, 2)) == []


def test_a_round_that_does_not_change_is_named() -> None:
    found = CodeAlarms().sentences(report(healthy() & 2, 2))
    assert any(text.startswith("10 of 20 bits of a position (50%") for text in found)
    assert any(text.startswith("round 1 carries 0.00 bits of 1") for text in found)
    assert not any("round 0" in text for text in found)


def test_unused_values_of_a_codebook_are_told_by_usage_and_entropy() -> None:
    metric = CodeStatistics(num_channels=1, alphabet_size=16)
    metric.update(torch.tensor([0, 1]).repeat(64)[None, None])
    usage, entropy = CodeAlarms().sentences(metric.compute())
    assert usage.startswith("a code channel takes 12% of its 16 values on average (alarm below 50%")
    assert entropy.startswith("a code channel carries 25% of its 4 bits (alarm below 50%)")
    assert CodeAlarms(min_usage=0.1, min_entropy=0.2).sentences(metric.compute()) == []


def test_limits_that_are_no_share_are_refused() -> None:
    with pytest.raises(ValueError, match=r"CodeAlarms: min_usage must be in \[0, 1\], got 5"):
        CodeAlarms(min_usage=5)
