"""Categorical distributions over the last axis of logits: drawing, scoring, uncertainty.

Everything is computed in float32, whatever the precision of the logits. A logit of -inf means
"never", one of +inf "certainly" (several share the chance); a row without any finite or positive
infinite logit has no distribution, and its results are NaN or arbitrary.
"""

import math

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

_LARGEST = torch.finfo(torch.float32).max
_BELOW_ONE = 1 - 2.0**-24  # the largest float32 below 1


def log_probs(
    logits: Float[Tensor, "*shape k"], *, temperature: float = 1.0
) -> Float[Tensor, "*shape k"]:
    """Return the logarithm of the softmax of ``logits / temperature``.

    Args:
        logits: Unnormalized log-probabilities.
        temperature: Positive; below 1 sharpens, above 1 flattens.

    Returns:
        Log-probabilities in [-inf, 0], float32, never NaN for rows with a finite logit.

    Raises:
        ValueError: If ``temperature`` is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    logits = logits.float().clamp(max=_LARGEST)
    # The largest logit goes to 0 before the division, which could otherwise make two infinities
    # of different logits.
    logits = logits - logits.amax(-1, keepdim=True)
    return torch.log_softmax(logits / temperature, dim=-1)


def _draw_bit(logits: Tensor, u: Tensor, temperature: float) -> Tensor:
    """Draw from two values: 1 unless ``u`` is below the probability of 0."""
    logits = logits.float().clamp(max=_LARGEST)
    return (u >= torch.sigmoid((logits[..., 0] - logits[..., 1]) / temperature)).long()


def draw(
    logits: Float[Tensor, "*shape k"], u: Float[Tensor, "*shape"], *, temperature: float = 1.0
) -> Int[Tensor, "*shape"]:
    """Draw one value per row by inverting the cumulative distribution at ``u``.

    The drawn value is the first whose cumulative probability exceeds ``u``. Values of probability
    zero are never drawn. Two values need no softmax: see the last lines.

    Args:
        logits: Unnormalized log-probabilities.
        u: Uniform numbers in [0, 1), one per row.
        temperature: Divides the logits; 0 means greedy, the most probable value whatever ``u`` is
            (which one of several equal ones is up to the device).

    Returns:
        Values in ``[0, k)``, long.

    Raises:
        ValueError: If ``temperature`` is negative.

    Example:
        >>> logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(4, 3)
        >>> draw(logits, torch.tensor([0.1, 0.3, 0.6, 0.8]))
        tensor([0, 1, 1, 2])
    """
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 (greedy) or positive, got {temperature}.")
    if temperature == 0:
        return logits.argmax(-1)
    u = u.float().clamp(max=_BELOW_ONE)  # a float64 number may round up to 1
    if logits.shape[-1] == 2:
        return _draw_bit(logits, u, temperature)
    cumulative = log_probs(logits, temperature=temperature).exp().cumsum(-1)
    threshold = u.unsqueeze(-1) * cumulative[..., -1:]  # below the last entry: no draw overshoots
    drawn = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return drawn.clamp(max=logits.shape[-1] - 1)  # NaN logits must not become an invalid index


def log_prob_of(
    logits: Float[Tensor, "*shape k"],
    codes: Integer[Tensor, "*shape"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """Return the log-probability of one given value per row.

    Args:
        logits: Unnormalized log-probabilities.
        codes: Values in ``[0, k)``.
        temperature: As in `log_probs`.

    Returns:
        Log-probabilities in [-inf, 0], float32.

    Raises:
        ValueError: If ``temperature`` is not positive.
    """
    rows = log_probs(logits, temperature=temperature)
    return rows.gather(-1, codes.long().unsqueeze(-1)).squeeze(-1)


def entropy(logits: Float[Tensor, "*shape k"]) -> Float[Tensor, "*shape"]:
    r"""Return the entropy of each row as a share of the largest possible, :math:`H / \log k`.

    Args:
        logits: Unnormalized log-probabilities; at least two values.

    Returns:
        Entropies in [0, 1], float32: 0 where one value is certain, 1 where all are equally likely.
        For bits this is the entropy in bits.

    Example:
        >>> entropy(torch.tensor([[0.0, 0.0], [0.0, -math.inf]]))
        tensor([1., 0.])
    """
    # entr(p) = -p log p with entr(0) = 0; p * log p would be NaN there.
    nats = torch.special.entr(log_probs(logits).exp()).sum(-1)
    return (nats / math.log(logits.shape[-1])).clamp(0, 1)
