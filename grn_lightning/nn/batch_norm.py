"""Batch normalization by the statistics of this very batch, over all ranks and on every device.

torch's synchronized batch norm runs on CUDA only, and a pair of processes on a CPU would train
another network than one process does.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def num_ranks() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over all ranks. Its gradient is summed as well, since all results hold it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _SumOverRanks.apply(grad.contiguous())


def mean_over_ranks(x: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks, with gradients; one process returns it as is."""
    return _SumOverRanks.apply(x) / num_ranks() if num_ranks() > 1 else x


class BatchNorm(nn.Module):
    """Normalize each channel by the statistics of the batch, which is that of all ranks together.

    There are no running statistics: real and generated samples are normalized each by their own,
    also in eval mode. All ranks must have batches of one shape.

    Args:
        num_channels: Size of axis 1.
    """

    def __init__(self, num_channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(b, c, ...)`; same shape."""
        if num_ranks() == 1:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        axes = [0, *range(2, x.ndim)]
        wide = x.float()
        centred = wide - mean_over_ranks(wide.mean(axes, keepdim=True))
        variance = mean_over_ranks(centred.square().mean(axes, keepdim=True))
        shape = (1, -1, *[1] * (x.ndim - 2))
        scaled = centred * (variance + self.eps).rsqrt()
        return (scaled * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)
