"""Splits: coarse and fine are the codes, whatever is called coarse."""

import pytest
import torch

from grn_lightning.functional import hbq_decode
from grn_lightning.models.coarse_split import ClusterSplit, LatentSplit, PrefixSplit, leak_rate

VQ = ClusterSplit(torch.tensor([2, 0, 1, 2, 2, 0, 1, 1]), 3)
PREFIXES = [
    PrefixSplit(num_channels=3, num_rounds=4, coarse_rounds=m, is_joint=is_joint)
    for m in range(5)
    for is_joint in (False, True)
]
LATENT = LatentSplit(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), 4)


def codes_of(split, seed=0):
    generator = torch.Generator().manual_seed(seed)
    channels, size = (1, 8) if split is VQ else (3, 16)
    return torch.randint(size, (4, channels, 3, 5), generator=generator)


@pytest.mark.parametrize("split", [VQ, LATENT, *PREFIXES], ids=str)
def test_coarse_and_fine_are_the_codes_again(split):
    codes = codes_of(split)
    coarse, fine = split.coarse(codes), split.fine(codes)
    assert torch.equal(split.join(coarse, fine), codes)
    for labels, (channels, size) in ((coarse, split.coarse_sizes), (fine, split.fine_sizes)):
        assert labels.shape == (4, channels, 3, 5)
        assert labels.min() >= 0
        assert labels.max() < size
    assert leak_rate(split, coarse, codes).tolist() == [0.0] * 4


@pytest.mark.parametrize("split", [VQ, *PREFIXES], ids=str)
def test_what_is_allowed_is_exactly_what_keeps_the_coarse_map(split):
    codes = codes_of(split)
    coarse = split.coarse(codes)
    allowed = split.allowed(coarse)
    for value in range(split.fine_sizes.size):
        fine = torch.full_like(split.fine(codes), value)
        keeps = split.coarse(split.join(coarse, fine)) == coarse
        expected = torch.ones_like(keeps) if allowed is None else allowed[..., value]
        assert torch.equal(keeps, expected)


def test_prefixes_are_nested_and_joint_labels_tell_what_separate_ones_tell():
    codes = codes_of(PREFIXES[0])
    one, two = (PrefixSplit(3, 4, m) for m in (1, 2))
    assert torch.equal(one.coarse(codes), two.coarse(codes) >> 1)
    joint, apart = (PrefixSplit(3, 4, 2, is_joint=j).coarse(codes) for j in (True, False))
    assert torch.equal(joint[:, 0], apart[:, 0] + 4 * apart[:, 1] + 16 * apart[:, 2])


def test_latents_fall_to_their_nearest_centroid():
    codes = codes_of(LATENT)
    z_hat = hbq_decode(codes, num_rounds=4)
    for b, y, x in ((0, 0, 0), (1, 2, 3), (3, 1, 4)):
        distances = [(z_hat[b, :, y, x] - centroid).norm() for centroid in LATENT.centroids]
        assert LATENT.coarse(codes)[b, 0, y, x] == min(range(5), key=lambda k: distances[k])


def test_leaks_are_counted():
    codes = codes_of(VQ)
    coarse = VQ.coarse(codes)
    coarse[0, 0, 0, :3] = (coarse[0, 0, 0, :3] + 1) % 3
    torch.testing.assert_close(leak_rate(VQ, coarse, codes), torch.tensor([0.2, 0, 0, 0]))


def test_impossible_splits_are_refused():
    with pytest.raises(ValueError, match=r"coarse_rounds must be in \[0, 4\], got 5"):
        PrefixSplit(3, 4, 5)
    with pytest.raises(ValueError, match="at most 16 bits, got 12 channels of 2"):
        PrefixSplit(12, 4, 2, is_joint=True)
    with pytest.raises(ValueError, match="every cluster must have a member"):
        ClusterSplit(torch.tensor([0, 2]), 3)
