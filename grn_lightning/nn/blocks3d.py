"""Blocks of the video tokenizer: norm over channels, residual block, attention within a frame.

Source: GRN (arXiv 2604.13030), video tokenizer. The attributes carry the names of the published
weights.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from grn_lightning.nn.attention import attend
from grn_lightning.nn.conv3d import (
    CausalConv3d,
    StreamCache,
    TemporalModule,
    TemporalSequential,
    per_frame,
)


def _inverse_norm(x: Tensor) -> Tensor:
    """Return `sqrt(c) / |x|`, `(b, 1, ...)`, the norm taken over axis 1 and kept from 0."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x.shape[1] ** 0.5 / norm.clamp_min(1e-12)


class _NormSiLU(torch.autograd.Function):
    """`silu(gamma sqrt(c) x / |x|)`, keeping only `x` and its norm for the way back.

    Written out because these elementwise steps are a good part of a training step, in time and,
    as separate operations keep every intermediate result, in memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor) -> Tensor:
        """Compute in at least float32, return the type of `x`."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = _inverse_norm(wide)
        ctx.save_for_backward(x, gamma, scale)
        return F.silu((wide * scale).mul_(gamma), inplace=True).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of `x` and `gamma`."""
        x, gamma, scale = ctx.saved_tensors
        unit = x.to(scale.dtype) * scale  # mean square 1 over the channels
        grad = torch.ops.aten.silu_backward(grad.to(unit.dtype), unit * gamma)
        product = grad * unit
        grad_gamma = product.sum((0, *range(2, x.ndim)))
        radial = product.mul_(gamma).mean(1, keepdim=True)
        grad_x = grad.mul_(gamma).addcmul_(unit, radial, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_gamma.view_as(gamma).to(gamma.dtype)


class ChannelNorm(nn.Module):
    r"""RMS norm over axis 1: :math:`\gamma \sqrt{c}\, x / \max(\|x\|_2, 10^{-12})`.

    Computed in at least float32; the result has the type of the input.

    Args:
        num_channels: Size `c` of axis 1.
        num_axes: Number of axes behind the channels; 2 for images, 3 for clips.
        use_silu: Apply SiLU to the result, fused.
    """

    def __init__(self, num_channels: int, *, num_axes: int = 3, use_silu: bool = False) -> None:
        super().__init__()
        self.use_silu = use_silu
        self.gamma = nn.Parameter(torch.ones(num_channels, *[1] * num_axes))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(b, c, ...)`; same shape."""
        if self.use_silu:
            return _NormSiLU.apply(x, self.gamma)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * _inverse_norm(wide) * self.gamma).to(x.dtype)


class ResidualBlock(TemporalModule):
    """Twice norm, SiLU, causal 3x3x3 convolution, beside a shortcut that is linear.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; where it differs, the shortcut is a 1x1x1 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = TemporalSequential(
            ChannelNorm(in_channels, use_silu=True),
            nn.Identity(),  # place of the SiLU in the published names
            CausalConv3d(in_channels, out_channels),
            ChannelNorm(out_channels, use_silu=True),
            nn.Identity(),  # idem
            nn.Identity(),  # place of a dropout, whose published rate is 0
            CausalConv3d(out_channels, out_channels),
        )
        is_same = in_channels == out_channels
        self.shortcut = nn.Identity() if is_same else nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Map `(b, c, f, h, w)` to `(b, c', f, h, w)`."""
        return self.shortcut(x) + self.residual(x, cache)


class SpatialAttention(nn.Module):
    """Self-attention with one head among the positions of each frame, added to its input.

    Args:
        num_channels: Channels, which is also the width of the head.
        is_active: False makes the block return its input. Its weights stay, frozen, because
            published checkpoints hold them whether or not they were trained with this block.
    """

    def __init__(self, num_channels: int, *, is_active: bool = True) -> None:
        super().__init__()
        self.is_active = is_active
        self.norm = ChannelNorm(num_channels, num_axes=2)
        self.to_qkv = nn.Conv2d(num_channels, 3 * num_channels, 1)
        self.proj = nn.Conv2d(num_channels, num_channels, 1)
        self.requires_grad_(is_active)

    def forward(self, x: Tensor) -> Tensor:
        """Let the positions of each frame of `(b, c, f, h, w)` attend to each other; same shape."""
        return x + per_frame(self._attend, x) if self.is_active else x

    def _attend(self, images: Tensor) -> Tensor:
        """Compute what is added to `(n, c, h, w)`."""
        h, w = images.shape[-2:]
        qkv = self.to_qkv(self.norm(images)).flatten(2).transpose(1, 2)  # (n, h w, 3 c)
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)  # (n, 1, h w, c)
        y = attend(q, k, v).squeeze(1)
        return self.proj(y.transpose(1, 2).unflatten(2, (h, w)))
