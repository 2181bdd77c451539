from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from grn_lightning.samplers import concatenate_conditions, expand_rows, num_rows, select_rows


class Caption(NamedTuple):
    embeds: Tensor
    mask: Tensor


class Cached(NamedTuple):
    caption: Caption
    layers: tuple[Tensor, Tensor]


def nested(count: int) -> Cached:
    caption = Caption(torch.randn(count, 3, 8), torch.rand(count, 3) < 0.5)
    return Cached(caption, (torch.randn(count, 2), torch.randn(count, 4)))


def leaves(condition: Cached) -> list[Tensor]:
    return [*condition.caption, *condition.layers]


def test_selecting_from_a_join_gives_the_parts_back() -> None:
    first, second = nested(2), nested(3)
    joined = concatenate_conditions(first, second)
    assert type(joined) is Cached
    assert type(joined.caption) is Caption
    assert num_rows(joined) == 5
    for rows, part in ((slice(0, 2), first), (torch.tensor([2, 3, 4]), second)):
        for ours, theirs in zip(leaves(select_rows(joined, rows)), leaves(part), strict=True):
            assert torch.equal(ours, theirs)


def test_one_row_serves_all_without_a_copy() -> None:
    single = nested(1)
    expanded = expand_rows(single, 4)
    for ours, theirs in zip(leaves(expanded), leaves(single), strict=True):
        assert torch.equal(ours, theirs.repeat(4, *[1] * (theirs.ndim - 1)))
        assert ours.data_ptr() == theirs.data_ptr()


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(2, 3, 8),
        (torch.zeros(2, 3, 8),),
        Caption(torch.zeros(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)),
    ],
)
def test_conditions_of_another_make_are_refused(other: Tensor | tuple) -> None:
    with pytest.raises(ValueError, match="may differ in the number of rows only"):
        concatenate_conditions(nested(2).caption, other)


def test_a_number_of_rows_that_fits_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="1 row or one for each of the 4 samples.*got 2 rows"):
        expand_rows(torch.zeros(2, 5), 4)
