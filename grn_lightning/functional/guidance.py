r"""Classifier-free guidance on logits, and how its scale depends on time.

Source: Generative Refinement Networks (arXiv 2604.13030). One convention everywhere:

    guided = uncond + scale * (cond - uncond)

so 1 is the plain conditional prediction, 0 the unconditional one, above 1 extrapolates. The
published code uses it for the interval schedule but writes the power-cosine one as
``cond + g * (cond - uncond)``, whose scale is ``1 + g`` here.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

GUIDANCE_SCHEDULES = ("constant", "interval", "power_cosine")
"""Ways in which the scale may depend on time."""


def guide(
    cond_logits: Float[Tensor, "b *shape"],
    uncond_logits: Float[Tensor, "b *shape"],
    scale: float | Float[Tensor, " b"],
) -> Float[Tensor, "b *shape"]:
    """Combine two predictions, ``uncond + scale * (cond - uncond)``.

    Args:
        cond_logits: Prediction with the condition.
        uncond_logits: Prediction without it.
        scale: One scale for all samples, or one per sample.

    Returns:
        Guided logits, float32: extrapolation multiplies the rounding errors of half precision. At
        scale 1 exactly the conditional prediction, at 0 exactly the unconditional one.

    Example:
        >>> guide(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]]), 3.0)
        tensor([[4., 0.]])
    """
    if isinstance(scale, Tensor):
        scale = scale.float().view(-1, *[1] * (cond_logits.ndim - 1))
    return torch.lerp(uncond_logits.float(), cond_logits.float(), scale)


def guidance_scale_at(
    t: float,
    *,
    scale: float,
    schedule: str = "constant",
    interval: tuple[float, float] = (0.0, 1.0),
    power: float = 1.0,
) -> float:
    r"""Return the guidance scale at time ``t``.

    * "constant": ``scale``.
    * "interval": ``scale`` inside the open interval, 1 outside. A lower end of 0 includes 0.
    * "power_cosine": :math:`1 + scale \cdot (1 - \cos(\pi t^{power})) / 2`, rising from 1 at the
      noisy end to ``1 + scale``. Here alone ``scale`` counts what is *added* to the plain
      conditional prediction, so that published values carry over; 0 switches guidance off.

    Args:
        t: Time in [0, 1].
        scale: Strength of guidance.
        schedule: One of the three above.
        interval: Lower and upper end in [0, 1], used by "interval".
        power: Positive exponent, used by "power_cosine"; larger values start later.

    Returns:
        The scale to give to `guide`. At 1 the unconditional prediction is not needed.

    Raises:
        ValueError: If ``schedule`` is unknown, or its setting is out of range.

    Example:
        >>> guidance_scale_at(0.3, scale=2.35, schedule="interval", interval=(0.44, 1.0))
        1.0
        >>> guidance_scale_at(1.0, scale=2.0, schedule="power_cosine")
        3.0
    """
    if schedule not in GUIDANCE_SCHEDULES:
        known = ", ".join(GUIDANCE_SCHEDULES)
        raise ValueError(f"guidance schedule must be one of {known}, got {schedule!r}.")
    if schedule == "interval":
        low, high = interval
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"guidance interval must satisfy 0 <= low < high <= 1, got {interval}."
            )
        return scale if t < high and (low == 0 or t > low) else 1.0
    if schedule == "power_cosine":
        if not power > 0:
            raise ValueError(f"guidance power must be positive, got {power}.")
        return 1 + scale * (1 - math.cos(math.pi * t**power)) / 2
    return scale
