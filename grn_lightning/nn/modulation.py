"""Adaptive layer modulation: shift, scale and gate vectors from a conditioning vector."""

from typing import cast

from torch import Tensor, nn

from grn_lightning.nn.mlp import LinearFP32


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return `x * (1 + scale) + shift`; vectors `(b, 1, d)` broadcast over the tokens of `x`."""
    return x * (1 + scale) + shift


class Modulation(nn.Sequential):
    """SiLU and a linear layer that make `num_vectors` modulation vectors (adaLN of DiT).

    The linear layer starts at zero (the model's `init_weights` sees to it), so that gated
    branches start as the identity.

    Args:
        width: Width of the conditioning vector and of each vector made from it.
        num_vectors: How many vectors; six in a block, two in the final layer.
        is_fp32: Compute in float32 even under autocast.
    """

    def __init__(self, width: int, num_vectors: int, *, is_fp32: bool = False) -> None:
        linear = LinearFP32 if is_fp32 else nn.Linear
        super().__init__(nn.SiLU(), linear(width, num_vectors * width))
        self.num_vectors = num_vectors

    @property
    def linear(self) -> nn.Linear:
        """The layer that makes the vectors."""
        return cast(nn.Linear, self[1])

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        """Turn `c` `(b, d)` into `num_vectors` tensors `(b, 1, d)`."""
        vectors = super().forward(c.to(self.linear.weight.dtype))  # (b, num_vectors d)
        return vectors[:, None].chunk(self.num_vectors, dim=-1)
