"""Means of a generator's accuracy do not depend on batches, ranks or padding."""

import pytest
import torch
from torch import Tensor

from grn_lightning.metrics.accuracy import TimeBinnedAccuracy, TimeBinnedResult


def draw(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, accuracies, times and weights of n samples; about a third is padding."""
    weights = (torch.rand(n) > 0.3).float()
    return torch.rand(n) * 5, torch.rand(n), torch.rand(n), weights


def by_hand(
    loss: Tensor, accuracy: Tensor, t: Tensor, weights: Tensor, num_bins: int
) -> tuple[float, float, list[float]]:
    """The same means, sample by sample."""
    chosen = [i for i in range(len(t)) if weights[i] > 0]
    bins: list[list[float]] = [[] for _ in range(num_bins)]
    for i in chosen:
        bins[min(int(t[i] * num_bins), num_bins - 1)].append(float(accuracy[i]))
    means = [sum(b) / len(b) if b else float("nan") for b in bins]
    count = max(len(chosen), 1)
    return (
        sum(float(loss[i]) for i in chosen) / count,
        sum(float(accuracy[i]) for i in chosen) / count,
        means,
    )


def assert_result(result: TimeBinnedResult, expected: tuple[float, float, list[float]]) -> None:
    loss, accuracy, bins = expected
    # The bins are summed from float32 accuracies.
    torch.testing.assert_close(float(result.loss), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(float(result.accuracy), accuracy, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        result.accuracy_by_time.tolist(), bins, rtol=1e-6, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("num_bins", [2, 10])
@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_it_equals_a_loop_over_samples_whatever_the_batches(num_bins, batch_size):
    samples = draw(50)
    metric = TimeBinnedAccuracy(num_bins=num_bins)
    for batch in zip(*(values.split(batch_size) for values in samples), strict=True):
        metric.update(*batch)
    assert_result(metric.compute(), by_hand(*samples, num_bins))


def test_ranks_are_added_up():
    samples, metrics = draw(30), [TimeBinnedAccuracy(), TimeBinnedAccuracy()]
    for rank, metric in enumerate(metrics):
        metric.update(*(values[rank::2] for values in samples))
    for name, reduce in metrics[0]._reductions.items():
        states = torch.stack([getattr(metric, name) for metric in metrics])
        setattr(metrics[0], name, reduce(states))
    assert_result(metrics[0].compute(), by_hand(*samples, 10))


def test_padding_alone_changes_nothing():
    samples, metric = draw(20), TimeBinnedAccuracy()
    metric.update(*samples)
    metric.update(torch.ones(3), torch.ones(3), torch.rand(3), torch.zeros(3))
    assert_result(metric.compute(), by_hand(*samples, 10))


def test_bins_without_a_sample_are_nan_and_the_ends_belong_to_the_outer_bins():
    metric = TimeBinnedAccuracy(num_bins=4)
    metric.update(
        torch.zeros(2), torch.tensor([0.25, 0.75]), torch.tensor([0.0, 1.0]), torch.ones(2)
    )
    bins = metric.compute().accuracy_by_time.tolist()
    torch.testing.assert_close(
        bins, [0.25, float("nan"), float("nan"), 0.75], rtol=0, atol=0, equal_nan=True
    )


def test_reset_forgets():
    metric = TimeBinnedAccuracy()
    metric.update(*draw(20))
    metric.compute()
    metric.reset()
    samples = draw(10)
    metric.update(*samples)
    assert_result(metric.compute(), by_hand(*samples, 10))


def test_no_state_enters_a_checkpoint():
    assert TimeBinnedAccuracy().state_dict() == {}
