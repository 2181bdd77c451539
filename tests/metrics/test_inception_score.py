import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric

from grn_lightning.metrics import CONVENTIONS, InceptionScore
from grn_lightning.metrics.protocols import Convention

IN_ORDER = replace(CONVENTIONS["adm"], score_order="in order")


def score_of(
    logits: Tensor, convention: Convention = CONVENTIONS["torch_fidelity"], batch: int = 9
) -> InceptionScore:
    metric = InceptionScore(logits.shape[1], num_samples=len(logits), convention=convention)
    for part in torch.randperm(len(logits)).split(batch):
        metric.update(logits[part], part)
    return metric


@pytest.mark.parametrize("count", [50, 123])
def test_it_is_the_score_of_torch_fidelity_shuffle_included(count: int) -> None:
    logits = 3 * torch.randn(count, 12)
    found = score_of(logits).compute()
    expected = isc_features_to_metric(logits)
    assert found.mean.item() == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert found.spread.item() == pytest.approx(expected["inception_score_std"], rel=1e-9)


def test_parts_in_order_are_those_of_adm() -> None:
    """A loop over 5000 samples each, the last part shorter."""
    logits = 2 * torch.randn(12_000, 4)
    p = logits.double().softmax(1).numpy()
    scores = []
    for first in range(0, len(p), 5000):
        part = p[first : first + 5000]
        kl = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(math.exp(kl.sum(1).mean()))
    found = score_of(logits, IN_ORDER, batch=5000).compute()
    assert found.mean.item() == pytest.approx(np.mean(scores), rel=1e-9)


def test_the_score_is_the_number_of_classes_at_best_and_one_at_worst() -> None:
    sure = 200.0 * torch.nn.functional.one_hot(torch.arange(4000) % 4, 4)
    assert score_of(sure, IN_ORDER).compute().mean.item() == pytest.approx(4)
    assert score_of(torch.zeros(40, 4)).compute().mean.item() == pytest.approx(1)


def test_samples_sorted_by_class_score_as_high_as_others() -> None:
    """In order, a part of 5000 would hold one class of two and score 1."""
    label = torch.arange(10_000) // 5000
    sure = 30.0 * torch.nn.functional.one_hot(label, 2)
    shuffled = score_of(sure, CONVENTIONS["adm"], batch=5000).compute().mean.item()
    assert shuffled == pytest.approx(2, rel=1e-3)
    assert score_of(sure, IN_ORDER, batch=5000).compute().mean.item() == pytest.approx(1)


def test_memory_does_not_grow() -> None:
    metric = score_of(torch.randn(500, 6))
    assert metric.probabilities.shape == (10, 6)
    assert int(metric.counts.sum()) == 500


def test_processes_add_up() -> None:
    logits, index = torch.randn(60, 5), torch.arange(60)
    ranks = []
    for rank in (0, 1):
        metric = InceptionScore(5, num_samples=60, convention=CONVENTIONS["torch_fidelity"])
        metric.update(logits[rank::2], index[rank::2])
        ranks.append(metric)
    ranks[0].merge_state(ranks[1])
    assert ranks[0].compute().mean.item() == pytest.approx(score_of(logits).compute().mean.item())


def test_an_incomplete_or_impossible_set_is_refused() -> None:
    metric = InceptionScore(5, num_samples=60, convention=CONVENTIONS["torch_fidelity"])
    metric.update(torch.randn(10, 5), torch.arange(10))
    with pytest.raises(ValueError, match="announced for 60 samples, got 10"):
        metric.compute()
    with pytest.raises(ValueError, match=r"must lie in \[0, 60\), got 55 to 64"):
        metric.update(torch.randn(10, 5), torch.arange(55, 65))
    with pytest.raises(ValueError, match="10 parts needs at least as many samples, got 9"):
        InceptionScore(5, num_samples=9, convention=CONVENTIONS["clean"])
