"""Time: how training draws t, how sampling walks from t = 0 (noise) to t = 1 (data).

Source: Generative Refinement Networks (arXiv 2604.13030); the published class-conditional recipe
draws ``logit_normal`` with mean -0.8, std 0.8 and samples on a linear grid, the text-conditional
one shifts, and samples on the cosine grid with a cap. Our grids end exactly at 1, which keeps the
whole of the last prediction; the published ones return it without saying so.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

SCHEDULES = ("linear", "cosine")
"""Ways to place the points of a `step_grid`."""


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha}; 1 means no shift.")


def logit_normal(u: Float[Tensor, "*shape"], *, mean: float, std: float) -> Float[Tensor, "*shape"]:
    r"""Turn uniform numbers into times with :math:`\mathrm{logit}(t) \sim N(mean, std^2)`.

    Uniform times need no function: ``u`` itself is one.

    Args:
        u: Uniform numbers in [0, 1).
        mean: Mean of ``logit(t)``; the median of ``t`` is ``sigmoid(mean)``.
        std: Standard deviation of ``logit(t)``, positive.

    Returns:
        Times in (0, 1), float32, increasing in ``u``.

    Raises:
        ValueError: If ``std`` is not positive.

    Example:
        >>> logit_normal(torch.tensor([0.1, 0.5, 0.9]), mean=0.0, std=1.0)
        tensor([0.2173, 0.5000, 0.7827])
    """
    if not std > 0:
        raise ValueError(f"std must be positive, got {std}.")
    # Half a step of a 24-bit number away from 0 and 1, where the normal quantile is infinite;
    # float64 because 1 - 2^-25 is 1 in float32.
    u = u.double().clamp(2.0**-25, 1 - 2.0**-25)
    return torch.sigmoid(mean + std * torch.special.ndtri(u)).float()


def shift(t: Float[Tensor, "*shape"], alpha: float) -> Float[Tensor, "*shape"]:
    r"""Move times towards noise, :math:`t / (t + \alpha (1 - t))`.

    The larger a picture, the more noise it takes to hide its content; the published rule of thumb
    is ``alpha = sqrt(height * width) / 256``.

    Args:
        t: Times in [0, 1].
        alpha: Odds of noise against data are multiplied by this; 1 changes nothing.

    Returns:
        Times in [0, 1], increasing in ``t``, 0 and 1 fixed.

    Raises:
        ValueError: If ``alpha`` is not positive and finite.

    Example:
        >>> shift(torch.tensor([0.0, 0.5, 1.0]), alpha=4.0)
        tensor([0.0000, 0.2000, 1.0000])
    """
    _check_alpha(alpha)
    return t / (t + alpha * (1 - t))


def bend(u: Float[Tensor, "*shape"], *, schedule: str, alpha: float) -> Float[Tensor, "*shape"]:
    r"""Turn the share of steps done into time: first `shift`, then the schedule.

    Args:
        u: Share of the steps that are done, in [0, 1].
        schedule: "linear" (:math:`t = u`) or "cosine" (:math:`t = 1 - \cos(\pi u / 2)`, slow at
            the noisy end).
        alpha: See `shift`.

    Returns:
        Times in [0, 1], increasing in ``u``, 0 and 1 fixed (1 up to rounding).

    Raises:
        ValueError: If an argument is out of range.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}.")
    t = shift(u, alpha)
    # 1 - cos, without its cancellation near 0
    return 2 * torch.sin(math.pi / 4 * t) ** 2 if schedule == "cosine" else t


def step_grid(
    num_steps: int,
    *,
    schedule: str = "linear",
    alpha: float = 1.0,
    cap: float = 1.0,
    decision_step: int | None = None,
    num_remaining: int | None = None,
) -> Float[Tensor, " n"]:
    r"""Return the times a sampler visits, equal steps bent by `shift` and then by the schedule.

    With a cap below 1, the equal steps lead to the cap, where the generator is asked once more:
    the published text-conditional samplers ask for the last time at 0.999 or at 0.95.

    A walk may change its pace on the way: up to ``decision_step`` it goes as if there were
    ``num_steps``, from there to the end with ``num_remaining`` equal steps.

    Args:
        num_steps: Number of steps, at least 1.
        schedule: See `bend`.
        alpha: See `shift`; applied to the equal steps ``u``.
        cap: Time in (0, 1] of the last question, in multiples of what the schedule gives; 1 asks
            for the last time one step before the end.
        decision_step: Number of the first step of another length.
        num_remaining: Steps from there on, at least 1. The number of steps that were planned
            changes nothing.

    Returns:
        Strictly increasing times, float64, from exactly 0 to exactly 1; one more than steps.

    Raises:
        ValueError: If an argument is out of range, or if two neighbours coincide in float64.

    Example:
        >>> step_grid(4, schedule="cosine")
        tensor([0.0000, 0.0761, 0.2929, 0.6173, 1.0000], dtype=torch.float64)
        >>> step_grid(4, decision_step=2, num_remaining=1)
        tensor([0.0000, 0.2500, 0.5000, 1.0000], dtype=torch.float64)
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    if not 0 < cap <= 1:
        raise ValueError(f"cap must be in (0, 1], got {cap}; 1 means no cap.")
    is_capped = cap < 1
    intervals = num_steps - is_capped  # the last step of a capped grid goes from the cap to 1
    paces = torch.arange(intervals + 1, dtype=torch.float64)
    if decision_step is not None and num_remaining is not None:
        if not 0 <= decision_step < num_steps or num_remaining < 1:
            raise ValueError(
                f"decision_step must be in [0, {num_steps}) and num_remaining at least 1, got "
                f"{decision_step} and {num_remaining}."
            )
        count = num_remaining - is_capped
        left = torch.arange(1, count + 1, dtype=torch.float64) * (intervals - decision_step)
        paces = torch.cat([paces[: decision_step + 1], decision_step + left / max(1, count)])
    u = paces / max(1, intervals)
    grid = cap * bend(u, schedule=schedule, alpha=alpha)
    grid[u == 1] = cap  # exactly
    if is_capped:
        grid = torch.cat([grid, grid.new_ones(1)])
    if not (grid.diff() > 0).all():
        raise ValueError(
            f"num_steps={num_steps} with alpha={alpha} makes steps of no length; choose alpha "
            "closer to 1."
        )
    return grid
