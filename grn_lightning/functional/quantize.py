r"""Baselines of HBQ: finite scalar quantization, signs, and the entropies that keep signs in use.

Sources: FSQ (arXiv 2309.15505), LFQ (MAGVIT-v2, arXiv 2310.05737), BSQ (arXiv 2406.07548). LFQ and
BSQ ask each channel for one bit, its sign; they differ in what comes before: BSQ puts the latents
of a position on the unit sphere. Learned codebooks need state and live in `nn/quantizers.py`.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor

_RARE = 1e-12  # words below this probability get no gradient: that of 0 would be infinite
_FSQ_MARGIN = 1e-3  # widens the range a little, so that the outermost levels can be reached


class CodeEntropies(NamedTuple):
    """Entropies of softly assigned bits, per bit: 0 is certain, or collapsed, 1 is a coin."""

    per_position: Float[Tensor, ""]
    """Mean over positions of the entropy of their own bits; small where latents are far from 0."""
    overall: Float[Tensor, ""]
    """Entropy of the mean distribution over positions, joint within a group; 1 is even use."""


def _check_num_levels(num_levels: int) -> None:
    if num_levels < 3:
        raise ValueError(f"num_levels must be at least 3, got {num_levels}; two levels are signs.")


def straight_through(
    z: Float[Tensor, "*shape"], z_hat: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    r"""Return exactly ``z_hat``, with the gradient of the identity (:math:`d\hat z / dz = 1`).

    Args:
        z: Latents. One that is not finite becomes NaN: training must notice.
        z_hat: Their quantized values; no gradient reaches them.

    Returns:
        ``z_hat`` in the precision of ``z``.
    """
    return z_hat.detach().to(z.dtype) + (z - z.detach())


def fsq_squash(x: Float[Tensor, "*shape"], *, num_levels: int) -> Float[Tensor, "*shape"]:
    r"""Bound latents so that rounding gives ``num_levels`` values.

    With :math:`h = \lfloor L/2 \rfloor`: a tanh onto :math:`\pm (L-1)/(2h)`, for an even number of
    levels moved down by half a level, so that zero stays zero.

    Args:
        x: Any real numbers.
        num_levels: Levels ``L`` of a channel, at least 3.

    Returns:
        Values in about [-1, 1], the upper end lower for even ``L``; to be rounded to ``k / h``.

    Raises:
        ValueError: If there are too few levels.
    """
    _check_num_levels(num_levels)
    reach = (num_levels - 1) * (1 + _FSQ_MARGIN) / 2
    offset = 0.0 if num_levels % 2 else 0.5
    shift = math.atanh(offset / reach)
    return ((x + shift).tanh() * reach - offset) / (num_levels // 2)


def fsq_encode(z: Float[Tensor, "*shape"], *, num_levels: int) -> Int[Tensor, "*shape"]:
    """Round every latent to the nearest of ``num_levels`` levels.

    Args:
        z: Bounded latents, see `fsq_squash`; those outside get the outermost codes.
        num_levels: Levels ``L`` of a channel, at least 3.

    Returns:
        Codes in ``[0, L)``, long; a tie goes to the even level.

    Raises:
        ValueError: If there are too few levels.

    Example:
        >>> fsq_encode(torch.tensor([-1.0, -0.2, 0.3, 1.0]), num_levels=5)
        tensor([0, 2, 3, 4])
    """
    _check_num_levels(num_levels)
    half = num_levels // 2
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return ((z * half).round() + half).clamp(0, num_levels - 1).nan_to_num(0.0).long()


def fsq_decode(codes: Integer[Tensor, "*shape"], *, num_levels: int) -> Float[Tensor, "*shape"]:
    """Return the level of each code, ``k / floor(L/2) - 1``.

    Args:
        codes: Codes in ``[0, L)``.
        num_levels: Levels ``L`` of a channel, at least 3.

    Returns:
        Levels in [-1, 1], float32; for even ``L`` the highest is ``1 - 2/L``.

    Raises:
        ValueError: If there are too few levels.

    Example:
        >>> fsq_decode(torch.tensor([0, 1, 2, 3, 4]), num_levels=5)
        tensor([-1.0000, -0.5000,  0.0000,  0.5000,  1.0000])
    """
    _check_num_levels(num_levels)
    half = num_levels // 2
    return (codes.to(torch.float32) - half) / half


def sign_encode(z: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Return 1 where a latent is positive, else 0; long.

    Example:
        >>> sign_encode(torch.tensor([-0.5, 0.0, 2.0]))
        tensor([0, 0, 1])
    """
    return (z > 0).long()


def sign_decode(codes: Integer[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return -1 for code 0 and 1 for code 1; float32.

    Example:
        >>> sign_decode(torch.tensor([0, 1]))
        tensor([-1.,  1.])
    """
    return 2 * codes.to(torch.float32) - 1


def sign_entropies(
    z: Float[Tensor, "b c *grid"], *, group_bits: int, temperature: float
) -> CodeEntropies:
    r"""Measure how certain and how evenly used signs are, with gradients.

    A bit is one with probability :math:`\sigma(z / \tau)`. A position should be certain of its bits
    (`per_position` small), all positions together should use all words (`overall` large). Words of
    all channels cannot be counted, so channels are taken in groups: `overall` sees what depends on
    what within a group only. The published terms are these with a codebook in place of the closed
    form; their inverse temperature :math:`\beta` is our :math:`\tau = 1 / (4 \beta)`.

    Args:
        z: Latents whose signs are the bits, scaled to a size of about 1.
        group_bits: Channels per group, at least 1; the last group may be smaller.
        temperature: :math:`\tau`, positive.

    Returns:
        Two scalars in [0, 1], at least float32.

    Raises:
        ValueError: If ``group_bits`` or ``temperature`` is out of range.
    """
    if group_bits < 1 or temperature <= 0:
        raise ValueError(
            "group_bits must be at least 1 and temperature positive, "
            f"got {group_bits} and {temperature}."
        )
    z = z.to(torch.promote_types(z.dtype, torch.float32))  # entropies underflow in half precision
    logits = z.movedim(1, -1).flatten(0, -2) / temperature  # (n, c)
    ones, zeros = logits.sigmoid(), (-logits).sigmoid()
    num_bits = logits.shape[1]
    # Logarithms of probabilities that may be zero have no gradient; these have one.
    own = -ones * F.logsigmoid(logits) - zeros * F.logsigmoid(-logits)
    words = [
        torch.special.entr(_word_probabilities(*group).mean(0).clamp(min=_RARE)).sum()
        for group in zip(zeros.split(group_bits, 1), ones.split(group_bits, 1), strict=True)
    ]
    to_bits = 1 / (num_bits * math.log(2))
    return CodeEntropies(own.sum(1).mean() * to_bits, torch.stack(words).sum() * to_bits)


def _word_probabilities(
    zeros: Float[Tensor, "n g"], ones: Float[Tensor, "n g"]
) -> Float[Tensor, "n k"]:
    """Return the probability of each of the ``2^g`` words of independent bits."""
    words = torch.ones_like(zeros[:, :1])
    for zero, one in zip(zeros.split(1, 1), ones.split(1, 1), strict=True):
        words = torch.stack([words * zero, words * one], dim=-1).flatten(1)
    return words
