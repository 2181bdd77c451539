"""What a generator is trained on and watched by: cross-entropy and accuracy of elements.

Source: Generative Refinement Networks (arXiv 2604.13030): the plain mean over *all* elements of a
sample, kept and replaced ones alike, with no weight that depends on time. One value per sample,
so that an image and a long video count the same, and a padded sample can be left out.
"""

import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor

from grn_lightning.functional.hbq import codes_to_bits, elements_to_codes


def token_cross_entropy(
    logits: Float[Tensor, "b *shape k"], codes: Integer[Tensor, "b *shape"]
) -> Float[Tensor, " b"]:
    """Return the mean cross-entropy of each sample's elements, in nats.

    Args:
        logits: Predictions, any precision.
        codes: True elements in ``[0, k)``.

    Returns:
        One loss per sample, computed in float32; ``log k`` for logits that are all equal.
    """
    losses = F.cross_entropy(
        logits.float().flatten(0, -2), codes.long().flatten(), reduction="none"
    )
    return losses.view(len(codes), -1).mean(1)


def token_accuracy(
    logits: Float[Tensor, "b *shape k"], codes: Integer[Tensor, "b *shape"]
) -> Float[Tensor, " b"]:
    """Return the share of each sample's elements whose most probable value is the true one.

    Args:
        logits: Predictions, any precision.
        codes: True elements in ``[0, k)``.

    Returns:
        One share in [0, 1] per sample, float32.
    """
    is_right = logits.argmax(-1) == codes
    return is_right.view(len(codes), -1).float().mean(1)


def round_accuracy(
    predicted: Integer[Tensor, "b c *grid"],
    true: Integer[Tensor, "b c *grid"],
    *,
    num_rounds: int,
    target: str,
) -> Float[Tensor, "b m"]:
    """Return the share of right bits of each sample, by round of the quantizer.

    Args:
        predicted: The most probable elements.
        true: The true ones.
        num_rounds: Number of binary rounds ``M``.
        target: "index" or "bit", what an element is.

    Returns:
        Shares in [0, 1], float32; round 0 holds the most significant bits.

    Raises:
        ValueError: If the target is unknown.

    Example:
        >>> import torch
        >>> three, two = torch.tensor([[3]]), torch.tensor([[2]])
        >>> round_accuracy(three, two, num_rounds=2, target="index")
        tensor([[1., 0.]])
    """
    bits = [
        codes_to_bits(
            elements_to_codes(elements, num_rounds=num_rounds, target=target),
            num_rounds=num_rounds,
        )
        for elements in (predicted, true)
    ]
    is_right = (bits[0] == bits[1]).unflatten(1, (num_rounds, -1))
    return is_right.flatten(2).float().mean(2)


def accuracy_by_time(
    accuracy: Float[Tensor, " b"], t: Float[Tensor, " b"], *, num_bins: int = 10
) -> tuple[Float[Tensor, " num_bins"], Int[Tensor, " num_bins"]]:
    """Sort accuracies into equal bins of time; sums and counts add up over batches and ranks.

    Args:
        accuracy: One accuracy per sample.
        t: Its time in [0, 1]; bin ``i`` holds ``[i, i + 1) / num_bins``, the last one also 1.
        num_bins: Number of bins, at least 1.

    Returns:
        Sum of the accuracies (float32) and number of samples (long) per bin.

    Raises:
        ValueError: If ``num_bins`` is smaller than 1.

    Example:
        >>> import torch
        >>> accuracy_by_time(torch.tensor([0.5, 1.0]), torch.tensor([0.1, 0.4]), num_bins=2)
        (tensor([1.5000, 0.0000]), tensor([2, 0]))
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}.")
    bins = (t * num_bins).long().clamp(0, num_bins - 1)
    is_in_bin = F.one_hot(bins, num_bins)  # (b, num_bins); unlike index_add, deterministic on CUDA
    return (is_in_bin * accuracy.float().unsqueeze(1)).sum(0), is_in_bin.sum(0)
