import math

import pytest
import torch

from grn_lightning.functional import bit_statistics
from grn_lightning.metrics import CodeStatistics


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
