"""Norm, residual block and attention of the video tokenizer against slow definitions."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grn_lightning.nn.blocks3d import ChannelNorm, ResidualBlock, SpatialAttention

EXACT = {"rtol": 0.0, "atol": 1e-12}


def definition(norm: ChannelNorm, x: Tensor) -> Tensor:
    """Divide by the length of the channel vector, multiply by sqrt(c) and gamma, then SiLU."""
    y = F.normalize(x, dim=1, eps=1e-12) * x.shape[1] ** 0.5 * norm.gamma
    return F.silu(y) if norm.use_silu else y


def norm_with_weights(num_channels: int, **kwargs: int) -> ChannelNorm:
    norm = ChannelNorm(num_channels, **kwargs)
    torch.nn.init.normal_(norm.gamma)
    return norm


@pytest.mark.parametrize("use_silu", [False, True])
@pytest.mark.parametrize("num_axes", [2, 3])
def test_norm_and_its_gradients_equal_the_definition(num_axes: int, use_silu: bool) -> None:
    norm = norm_with_weights(6, num_axes=num_axes, use_silu=use_silu).double()
    x = torch.randn(2, 6, *[4] * num_axes, dtype=torch.float64, requires_grad=True)
    ours, expected = norm(x), definition(norm, x)
    torch.testing.assert_close(ours, expected, **EXACT)
    direction = torch.randn_like(x)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (x, norm.gamma), direction),
        torch.autograd.grad(expected, (x, norm.gamma), direction),
        **EXACT,
    )


def test_gradients_of_the_fused_norm_equal_finite_differences() -> None:
    norm = norm_with_weights(4, use_silu=True).double()
    x = torch.randn(1, 4, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, _: norm(x), (x, norm.gamma))


@pytest.mark.parametrize("use_silu", [False, True])
def test_half_precision_is_computed_in_float32_and_rounded_once(use_silu: bool) -> None:
    norm = norm_with_weights(32, use_silu=use_silu)
    x = torch.randn(2, 32, 3, 4, 4).bfloat16()
    assert torch.equal(norm(x), norm(x.float()).bfloat16())


def test_fused_norm_keeps_its_input_and_one_number_per_position_for_the_way_back() -> None:
    norm, x = ChannelNorm(8, use_silu=True), torch.randn(2, 8, 3, 4, 4, requires_grad=True)
    kept: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm(x)
    assert kept == [x.shape, norm.gamma.shape, (2, 1, 3, 4, 4)]


@pytest.mark.parametrize("use_silu", [False, True])
def test_norm_of_nothing_is_nothing(use_silu: bool) -> None:
    assert torch.equal(
        ChannelNorm(3, use_silu=use_silu)(torch.zeros(1, 3, 1, 2, 2)), torch.zeros(1, 3, 1, 2, 2)
    )


def test_residual_block_adds_to_a_linear_shortcut() -> None:
    same, other = ResidualBlock(4, 4), ResidualBlock(4, 6)
    x = torch.randn(2, 4, 3, 4, 4)
    for block in (same, other):
        torch.nn.init.zeros_(block.residual[6].weight)
        torch.nn.init.zeros_(block.residual[6].bias)
    assert torch.equal(same(x), x)
    torch.testing.assert_close(other(x), other.shortcut(x))


def test_attention_is_a_softmax_over_the_positions_of_each_frame() -> None:
    attention = SpatialAttention(4).double()
    x = torch.randn(2, 4, 3, 2, 3, dtype=torch.float64)
    expected = x.clone()
    for clip in range(2):
        for frame in range(3):
            image = x[clip : clip + 1, :, frame]
            q, k, v = attention.to_qkv(attention.norm(image))[0].flatten(1).split(4)  # (c, h w)
            weights = (q.T @ k / 4**0.5).softmax(dim=-1)
            y = (v @ weights.T).view(1, 4, 2, 3)
            expected[clip, :, frame] += attention.proj(y)[0]
    torch.testing.assert_close(attention(x), expected, **EXACT)


def test_bypassed_attention_returns_its_input_and_is_frozen() -> None:
    attention = SpatialAttention(4, is_active=False)
    x = torch.randn(1, 4, 2, 3, 3)
    assert attention(x) is x
    assert not any(p.requires_grad for p in attention.parameters())
    assert attention.state_dict().keys() == SpatialAttention(4).state_dict().keys()
