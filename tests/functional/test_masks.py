"""Masks of pixels against loops over their cells."""

import pytest
import torch

from grn_lightning.functional import feather, latent_mask


@pytest.mark.parametrize("grow", [0, 1, 2])
@pytest.mark.parametrize("frames", [1, 5, 9])
def test_a_position_is_drawn_if_any_of_its_pixels_is(frames: int, grow: int) -> None:
    mask = torch.rand(2, frames, 20, 12) < 0.02
    latent = latent_mask(mask, temporal_stride=4, spatial_stride=4, grow=grow)
    assert latent.shape == (2, 1 + (frames - 1) // 4, 5, 3)
    for b, f, y, x in torch.ones(latent.shape).nonzero().tolist():
        times = slice(0, 1) if f == 0 else slice(4 * f - 3, 4 * f + 1)
        rows = slice(max(0, 4 * (y - grow)), 4 * (y + grow + 1))
        columns = slice(max(0, 4 * (x - grow)), 4 * (x + grow + 1))
        assert bool(latent[b, f, y, x]) == bool(mask[b, times, rows, columns].any())


def test_a_soft_edge_falls_from_the_mask_outwards() -> None:
    mask = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    mask[..., 4, 4] = True
    weight = feather(mask, radius=3)[0, 0]
    for y, x in torch.ones(9, 9).nonzero().tolist():
        distance = max(abs(y - 4), abs(x - 4))
        assert float(weight[y, x]) == max(0, 4 - distance) / 4
    assert feather(mask, radius=0).equal(mask.float())


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 \+ 4 k frames.*multiples of 8, got 4 x 8 x 12"):
        latent_mask(torch.ones(1, 4, 8, 12, dtype=torch.bool), temporal_stride=4, spatial_stride=8)
    with pytest.raises(ValueError, match="radius must be at least 0, got -1"):
        feather(torch.ones(1, 1, 2, 2, dtype=torch.bool), radius=-1)
