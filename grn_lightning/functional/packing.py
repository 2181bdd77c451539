"""Documents one behind the other in one sequence: who sees whom, their noise, their means.

A *document* is one training sample, of whatever size: a caption and the map of a picture or a clip.
Several of them share a sequence without padding. Whatever belongs to a document, the noise above
all, is what it would be alone; so neither the neighbours nor the place in the sequence matter.
"""

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from grn_lightning.functional.random import philox_4x32

_MASK = 0xFFFFFFFF


def document_index(lengths: Integer[Tensor, " d"], total: int) -> Integer[Tensor, " total"]:
    """Return the number of the document that each token of a sequence belongs to.

    Args:
        lengths: Tokens of each document, 0 or more.
        total: Their sum, which the caller knows: a GPU need not be asked.

    Example:
        >>> document_index(torch.tensor([2, 0, 1]), 3)
        tensor([0, 0, 2])
    """
    number = torch.arange(len(lengths), device=lengths.device)
    return number.repeat_interleave(lengths, output_size=total)


def place_in_document(lengths: Integer[Tensor, " d"], total: int) -> Integer[Tensor, " total"]:
    """Return how many tokens of its document stand before each token.

    Args:
        lengths: Tokens of each document.
        total: Their sum.

    Example:
        >>> place_in_document(torch.tensor([2, 3]), 5)
        tensor([0, 1, 0, 1, 2])
    """
    starts = lengths.cumsum(0) - lengths
    place = torch.arange(total, device=lengths.device)
    return place - starts.repeat_interleave(lengths, output_size=total)


def document_mask(
    document: Integer[Tensor, " l"], is_prefix: Bool[Tensor, " l"] | None = None
) -> Bool[Tensor, "l l"]:
    """Return who attends to whom (query, key): tokens of one document, and a prefix to itself only.

    Args:
        document: Number of each token's document.
        is_prefix: True for tokens that do not see the rest of their document; None for no such.

    Example:
        >>> is_text = torch.tensor([True, False, False])
        >>> document_mask(torch.tensor([0, 0, 1]), is_text)
        tensor([[ True, False, False],
                [ True,  True, False],
                [False, False,  True]])
    """
    same = document[:, None] == document
    return same if is_prefix is None else same & (is_prefix | ~is_prefix[:, None])


def ragged_uniform(
    sample_index: Integer[Tensor, " d"], sizes: Integer[Tensor, " d"], *, seed: int, stream: int
) -> tuple[Float[Tensor, " n"], Integer[Tensor, " d"]]:
    """Return the numbers of `counter_uniform` for samples of different sizes, in one go.

    Args:
        sample_index: Any 64-bit integers, one per sample.
        sizes: How many numbers each sample needs at least, below ``2**34``.
        seed: In ``[0, 2**64)``.
        stream: See `Stream`.

    Returns:
        Multiples of ``2**-24`` in [0, 1), float32, one sample behind the other, and where each
        begins. Number ``i`` of a sample is number ``i`` of ``counter_uniform`` at step 0.

    Example:
        >>> u, starts = ragged_uniform(
        ...     torch.tensor([7, 3]), torch.tensor([2, 5]), seed=0, stream=0
        ... )
        >>> starts.tolist(), len(u)
        ([0, 4], 12)
    """
    counters = (sizes + 3) // 4  # four numbers per counter
    total = int(counters.sum())
    sample = document_index(counters, total)
    word_0 = place_in_document(counters, total)
    index = sample_index.long()[sample]
    word_1 = torch.full_like(word_0, int(stream) << 24)
    words = philox_4x32(
        (word_0, word_1, index & _MASK, (index >> 32) & _MASK), (seed & _MASK, seed >> 32)
    )
    u = torch.stack([word >> 8 for word in words], dim=1).float() * 2.0**-24
    return u.flatten(), 4 * (counters.cumsum(0) - counters)


def document_means(
    values: Float[Tensor, " l"], document: Integer[Tensor, " l"], num_documents: int
) -> Float[Tensor, " num_documents"]:
    """Return the mean of each document's values; NaN where there are none.

    Args:
        values: One per token.
        document: Number of each token's document.
        num_documents: How many there are.

    Example:
        >>> document_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]), 2)
        tensor([2., 5.])
    """
    sums = values.new_zeros(num_documents).index_add(0, document, values)
    return sums / torch.bincount(document, minlength=num_documents)
