"""Chunk by chunk equals the whole clip, in the published structure with every weight at work.

New tokenizers read each frame by itself (the past taps of their kernels are zero), with which a
stream that forgot the past would go unnoticed. Here all taps are random.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from grn_lightning.models.tokenizer import HBQTokenizer, TokenizerConfig
from grn_lightning.nn.conv3d import CausalConv3d

PUBLISHED = TokenizerConfig(encoder_width=4, decoder_width=4)  # structure, not width
KINDS = {
    "d16": replace(PUBLISHED, latent_channels=16),
    "d64": replace(PUBLISHED, latent_channels=64),
    "d16, attention bypassed": replace(PUBLISHED, latent_channels=16, use_mid_attention=False),
    "d64, attention bypassed": replace(PUBLISHED, latent_channels=64, use_mid_attention=False),
}
FRAMES = (1, 5, 9, 13, 81)


@pytest.fixture(scope="module", params=KINDS.values(), ids=[*KINDS])
def tokenizer(request) -> HBQTokenizer:
    torch.manual_seed(1)
    tokenizer = HBQTokenizer(request.param).double().requires_grad_(False)
    for parameter in tokenizer.parameters():
        if parameter.ndim > 1 and parameter.shape[1:].numel() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1:].numel() ** -0.5)
    return tokenizer


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Within 1e-12 of the scale, which is about 1."""
    assert found.shape == expected.shape
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * scale)


def test_all_taps_are_at_work(tokenizer):
    taps = [m.weight for m in tokenizer.modules() if isinstance(m, CausalConv3d)]
    assert len(taps) > 40
    assert all(weight[:, :, :-1].abs().mean() > 0.01 for weight in taps)


@pytest.mark.parametrize("num_frames", FRAMES)
def test_streamed_latents_and_frames_are_those_of_the_whole_clip(tokenizer, num_frames):
    clips = torch.rand(1, 3, num_frames, 16, 32, dtype=torch.float64) * 2 - 1
    z = tokenizer.encode(clips)
    assert z.shape[2] == 1 + (num_frames - 1) // 4
    assert z.std() > 0.1
    sizes = (1, 3) if num_frames > 1 else (1,)
    for chunk_size in sizes:
        assert_same(tokenizer.encode_streaming(clips, chunk_size=chunk_size), z)
    frames = tokenizer.decode(z)
    assert frames.shape == clips.shape
    for chunk_size in sizes:
        assert_same(tokenizer.decode_streaming(z, chunk_size=chunk_size), frames)


def test_frames_far_back_still_matter(tokenizer):
    """The past reaches over chunks: else the equality above would say little."""
    clips = torch.rand(1, 3, 17, 16, 16, dtype=torch.float64) * 2 - 1
    changed = clips.clone()
    changed[:, :, 0] *= -1
    moved = [tokenizer.encode(x) for x in (clips, changed)]
    reach = (moved[0] - moved[1]).abs().amax(dim=(0, 1, 3, 4))
    assert (reach > 1e-6).all()


@pytest.mark.parametrize("num_frames", [9, 13])
def test_uneven_chunks_are_joined_without_a_seam(tokenizer, num_frames):
    clips = torch.rand(1, 3, num_frames, 16, 16, dtype=torch.float64) * 2 - 1
    parts = clips.split([5, num_frames - 5], dim=2)
    assert_same(torch.cat([*tokenizer.encode_chunks(parts)], dim=2), tokenizer.encode(clips))
    z = tokenizer.encode(clips)
    parts = z.split([2, z.shape[2] - 2], dim=2)
    assert_same(torch.cat([*tokenizer.decode_chunks(parts)], dim=2), tokenizer.decode(z))
