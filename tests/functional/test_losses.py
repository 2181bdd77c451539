"""Losses: equal to the loops that define them, in float32, one value per sample."""

import math

import pytest
import torch

from grn_lightning.functional.losses import accuracy_by_time, token_accuracy, token_cross_entropy

SHAPES = {"index image": (4, 1, 3, 3), "bit video": (12, 3, 2, 2), "class": (4, 3, 3), "one": ()}


@pytest.mark.parametrize("k", [2, 16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loss_and_accuracy_equal_a_loop_over_elements(shape, k):
    logits, codes = torch.randn(3, *shape, k), torch.randint(k, (3, *shape))
    losses, accuracies = token_cross_entropy(logits, codes), token_accuracy(logits, codes)
    assert losses.shape == accuracies.shape == (3,)
    for b in range(3):
        rows, truth = logits[b].reshape(-1, k).tolist(), codes[b].flatten().tolist()
        sums = [math.log(sum(math.exp(x) for x in row)) for row in rows]
        nats = [s - row[code] for s, row, code in zip(sums, rows, truth, strict=True)]
        hits = [row.index(max(row)) == code for row, code in zip(rows, truth, strict=True)]
        assert losses[b].item() == pytest.approx(sum(nats) / len(nats), rel=1e-5)
        assert accuracies[b].item() == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize("k", [2, 16])
def test_equal_logits_cost_the_logarithm_of_the_alphabet(k):
    loss = token_cross_entropy(torch.zeros(2, 5, 3, k), torch.randint(k, (2, 5, 3)))
    torch.testing.assert_close(loss, torch.full((2,), math.log(k)))


def test_half_precision_is_scored_in_single():
    logits, codes = torch.randn(2, 4, 16).bfloat16(), torch.randint(16, (2, 4))
    expected = token_cross_entropy(logits.float(), codes)
    torch.testing.assert_close(token_cross_entropy(logits, codes), expected, rtol=0, atol=0)
    assert expected.dtype == torch.float32


def test_the_gradient_is_the_softmax_minus_the_truth():
    logits, codes = torch.randn(2, 3, 4, requires_grad=True), torch.randint(4, (2, 3))
    token_cross_entropy(logits, codes).mean().backward()
    truth = torch.nn.functional.one_hot(codes, 4)
    expected = (torch.softmax(logits.detach(), -1) - truth) / 6
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("num_bins", [1, 4, 10])
def test_accuracies_are_sorted_into_bins_of_time(num_bins):
    accuracy, t = torch.rand(200), torch.rand(200)
    t[:2] = torch.tensor([0.0, 1.0])
    sums, counts = accuracy_by_time(accuracy, t, num_bins=num_bins)
    expected: list[list[float]] = [[] for _ in range(num_bins)]
    for a, time in zip(accuracy.tolist(), t.tolist(), strict=True):
        expected[min(int(time * num_bins), num_bins - 1)].append(a)
    assert counts.tolist() == [len(bin_) for bin_ in expected]
    torch.testing.assert_close(sums, torch.tensor([math.fsum(bin_) for bin_ in expected]))


def test_bins_of_parts_add_up_to_those_of_the_whole():
    accuracy, t = torch.rand(64), torch.rand(64)
    whole = accuracy_by_time(accuracy, t)
    parts = [accuracy_by_time(accuracy[i : i + 16], t[i : i + 16]) for i in range(0, 64, 16)]
    torch.testing.assert_close(sum(sums for sums, _ in parts), whole[0])
    torch.testing.assert_close(sum(counts for _, counts in parts), whole[1])


def test_no_bins_are_refused():
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        accuracy_by_time(torch.zeros(1), torch.zeros(1), num_bins=0)
