"""Multipliers of the learning rate as functions of the samples seen."""

import math
from typing import Literal

LRSchedule = Literal["constant", "linear", "cosine"]


def lr_multiplier(
    samples_seen: int,
    *,
    warmup_samples: int = 0,
    total_samples: int | None = None,
    schedule: LRSchedule = "constant",
    decay_fraction: float = 1.0,
) -> float:
    """Return what the learning rate is multiplied with.

    Linear warm-up, then constant, then over the last `decay_fraction` of the training a decay to
    zero ("linear" or "cosine"). Counting samples and not steps makes a schedule independent of the
    batch size.

    Args:
        samples_seen: Samples trained on before this step, over all devices.
        warmup_samples: Samples of the warm-up; its first step already moves.
        total_samples: Samples of the whole training; needed by the decaying schedules.
        schedule: "constant", "linear" or "cosine".
        decay_fraction: Share of `total_samples` over which the rate decays, in (0, 1].

    Returns:
        A factor in [0, 1].

    Raises:
        ValueError: If a decaying schedule has no `total_samples`, or the fraction is out of range.

    Example:
        >>> lr_multiplier(75, total_samples=100, schedule="linear", decay_fraction=0.5)
        0.5
    """
    warmup = min(1.0, (samples_seen + 1) / warmup_samples) if warmup_samples else 1.0
    if schedule == "constant":
        return warmup
    if not total_samples:
        raise ValueError(f"the {schedule!r} schedule needs `total_samples`, got {total_samples}.")
    if not 0 < decay_fraction <= 1:
        raise ValueError(f"`decay_fraction` must be in (0, 1], got {decay_fraction}.")
    left = max(0.0, (total_samples - samples_seen) / (decay_fraction * total_samples))
    left = min(1.0, left)
    return warmup * (left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))
