"""Embeddings of time, class labels and codes; all of them in float32.

A code map is integers `(b, c, *grid)`. The published networks feed a linear layer with one-hot
vectors; `CodeEmbedding` keeps that layer's parameters, name for name, and computes the product
from the integers.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grn_lightning.nn.mlp import LinearFP32, full_precision

NUM_SINUSOIDS = 128  # half the width of the time embedding in every published GRN


def time_sinusoid(t: Tensor) -> Tensor:
    r"""Map times `(b,)` to `(b, 256)`: cosines, then sines, of :math:`t\,10^{-4 i / 128}`.

    `t` in [0, 1] is used as it is, without the customary factor 1000, so that most of the
    components are nearly constant; the published weights expect just that.
    """
    i = torch.arange(NUM_SINUSOIDS, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000.0) / NUM_SINUSOIDS * i)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Embed the time of the process: sinusoid, linear, SiLU, linear.

    Args:
        width: Width of the embedding.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            LinearFP32(2 * NUM_SINUSOIDS, width), nn.SiLU(), LinearFP32(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Map `t` `(b,)` in [0, 1] to `(b, width)`."""
        return self.mlp(time_sinusoid(t))


class LabelEmbedding(nn.Module):
    """Embed class labels; the row behind the last class is the null class.

    Args:
        num_classes: Number of classes without the null class.
        width: Width of the embedding.
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, class_labels: Tensor) -> Tensor:
        """Map `class_labels` `(b,)` in [0, num_classes] to `(b, width)`."""
        return self.embedding_table(class_labels).float()


class CodeEmbedding(nn.Module):
    """The product of a linear layer with the one-hot vector of a code map.

    With two letters in the alphabet the product is `(W_1 - W_0) bits + sum W_0`: half the width,
    no one-hot. For larger alphabets a one-hot map is written by a scatter and multiplied; a
    gather-sum (`embedding_bag`) was measured and lost on the way back: 2048 positions of 16
    elements with 16 codes to width 128 took 1.5 + 1.4 ms against 0.6 + 7.0 ms (forward +
    backward, one CPU core), and 2048 positions of 64 bits 0.8 + 0.6 ms against 1.1 + 18 ms.

    Args:
        num_elements: Elements per position, `c`.
        alphabet_size: Codes per element, `k`.
        width: Width of the embedding.
        order: How one-hot channels are ordered in the weight. "element": channel `e k + code`,
            weight `(width, c k)` of a linear layer with bias (text-conditional GRN). "class":
            channel `code c + e`, weight `(width, k c, 1, 1)` of a pointwise convolution without
            bias (class-conditional GRN).
    """

    def __init__(
        self,
        num_elements: int,
        alphabet_size: int,
        width: int,
        *,
        order: Literal["element", "class"] = "element",
    ) -> None:
        super().__init__()
        self.num_elements, self.alphabet_size, self.order = num_elements, alphabet_size, order
        shape = (width, num_elements * alphabet_size)
        if order == "element":
            self.weight = nn.Parameter(torch.empty(shape))
            self.bias = nn.Parameter(torch.zeros(width))
        else:
            self.weight = nn.Parameter(torch.empty(*shape, 1, 1))
            self.register_parameter("bias", None)
        nn.init.xavier_uniform_(self.weight.view(shape).detach())

    def forward(self, codes: Tensor) -> Tensor:
        """Map `codes` `(b, c, *grid)` in [0, k) to float32 `(b, *grid, width)`."""
        weight = self.weight.flatten(1).float()
        bias = None if self.bias is None else self.bias.float()
        with full_precision(codes.device):
            if self.alphabet_size == 2:
                return self._embed_bits(codes.movedim(1, -1), weight, bias)
            return F.linear(self._one_hot(codes.movedim(1, -1)), weight, bias)

    def _embed_bits(self, bits: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shape = (-1, 2) if self.order == "element" else (2, -1)
        zero, one = weight.unflatten(1, shape).unbind(2 if self.order == "element" else 1)
        constant = zero.sum(1) if bias is None else zero.sum(1) + bias
        return F.linear(bits.float(), one - zero, constant)

    def _one_hot(self, codes: Tensor) -> Tensor:
        """Turn codes `(..., c)` into float32 `(..., c k)` in the weight's order."""
        element = torch.arange(self.num_elements, device=codes.device)
        if self.order == "element":
            channel = element * self.alphabet_size + codes
        else:
            channel = codes * self.num_elements + element
        size = (*codes.shape[:-1], self.num_elements * self.alphabet_size)
        return torch.zeros(size, device=codes.device).scatter_(-1, channel, 1.0)

    def extra_repr(self) -> str:
        """Show the sizes in `print(model)`."""
        return f"{self.num_elements}, {self.alphabet_size}, order={self.order!r}"


def sincos_2d(height: int, width: int, dim: int) -> Tensor:
    r"""Fixed position table `(h w, dim)`, row-major: the column's half first, then the row's.

    Each half is sines, then cosines, of the coordinate times :math:`10^{-4 i / (dim/4)}`
    (the order of the published class-conditional models).
    """
    frequencies = 10_000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    halves = []
    for positions in (columns, rows):
        angles = positions.reshape(-1, 1) * frequencies  # (h w, dim / 4)
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=-1).float()
