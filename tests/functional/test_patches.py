"""Patches: the documented channel order, and the way back."""

import pytest
import torch

from grn_lightning.functional.patches import patchify, unpatchify


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_every_pixel_goes_where_the_order_says(p, frames):
    clips = torch.randn(2, 3, frames, 2 * p, 3 * p)
    patches = patchify(clips, patch_size=p)
    assert patches.shape == (2, 3 * p * p, frames, 2, 3)
    for colour in range(3):
        for q in range(p):
            for r in range(p):
                found = patches[:, colour * p * p + q * p + r]
                torch.testing.assert_close(found, clips[:, colour, :, r::p, q::p])


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_unpatchify_is_the_inverse(p, frames):
    clips = torch.randn(2, 3, frames, 2 * p, 3 * p)
    torch.testing.assert_close(unpatchify(patchify(clips, patch_size=p), patch_size=p), clips)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="multiples of patch_size=2, got 4 x 5"):
        patchify(torch.zeros(1, 3, 1, 4, 5), patch_size=2)
    with pytest.raises(ValueError, match=r"multiple of patch_size\*\*2 = 4, got 6"):
        unpatchify(torch.zeros(1, 6, 1, 2, 2), patch_size=2)
