"""How much samples differ from one another: what falls when a generator draws one thing only."""

import torch
from jaxtyping import Float, Integer
from torch import Tensor


def pairwise_difference(codes: Integer[Tensor, "b *shape"]) -> Float[Tensor, ""]:
    """Return the mean share of elements in which two samples differ, over all pairs.

    Args:
        codes: Code maps of at least two samples.

    Returns:
        A share in [0, 1], float64; 0 if all samples are one.

    Raises:
        ValueError: If there are fewer than two samples.

    Example:
        >>> float(pairwise_difference(torch.tensor([[0, 1], [0, 2], [0, 2]])))
        0.3333333333333333
    """
    if len(codes) < 2:
        raise ValueError(f"a difference needs at least 2 samples, got {len(codes)}.")
    rows = codes.flatten(1)
    shares = [(rows[n + 1 :] != rows[n]).double().mean(1) for n in range(len(rows) - 1)]
    return torch.cat(shares).mean()
