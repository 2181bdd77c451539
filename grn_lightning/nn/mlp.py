"""Linear layers that stay in float32, and the two gated feed-forward layers of the generators."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def full_precision(device: torch.device) -> AbstractContextManager:
    """Switch autocast off on `device`; the meta device has none to switch."""
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class LinearFP32(nn.Linear):
    """A linear layer whose product is float32 under autocast and with bfloat16 weights alike.

    The published training keeps embeddings and head in float32 (GRN text-conditional training);
    as a module of its own, hooks that gather sharded parameters find it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `(..., in_features)` to float32 `(..., out_features)`."""
        with full_precision(x.device):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.float(), self.weight.float(), bias)


class SwiGLU(nn.Module):
    """Gated feed-forward layer with one fused input matrix and biases (class-conditional GRN).

    `w3(silu(a) * b)` where `a, b` are the two halves of `w12(x)`.

    Args:
        width: Input and output width.
        hidden: Width of each half.
        dropout: Dropout rate on the gated product.
    """

    def __init__(self, width: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `(..., width)` to the same shape."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(self.dropout(F.silu(gate) * value))


class GatedMLP(nn.Module):
    """Gated feed-forward layer with separate matrices, no biases (text-conditional GRN).

    Args:
        width: Input and output width.
        hidden: Width of the gated product.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `(..., width)` to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
