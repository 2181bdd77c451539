import pytest
import torch
from torch import Tensor

from grn_lightning.samplers import RefineConfig, RefinedBatch, refine, refine_in_batches

NULL = torch.tensor([9])


def generator(codes: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    per_row = (labels * 5 + (t * 100).round().long()).view(-1, 1, 1, 1)
    mixed = codes * 7 + codes.roll(1, -1) * 3 + per_row
    return ((mixed[..., None] + torch.arange(4) * 11) % 13) / 3


SETTINGS = {
    "seed": 1,
    "alphabet_size": 4,
    "config": RefineConfig(num_steps=4, guidance_scale=2.0),
    "null_condition": NULL,
}


@pytest.mark.parametrize("max_batch", [1, 3, 7, 100])
@pytest.mark.parametrize("is_lazy", [False, True])
def test_parts_are_the_rows_of_one_large_batch(max_batch: int, is_lazy: bool) -> None:
    labels, index = torch.arange(7) % 3, torch.arange(100, 107)
    whole = refine(generator, (2, 3, 3), condition=labels, sample_index=index, **SETTINGS)
    parts: list[RefinedBatch] = list(
        refine_in_batches(
            generator,
            (2, 3, 3),
            condition=(lambda rows: labels[rows]) if is_lazy else labels,
            sample_index=index,
            max_batch=max_batch,
            **SETTINGS,
        )
    )
    assert torch.equal(torch.cat([part.result.codes for part in parts]), whole.codes)
    assert sum(part.result.num_forwards.rows for part in parts) == whole.num_forwards.rows
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == parts[-1].num_samples == 7
    assert max(len(part.result.codes) for part in parts) <= max_batch


def test_nothing_is_made_before_its_turn() -> None:
    asked: list[slice] = []

    def condition(rows: slice) -> Tensor:
        asked.append(rows)
        return torch.zeros(rows.stop - rows.start, dtype=torch.long)

    parts = refine_in_batches(
        generator,
        (2, 3, 3),
        condition=condition,
        sample_index=torch.arange(5),
        max_batch=2,
        **SETTINGS,
    )
    assert asked == []
    next(iter(parts))
    assert asked == [slice(0, 2)]


def test_no_samples_make_no_parts() -> None:
    empty = torch.arange(0)
    parts = refine_in_batches(
        generator, (2, 3, 3), condition=empty, sample_index=empty, max_batch=2, **SETTINGS
    )
    assert list(parts) == []


def test_an_empty_part_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="max_batch must be at least 1, got 0"):
        refine_in_batches(
            generator, (2,), condition=NULL, sample_index=NULL, max_batch=0, **SETTINGS
        )
