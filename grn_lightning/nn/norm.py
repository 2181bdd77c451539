"""Root-mean-square normalization with statistics in float32."""

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """Divide by the root mean square over the last dimension and scale by a learned weight.

    Statistics are float32 whatever comes in. The result has the dtype of the weight, not of the
    input: the residual stream stays float32, and the layer behind the norm gets what it expects
    both under autocast (float32 weights) and in a model cast to bfloat16 as a whole.

    Args:
        width: Size of the last dimension.
        eps: Added to the mean square (1e-6 in all published GRN models).
    """

    def __init__(self, width: int, *, eps: float = 1e-6) -> None:
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` `(..., width)`; same shape."""
        normed = F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)
        return normed.to(self.weight.dtype)
