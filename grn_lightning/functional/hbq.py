r"""Hierarchical binary quantization (HBQ): latents <-> codes <-> bits <-> bytes.

Source: Generative Refinement Networks (arXiv 2604.13030), the section on the tokenizer. Round
``r = 0 .. M-1`` asks one question of a latent, is it above the centre of the interval that still
holds it?, and halves the interval:

    b_r = [z > q_r]        q_0 = 0        q_{r+1} = q_r + (2 b_r - 1) 2^{-(r+1)}

After ``M`` rounds the bits, most significant first, are the index of one of ``2^M`` equal bins of
[-1, 1], and ``q_M`` is the centre of that bin. So HBQ is a uniform scalar quantizer, and both
directions are one line. The functions work on tensors of any shape unless bits are involved: these
put the round before the channel ("round-major"), flat index ``r * d + c``.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Integer, UInt8
from torch import Tensor

MAX_ROUNDS = 16
"""Ample (the published tokenizers have 4) and safe: float32 counts to ``2^24``."""

TARGETS = ("index", "bit")
"""What a generator predicts per latent channel: one of ``2^M`` codes, or ``M`` bits."""


class ElementSizes(NamedTuple):
    """How many elements a generator predicts per position, and out of how many values each."""

    num_elements: int
    alphabet_size: int


class BitStatistics(NamedTuple):
    """How well each round's bits are used; entry ``r`` belongs to round ``r``."""

    ones_fraction: Float[Tensor, " m"]
    """Share of ones among all bits of the round; 0.5 is balanced."""
    entropy: Float[Tensor, " m"]
    """Entropy in bits of the bit of one channel, averaged over the channels, in [0, 1]."""
    dead_fraction: Float[Tensor, " m"]
    """Share of the channels whose bit never changes within the batch."""


def _check_num_rounds(num_rounds: int) -> None:
    if not 1 <= num_rounds <= MAX_ROUNDS:
        raise ValueError(f"num_rounds must be in 1..{MAX_ROUNDS}, got {num_rounds}.")


def _check_target(target: str) -> None:
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}.")


def _bit_positions(num_rounds: int, device: torch.device) -> Int[Tensor, " m"]:
    """Return ``M-1 .. 0``, the place value of each round's bit."""
    return torch.arange(num_rounds - 1, -1, -1, device=device)


# --------------------------------------------------------------------------- latents and codes


def hbq_encode(z: Float[Tensor, "*shape"], *, num_rounds: int) -> Int[Tensor, "*shape"]:
    r"""Quantize every latent to one of ``2**num_rounds`` codes.

    The ``M`` rounds in one pass: :math:`k = \lceil 2^{M-1} z \rceil + 2^{M-1} - 1`, clamped to the
    outermost bins. A latent on the border of two bins goes to the lower one, since a round asks
    for strictly greater. Equal to the rounds for every float16, bfloat16, float32 value.

    Args:
        z: Latents in [-1, 1]. Values outside, the infinities included, get the outermost codes;
            NaN is greater than nothing and gets code 0, as it does round by round.
        num_rounds: Number of binary rounds ``M``, 1 to 16.

    Returns:
        Codes ``k`` in ``[0, 2**M)``, long.

    Raises:
        ValueError: If ``num_rounds`` is out of range.

    Example:
        >>> hbq_encode(torch.tensor([-0.9, 0.0, 0.1, 0.9]), num_rounds=2)
        tensor([0, 1, 2, 3])
    """
    _check_num_rounds(num_rounds)
    half = 2 ** (num_rounds - 1)
    # Half precision cannot count to 2^M; widening is exact. So is scaling by a power of two,
    # whereas adding 1 to z before scaling would lose latents that are tiny but positive.
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    codes = ((z * half).ceil() + (half - 1)).clamp(0, 2 * half - 1)
    return codes.nan_to_num(0.0).long()


def hbq_decode(codes: Integer[Tensor, "*shape"], *, num_rounds: int) -> Float[Tensor, "*shape"]:
    r"""Return the centre of each code's bin, :math:`\hat z = (2k + 1) / 2^M - 1`.

    Args:
        codes: Codes in ``[0, 2**M)``.
        num_rounds: Number of binary rounds ``M``, 1 to 16.

    Returns:
        Odd multiples of ``2**-M`` in (-1, 1), float32, exact.

    Raises:
        ValueError: If ``num_rounds`` is out of range.

    Example:
        >>> hbq_decode(torch.tensor([0, 1, 2, 3]), num_rounds=2)
        tensor([-0.7500, -0.2500,  0.2500,  0.7500])
    """
    _check_num_rounds(num_rounds)
    return (2 * codes.to(torch.float32) + 1) * 2.0**-num_rounds - 1


def hbq_straight_through(z: Float[Tensor, "*shape"], *, num_rounds: int) -> Float[Tensor, "*shape"]:
    r"""Quantize and dequantize, with the gradient of the identity (:math:`d\hat z / dz = 1`).

    Args:
        z: Latents in [-1, 1]. A latent that is not finite becomes NaN: training must notice.
        num_rounds: Number of binary rounds ``M``, 1 to 16.

    Returns:
        The bin centres in the precision of ``z``; bfloat16 holds them exactly up to ``M = 8``.

    Raises:
        ValueError: If ``num_rounds`` is out of range.
    """
    z_hat = hbq_decode(hbq_encode(z.detach(), num_rounds=num_rounds), num_rounds=num_rounds)
    # z - z is exactly 0, so the value stays on the bin centre; z + (z_hat - z) would round.
    return z_hat.to(z.dtype) + (z - z.detach())


# --------------------------------------------------------------------------- codes and elements


def codes_to_bits(
    codes: Integer[Tensor, "b d *grid"], *, num_rounds: int
) -> Int[Tensor, "b m_d *grid"]:
    """Split every code into its bits, most significant first, round-major.

    Args:
        codes: Codes in ``[0, 2**M)``.
        num_rounds: Number of binary rounds ``M``, 1 to 16.

    Returns:
        Bits, long; bit ``r`` of channel ``c`` is channel ``r * d + c``: first the coarsest bit of
        every channel, then the next.

    Raises:
        ValueError: If ``num_rounds`` is out of range.

    Example:
        >>> codes_to_bits(torch.tensor([[2, 3]]), num_rounds=2)
        tensor([[1, 1, 0, 1]])
    """
    _check_num_rounds(num_rounds)
    positions = _bit_positions(num_rounds, codes.device)
    positions = positions.view(-1, *[1] * (codes.ndim - 1))  # (m, d, *grid)
    return ((codes.long().unsqueeze(1) >> positions) & 1).flatten(1, 2)


def bits_to_codes(
    bits: Integer[Tensor, "b m_d *grid"], *, num_rounds: int
) -> Int[Tensor, "b d *grid"]:
    """Join round-major bits into codes; the inverse of `codes_to_bits`.

    Args:
        bits: Zeros and ones, ``M * d`` channels.
        num_rounds: Number of binary rounds ``M``, 1 to 16.

    Returns:
        Codes in ``[0, 2**M)``, long.

    Raises:
        ValueError: If the channels are no multiple of ``num_rounds``.

    Example:
        >>> bits_to_codes(torch.tensor([[1, 1, 0, 1]]), num_rounds=2)
        tensor([[2, 3]])
    """
    _check_num_rounds(num_rounds)
    if bits.shape[1] % num_rounds:
        raise ValueError(
            f"the bit channels must be a multiple of num_rounds={num_rounds}, got {bits.shape[1]}."
        )
    positions = _bit_positions(num_rounds, bits.device)
    positions = positions.view(-1, *[1] * (bits.ndim - 1))  # (m, d, *grid)
    return (bits.long().unflatten(1, (num_rounds, -1)) << positions).sum(1)


def element_sizes(num_channels: int, *, num_rounds: int, target: str) -> ElementSizes:
    """Return what a generator predicts per position of a map with ``num_channels`` latents.

    Args:
        num_channels: Latent channels ``d``.
        num_rounds: Number of binary rounds ``M``, 1 to 16.
        target: "index" (one element per channel) or "bit" (one element per bit).

    Returns:
        ``(d, 2**M)`` for "index", ``(M * d, 2)`` for "bit".

    Raises:
        ValueError: If ``target`` is unknown or ``num_rounds`` is out of range.

    Example:
        >>> element_sizes(16, num_rounds=4, target="bit")
        ElementSizes(num_elements=64, alphabet_size=2)
    """
    _check_num_rounds(num_rounds)
    _check_target(target)
    if target == "index":
        return ElementSizes(num_channels, 2**num_rounds)
    return ElementSizes(num_rounds * num_channels, 2)


def codes_to_elements(
    codes: Integer[Tensor, "b d *grid"], *, num_rounds: int, target: str
) -> Int[Tensor, "b c *grid"]:
    """Return the integer map a generator sees: the codes themselves, or their bits.

    Args:
        codes: Codes in ``[0, 2**M)``.
        num_rounds: Number of binary rounds ``M``, 1 to 16.
        target: "index" or "bit".

    Returns:
        Elements as sized by `element_sizes`, long.

    Raises:
        ValueError: If ``target`` is unknown.
    """
    _check_target(target)
    return codes.long() if target == "index" else codes_to_bits(codes, num_rounds=num_rounds)


def elements_to_codes(
    elements: Integer[Tensor, "b c *grid"], *, num_rounds: int, target: str
) -> Int[Tensor, "b d *grid"]:
    """Return the codes behind a generator's map; the inverse of `codes_to_elements`.

    Args:
        elements: Codes for "index", round-major bits for "bit".
        num_rounds: Number of binary rounds ``M``, 1 to 16.
        target: "index" or "bit".

    Returns:
        Codes in ``[0, 2**M)``, long.

    Raises:
        ValueError: If ``target`` is unknown.
    """
    _check_target(target)
    if target == "index":
        return elements.long()
    return bits_to_codes(elements, num_rounds=num_rounds)


# --------------------------------------------------------------------------- codes and bytes


def pack_codes(codes: Integer[Tensor, "*shape"], *, num_rounds: int) -> UInt8[Tensor, " n"]:
    """Write codes as one string of bits, ``M`` per code, most significant first.

    Args:
        codes: Codes in ``[0, 2**M)``, read in row-major order. Their extremes are looked at: a
            code that needs more bits would be lost without a trace.
        num_rounds: Number of binary rounds ``M``, 1 to 16.

    Returns:
        ``ceil(M * num_codes / 8)`` bytes; the last one is filled up with zeros.

    Raises:
        ValueError: If a code does not fit into ``num_rounds`` bits.

    Example:
        >>> pack_codes(torch.tensor([15, 0, 1]), num_rounds=4)
        tensor([240,  16], dtype=torch.uint8)
    """
    _check_num_rounds(num_rounds)
    codes = codes.flatten().long()
    if codes.numel() and not 0 <= codes.min() <= codes.max() < 2**num_rounds:
        raise ValueError(
            f"codes must be in 0..{2**num_rounds - 1} for num_rounds={num_rounds}, got "
            f"{codes.min()}..{codes.max()}; pack with the num_rounds of their tokenizer."
        )
    bits = (codes.unsqueeze(1) >> _bit_positions(num_rounds, codes.device)) & 1
    bits = bits.to(torch.uint8).flatten()  # (num_codes * m,)
    octets = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (octets << _bit_positions(8, codes.device).to(torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_codes(
    packed: UInt8[Tensor, " n"], *, shape: tuple[int, ...], num_rounds: int
) -> Int[Tensor, "..."]:
    """Read codes from their string of bits; the inverse of `pack_codes`.

    Args:
        packed: Bytes made by `pack_codes`.
        shape: Shape of the codes.
        num_rounds: Number of binary rounds ``M`` they were packed with.

    Returns:
        Codes in ``[0, 2**M)`` of the given shape, long.

    Raises:
        ValueError: If the number of bytes is not that of ``shape`` and ``num_rounds``.

    Example:
        >>> unpack_codes(torch.tensor([240, 16], dtype=torch.uint8), shape=(3,), num_rounds=4)
        tensor([15,  0,  1])
    """
    _check_num_rounds(num_rounds)
    num_bits = num_rounds * torch.Size(shape).numel()
    if len(packed) != -(-num_bits // 8):
        raise ValueError(
            f"codes of shape {tuple(shape)} with num_rounds={num_rounds} take {-(-num_bits // 8)} "
            f"bytes, got {len(packed)}; shape and num_rounds must be those of the stored codes."
        )
    octets = packed.unsqueeze(1) >> _bit_positions(8, packed.device).to(torch.uint8)
    bits = (octets & 1).flatten()[:num_bits].view(*shape, num_rounds).long()
    return (bits << _bit_positions(num_rounds, packed.device)).sum(-1)


# --------------------------------------------------------------------------- statistics


def bit_statistics(codes: Integer[Tensor, "b d *grid"], *, num_rounds: int) -> BitStatistics:
    """Measure balance, entropy and deadness of the bits of every round.

    Args:
        codes: Codes in ``[0, 2**M)``.
        num_rounds: Number of binary rounds ``M``, 1 to 16.

    Returns:
        Three float32 vectors with one entry per round.

    Raises:
        ValueError: If ``num_rounds`` is out of range.
    """
    bits = codes_to_bits(codes, num_rounds=num_rounds).unflatten(1, (num_rounds, -1))
    bits = bits.movedim(0, 2).flatten(2)  # (m, d, b * grid)
    ones, total = bits.sum(-1), bits.shape[-1]
    p = ones / total  # (m, d)
    entropy = (torch.special.entr(p) + torch.special.entr(1 - p)) / math.log(2)
    is_dead = (ones == 0) | (ones == total)
    return BitStatistics(p.mean(1), entropy.mean(1), is_dead.float().mean(1))
