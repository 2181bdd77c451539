"""Corruption: nothing is kept at t = 0, everything at t = 1, a share t between."""

import math

import pytest
import torch

from grn_lightning.functional.corruption import corrupt, keep_mask, random_codes

GRIDS = {"image": (1, 8, 8), "video": (3, 4, 4), "class": (8, 8)}


@pytest.mark.parametrize("alphabet_size", [2, 3, 16, 65536, 100_003])
def test_random_codes_stay_in_the_alphabet_and_reach_both_ends(alphabet_size):
    u = torch.tensor([0.0, 1 - 2.0**-24])
    assert random_codes(u, alphabet_size=alphabet_size).tolist() == [0, alphabet_size - 1]
    almost_one = torch.tensor([1 - 2.0**-53]).double()
    assert random_codes(almost_one, alphabet_size=alphabet_size).item() == alphabet_size - 1


@pytest.mark.parametrize("alphabet_size", [2, 3, 16])
def test_random_codes_split_the_unit_interval_evenly(alphabet_size):
    num = alphabet_size * 1024
    u = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    counts = random_codes(u, alphabet_size=alphabet_size).bincount()
    assert counts.tolist() == [1024] * alphabet_size


def test_an_alphabet_of_one_is_refused():
    with pytest.raises(ValueError, match="alphabet_size must be at least 2, got 1"):
        random_codes(torch.zeros(1), alphabet_size=1)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_noise_at_zero_data_at_one_and_every_element_from_one_of_them(grid):
    x_1, x_0 = torch.randint(16, (3, 4, *grid)), torch.randint(16, (3, 4, *grid))
    u = torch.rand(3, 4, *grid)
    u[:, 0] = 0.0  # the smallest and the largest number there is
    u[:, 1] = 1 - 2.0**-24
    keep = keep_mask(u, torch.tensor([0.0, 1.0, 0.5]))
    x_t = corrupt(x_1, x_0, keep)
    torch.testing.assert_close(x_t[0], x_0[0])
    torch.testing.assert_close(x_t[1], x_1[1])
    for a_1, a_0, a_t, is_kept in zip(
        *(x[2].flatten().tolist() for x in (x_1, x_0, x_t, keep)), strict=True
    ):
        assert a_t == (a_1 if is_kept else a_0)


def test_the_share_of_kept_elements_is_the_time_of_each_sample():
    t, num = torch.tensor([0.05, 0.3, 0.9]), 20_000
    kept = keep_mask(torch.rand(3, num), t).float().mean(1)
    for share, p in zip(kept.tolist(), t.tolist(), strict=True):
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / num)  # five standard deviations


def test_what_is_kept_stays_kept_as_time_goes_on():
    u = torch.rand(1, 1000)
    early, late = keep_mask(u, torch.tensor([0.3])), keep_mask(u, torch.tensor([0.4]))
    assert (early <= late).all()
