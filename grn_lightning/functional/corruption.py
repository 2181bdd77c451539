"""The corruption that a generator learns to undo: keep each element with probability t.

Source: Generative Refinement Networks (arXiv 2604.13030), the section on global refinement. From
clean elements ``x_1`` and uniformly random ones ``x_0``,

    x_t = m * x_1 + (1 - m) * x_0        m ~ Bernoulli(t), one draw per element

The same three functions serve training (``x_1`` is the truth) and sampling (``x_1`` is the latest
prediction, ``x_0`` the map the picture started from). Randomness comes in as uniform numbers.
"""

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor


def random_codes(u: Float[Tensor, "*shape"], *, alphabet_size: int) -> Integer[Tensor, "*shape"]:
    """Return uniformly random elements, ``floor(alphabet_size * u)``.

    Args:
        u: Uniform numbers in [0, 1).
        alphabet_size: Number ``k`` of values. With numbers of 24 bits the chances of two values
            differ by at most ``2**-24``, and not at all where ``k`` is a power of two.

    Returns:
        Integers in ``[0, k)``, long.

    Raises:
        ValueError: If ``alphabet_size`` is smaller than 2.

    Example:
        >>> random_codes(torch.tensor([0.0, 0.49, 0.5, 0.999]), alphabet_size=2)
        tensor([0, 0, 1, 1])
    """
    if alphabet_size < 2:
        raise ValueError(f"alphabet_size must be at least 2, got {alphabet_size}.")
    # The product may round up to k when u has more bits than float32 has left.
    return (u * alphabet_size).long().clamp(max=alphabet_size - 1)


def keep_mask(u: Float[Tensor, "b *shape"], t: Float[Tensor, " b"]) -> Bool[Tensor, "b *shape"]:
    """Decide for every element whether it is kept: ``u < t``.

    Args:
        u: Uniform numbers in [0, 1), one per element.
        t: Time of each sample in [0, 1]; the probability of being kept.

    Returns:
        True where the element is kept: nowhere at ``t = 0``, everywhere at ``t = 1``.

    Example:
        >>> keep_mask(torch.tensor([[0.2, 0.8]]), torch.tensor([0.5]))
        tensor([[ True, False]])
    """
    return u < t.view(-1, *[1] * (u.ndim - 1))


def corrupt(
    x_1: Integer[Tensor, "*shape"],
    x_0: Integer[Tensor, "*shape"],
    keep: Bool[Tensor, "*shape"],
) -> Integer[Tensor, "*shape"]:
    """Return ``x_t``: the element of ``x_1`` where it is kept, else that of ``x_0``.

    Args:
        x_1: Clean elements.
        x_0: Random elements, see `random_codes`; they may equal the clean ones by chance.
        keep: See `keep_mask`.

    Returns:
        Corrupted elements.

    Example:
        >>> corrupt(torch.tensor([1, 1]), torch.tensor([0, 0]), torch.tensor([True, False]))
        tensor([1, 0])
    """
    return torch.where(keep, x_1, x_0)
