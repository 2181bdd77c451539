import pytest
import torch
from torch import Tensor

from grn_lightning.metrics import FeatureReservoir


def filled(features: Tensor, index: Tensor, *, capacity: int = 20, batch: int = 7, **options: int):
    reservoir = FeatureReservoir(features.shape[1], capacity=capacity, **options)
    for part in torch.arange(len(features)).split(batch):
        reservoir.update(features[part], index[part])
    return reservoir


def test_all_samples_are_kept_in_order_while_there_is_room() -> None:
    features, order = torch.randn(12, 3), torch.randperm(12)
    found = filled(features[order], order).compute()
    assert torch.equal(found, features)


def test_neither_order_nor_batches_change_which_samples_are_kept() -> None:
    features, index, order = torch.randn(200, 3), torch.arange(200), torch.randperm(200)
    one = filled(features, index).compute()
    two = filled(features[order], index[order], batch=33).compute()
    assert torch.equal(one, two)
    assert one.shape == (20, 3)
    assert not torch.equal(one, filled(features, index, seed=1).compute())


def test_the_kept_samples_are_an_even_draw() -> None:
    """Each of 40 samples is among the 10 kept in a quarter of 400 draws."""
    kept = torch.zeros(40)
    for seed in range(400):
        values = torch.arange(40.0)[:, None]
        kept[
            filled(values, torch.arange(40), capacity=10, batch=40, seed=seed).compute().long()
        ] += 1
    assert (kept - 100).abs().max() < 4 * (400 * 0.25 * 0.75) ** 0.5


def test_processes_keep_together_what_one_would() -> None:
    features, index = torch.randn(100, 3), torch.arange(100)
    ranks = [filled(features[rank::2], index[rank::2]) for rank in (0, 1)]
    others = iter([getattr(ranks[1], name) for name in ranks[1].metric_state])
    ranks[0].dist_sync_fn = lambda state, group: [state, next(others)]
    ranks[0].distributed_available_fn = lambda: True
    assert torch.equal(ranks[0].compute(), filled(features, index).compute())


def test_memory_does_not_grow() -> None:
    reservoir = filled(torch.randn(300, 3), torch.arange(300))
    sizes = {name: getattr(reservoir, name).numel() for name in reservoir.metric_state}
    assert sizes == {"features": 60, "priorities": 20, "indices": 20, "count": 1}
    assert int(reservoir.count) == 300
    reservoir.reset()
    assert int(reservoir.count) == 0
    assert reservoir.priorities.isinf().all()


def test_samples_must_be_numbered() -> None:
    with pytest.raises(ValueError, match=r"sample_index must be \(5,\), got \(4,\)"):
        filled(torch.randn(5, 3), torch.arange(5)).update(torch.randn(5, 3), torch.arange(4))
    with pytest.raises(ValueError, match="capacity must be at least 2, got 1"):
        FeatureReservoir(3, capacity=1)
