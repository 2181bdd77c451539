"""Randomness as a function: the number at a given place is always the same number.

`counter_uniform` hashes (seed, sample, step, stream, element) with Philox-4x32-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011). It keeps no state, so a picture depends
neither on the batch it is drawn in, nor on order, rank, or a run that stopped and went on. Philox
is a bijection of 128-bit counters for every 64-bit key, and every argument owns its bits:

    key      0..63    seed
    counter  0..31    element // 4, row-major over ``shape`` (four numbers per counter)
            32..55    step
            56..63    stream
            64..127   sample index (two's complement)

Two calls that differ in any argument therefore never hash the same counter with the same key.
"""

import math
from enum import IntEnum

import torch
from jaxtyping import Float, Integer
from torch import Tensor

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85  # golden ratio and sqrt(3) - 1, as the paper has them
_NUM_ROUNDS = 10
_MASK = 0xFFFFFFFF

_MAX_SEED = 2**64 - 1
_MAX_STEP = 2**24 - 1
_MAX_STREAM = 2**8 - 1
_MAX_ELEMENTS = 2**34

_CACHED_COUNTERS = 2**14
"""Counters hashed at a time on the CPU: all temporaries stay in the second-level cache."""

Words = tuple[Tensor, Tensor, Tensor, Tensor]


class Stream(IntEnum):
    """What the numbers are used for; different streams share no number."""

    INITIAL = 0
    """Random elements: the start of sampling, the replacements in training."""
    DRAW = 1
    """Drawing elements from a prediction."""
    KEEP = 2
    """Which elements are kept."""
    TIME = 3
    """The time of a training sample."""
    DROP = 4
    """Whether a training sample loses its condition."""
    START = 5
    """Which elements of a given map sampling starts from."""
    FIRST_FRAME = 6
    """Whether a training clip is given its first frame."""
    SUBSET = 7
    """Which samples of a judged set have their features kept."""


def philox_4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Hash counters with ten rounds of Philox.

    Args:
        counter: Four tensors of 32-bit words in [0, 2**32), long; shapes that broadcast.
        key: Two 32-bit words.

    Returns:
        Four tensors of 32-bit words in [0, 2**32), long, of the broadcast shape.
    """
    # The product of two 32-bit words wraps around in int64, yet all its 64 bits are right; only
    # the shift sees the sign, and the mask removes it. Words 1 and 3 are never multiplied before
    # they are masked, so they keep the whole product until the end.
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0 = ((product_1 >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        c2 = ((product_0 >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3 = product_1, product_0
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def _check_range(name: str, value: int, maximum: int) -> None:
    if not 0 <= value <= maximum:
        raise ValueError(f"{name} must be in 0..{maximum}, got {value}.")


def _checked_step(step: int | Tensor, device: torch.device) -> Tensor:
    """Return the step as a tensor that broadcasts over samples, `(b, 1)` or `(1, 1)`."""
    if isinstance(step, Tensor):
        if ((step < 0) | (step > _MAX_STEP)).any():
            raise ValueError(f"step must be in 0..{_MAX_STEP}, got {step.tolist()}.")
        return step.to(device, torch.long).unsqueeze(1)
    _check_range("step", step, _MAX_STEP)
    return torch.tensor([[step]], device=device)


def counter_uniform(
    sample_index: Integer[Tensor, " b"],
    *,
    seed: int,
    step: int | Integer[Tensor, " b"],
    stream: int,
    shape: tuple[int, ...],
) -> Float[Tensor, "b ..."]:
    """Return the uniform numbers that belong to the given samples, step and stream.

    Row ``i`` depends on ``sample_index[i]``, its step, seed and stream alone. Within a row, a
    number depends on its row-major position alone: numbers of shape ``(2, 8, 8)`` begin with those
    of shape ``(1, 8, 8)``.

    Args:
        sample_index: Any 64-bit integers, one per sample; say, the running number of a picture.
        seed: In ``[0, 2**64)``.
        step: In ``[0, 2**24)``; one for all samples, or one per sample. A tensor is looked at, so
            that a GPU has to catch up; an integer is not.
        stream: See `Stream`; in ``[0, 2**8)``.
        shape: Shape of one sample's numbers, at most ``2**34`` of them.

    Returns:
        Multiples of ``2**-24`` in [0, 1), float32, ``(b, *shape)``, on the device of
        ``sample_index``.

    Raises:
        ValueError: If seed, step, stream or shape does not fit into its bits.

    Example:
        >>> index = torch.tensor([7, 3])
        >>> both = counter_uniform(index, seed=0, step=0, stream=Stream.DRAW, shape=(2,))
        >>> alone = counter_uniform(index[1:], seed=0, step=0, stream=Stream.DRAW, shape=(2,))
        >>> torch.equal(both[1:], alone)
        True
    """
    num_elements = math.prod(shape)
    _check_range("seed", seed, _MAX_SEED)
    _check_range("stream", stream, _MAX_STREAM)
    _check_range("the number of elements", num_elements, _MAX_ELEMENTS)
    device = sample_index.device

    # The words of the counter that all elements of a sample share: (b, 1) or (1, 1).
    sample = sample_index.long().unsqueeze(1)
    word_1 = _checked_step(step, device) | (int(stream) << 24)
    word_2, word_3 = sample & _MASK, (sample >> 32) & _MASK
    key = (seed & _MASK, seed >> 32)

    num_counters = -(-num_elements // 4)
    u = torch.empty(len(sample), num_counters, 4, device=device, dtype=torch.float32)
    chunk = num_counters if device.type != "cpu" else _CACHED_COUNTERS // max(1, len(sample))
    chunk = max(1, chunk)
    for start in range(0, num_counters, chunk):
        stop = min(start + chunk, num_counters)
        word_0 = torch.arange(start, stop, device=device).unsqueeze(0)
        for i, word in enumerate(philox_4x32((word_0, word_1, word_2, word_3), key)):
            u[:, start:stop, i] = word >> 8  # the upper 24 bits: what float32 holds
    return u.mul_(2.0**-24).flatten(1)[:, :num_elements].reshape(len(sample), *shape)
