"""Categorical distributions over the last axis of logits: drawing, scoring, uncertainty.

Everything is computed in float32, whatever the precision of the logits. A logit of -inf means
"never", one of +inf "certainly" (several share the chance); a row without any finite or positive
infinite logit has no distribution, and its results are NaN or arbitrary.

Results do not depend on the place of a row in the batch. On a CPU that takes care: `sigmoid`,
`softplus` and `silu` round the last few elements of a tensor in another way than the others, `exp`
and `log1p` do not.
"""

import math

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

_LARGEST = torch.finfo(torch.float32).max
_LARGE_ODDS = 1e4  # log-odds at which float32 has long had a probability of 0
_CACHED_LOGITS = 2**16  # computed at a time on a CPU; 2**15 to 2**17 are equally fast
_BELOW_ONE = 1 - 2.0**-24  # the largest float32 below 1


def _rows_at_a_time(logits: Tensor) -> int:
    """Return how many entries of the first axis to compute at a time.

    On a CPU all temporaries of a part stay in the second-level cache, which makes drawing from 16
    values three times as fast; a GPU is given everything at once.
    """
    if logits.device.type != "cpu" or logits.ndim < 2 or logits.numel() <= _CACHED_LOGITS:
        return max(1, len(logits))
    return max(1, _CACHED_LOGITS * len(logits) // logits.numel())


def _from_the_top(logits: Tensor) -> Tensor:
    """Return finite or -inf logits, float32 and contiguous, the largest of each row at 0."""
    logits = logits.float().clamp(max=_LARGEST).contiguous()
    return logits - logits.amax(-1, keepdim=True)


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
    # The largest logit goes to 0 before the division, which could otherwise make two infinities
    # of different logits.
    return torch.log_softmax(_from_the_top(logits) / temperature, dim=-1)


def _difference_of_two(logits: Tensor) -> Tensor:
    """Return the log-odds of the first of two values, never NaN where one logit is finite."""
    logits = logits.float().clamp(max=_LARGEST)
    return logits[..., 0] - logits[..., 1]


def draw(
    logits: Float[Tensor, "*shape k"],
    u: Float[Tensor, "*shape"],
    *,
    temperature: float | Float[Tensor, " b"] = 1.0,
) -> Int[Tensor, "*shape"]:
    """Draw one value per row by inverting the cumulative distribution at ``u``.

    The drawn value is the first whose cumulative probability exceeds ``u``. Values of probability
    zero are never drawn. Two values need no softmax: see the last lines.

    Args:
        logits: Unnormalized log-probabilities.
        u: Uniform numbers in [0, 1), one per row.
        temperature: Divides the logits; 0 means greedy, the most probable value whatever ``u`` is
            (which one of several equal ones is up to the device). A tensor has one for each entry
            of the first axis, positive; it is not looked at, which a GPU would have to wait for.

    Returns:
        Values in ``[0, k)``, long.

    Raises:
        ValueError: If ``temperature`` is negative.

    Example:
        >>> logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(4, 3)
        >>> draw(logits, torch.tensor([0.1, 0.3, 0.6, 0.8]))
        tensor([0, 1, 1, 2])
    """
    if isinstance(temperature, Tensor):
        temperature = temperature.float().view(-1, *[1] * (u.ndim - 1))
    elif not temperature >= 0:
        raise ValueError(f"temperature must be 0 (greedy) or positive, got {temperature}.")
    elif temperature == 0:
        return logits.argmax(-1)
    u = u.float().clamp(max=_BELOW_ONE)  # a float64 number may round up to 1
    count = _rows_at_a_time(logits)
    if count >= len(logits):
        return _draw(logits, u, temperature)
    parts = zip(logits.split(count), u.split(count), strict=True)
    if isinstance(temperature, Tensor):
        temperatures = temperature.split(count)
        drawn = [_draw(*part, one) for part, one in zip(parts, temperatures, strict=True)]
    else:
        drawn = [_draw(*part, temperature) for part in parts]
    return torch.cat(drawn)


def _draw(logits: Tensor, u: Tensor, temperature: float | Tensor) -> Tensor:
    """Draw at a temperature that is a number or broadcasts against ``u``."""
    if logits.shape[-1] == 2:
        odds = (-_difference_of_two(logits) / temperature).exp_()  # of the second value
        return (u >= 1 / (1 + odds)).long()
    if isinstance(temperature, Tensor):
        temperature = temperature.unsqueeze(-1)
    cumulative = (_from_the_top(logits) / temperature).exp_().cumsum(-1)
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
    parts = [_entropy(part) for part in logits.split(_rows_at_a_time(logits))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _entropy(logits: Tensor) -> Tensor:
    num_values = logits.shape[-1]
    if num_values == 2:
        # H = log(1 + e^-d) + d p of the less likely one, whose probability is p = 1 / (1 + e^d).
        d = _difference_of_two(logits).abs().clamp(max=_LARGE_ODDS)
        odds = (-d).exp()
        nats = odds.log1p() + d * (odds / (1 + odds))
    else:
        top = _from_the_top(logits)
        weights = top.exp()
        total = weights.sum(-1)
        # H = log Z - sum(w log w) / Z. A weight of 0 adds 0, where 0 * -inf would be NaN.
        nats = total.log() - (weights * top.clamp(min=-_LARGE_ODDS)).sum(-1) / total
    return (nats / math.log(num_values)).clamp(0, 1)


def mean_entropy(logits: Float[Tensor, "b *shape k"]) -> Float[Tensor, " b"]:
    """Return the mean of `entropy` over all elements of each sample.

    Entropies are rounded to multiples of ``2**-24`` and added in float64, which is exact for up to
    ``2**29`` of them: the mean does not depend on the order of addition, and with it not on the
    size of the batch. Decisions can be built on it.

    Args:
        logits: Unnormalized log-probabilities; at least two values.

    Returns:
        Means in [0, 1], float32.

    Example:
        >>> mean_entropy(torch.tensor([[[0.0, 0.0], [0.0, -math.inf]]]))
        tensor([0.5000])
    """
    steps = entropy(logits).mul_(2.0**24).round_().flatten(1)
    return (steps.sum(1, dtype=torch.float64) / (2.0**24 * steps.shape[1])).float()
