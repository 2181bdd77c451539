"""Keep the likely values of a categorical distribution and forbid the rest."""

import math

from jaxtyping import Float
from torch import Tensor


def truncate_logits(
    logits: Float[Tensor, "*shape k"], *, top_k: int = 0, top_p: float = 1.0
) -> Float[Tensor, "*shape k"]:
    """Set all but the most likely values of every row to -inf.

    First ``top_k``, then ``top_p`` among what is left, as in LlamaGen's sampler. Among equal logits
    all that tie with the last one kept are kept.

    Args:
        logits: Unnormalized log-probabilities, after guidance and temperature.
        top_k: Values kept; 0 or at least ``k`` keeps all.
        top_p: Smallest total probability of the values kept, in (0, 1]; the most likely value
            always stays.

    Returns:
        Logits of the same shape.

    Raises:
        ValueError: If ``top_k`` is negative or ``top_p`` outside (0, 1].

    Example:
        >>> import torch
        >>> truncate_logits(torch.tensor([0.1, 0.6, 0.3]).log(), top_k=2).exp()
        tensor([0.0000, 0.6000, 0.3000])
    """
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"top_k must be at least 0 and top_p in (0, 1], got top_k={top_k}, top_p={top_p}."
        )
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        ordered = logits.sort(dim=-1, descending=True).values
        probabilities = ordered.float().softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # probability of all that are likelier
        count = (before < top_p).sum(-1, keepdim=True).clamp(min=1)
        logits = logits.masked_fill(logits < ordered.gather(-1, count - 1), -math.inf)
    return logits
