"""Choosing the rule of adaptive steps so that samples take a wanted number of steps on average.

How uncertain a model is at the decision step is a matter of the model, so a rule belongs to its
weights. The line `k H + b` gets its slope from the spread of the entropies: what lies in the
middle of their distribution shares the steps between the fewest and the most. Its offset is the one
at which the mean comes out.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grn_lightning.samplers.config import RefineConfig
from grn_lightning.samplers.stopping import AdaptiveSteps

_MIN_SPREAD = 1e-6  # of entropies; below it all samples are alike


@dataclass(frozen=True, kw_only=True)
class StepBudget:
    """How many steps samples shall take."""

    mean_steps: float = 25.0
    """Mean over samples."""

    min_steps: int = 10
    """Fewest steps of a sample."""

    decision_step: int = 5
    """Number of the step, from 0, whose entropy decides."""

    coverage: float = 0.8
    """Share of samples, in the middle of the distribution, between whose entropies the number of
    steps goes from the fewest to the most; smaller is a steeper line."""

    temperature_by_steps: bool = False
    """As in `AdaptiveSteps`."""

    def check(self, max_steps: int) -> None:
        """Refuse what no rule can meet.

        Raises:
            ValueError: If the numbers contradict each other; all issues at once.
        """
        issues = AdaptiveSteps(
            slope=0.0, offset=0.0, decision_step=self.decision_step, min_steps=self.min_steps
        ).issues(max_steps)
        if not self.min_steps <= self.mean_steps <= max_steps:
            issues.append(
                f"mean_steps must be between min_steps and num_steps, got {self.mean_steps}, "
                f"{self.min_steps} and {max_steps}"
            )
        if not 0 < self.coverage <= 1:
            issues.append(f"coverage must be in (0, 1], got {self.coverage}")
        if issues:
            raise ValueError("StepBudget: " + "; ".join(issues) + ".")


def until_decision(config: RefineConfig, decision_step: int) -> RefineConfig:
    """Return a walk that ends right after the decision step, which is all that calibration reads.

    Args:
        config: The walk to calibrate.
        decision_step: Number of the step whose entropy decides.
    """
    stop = AdaptiveSteps(
        slope=0.0, offset=1.0, decision_step=decision_step, min_steps=decision_step + 1
    )
    return replace(config, adaptive=stop)


def steps_of(rule: AdaptiveSteps, entropies: Tensor, max_steps: int) -> Tensor:
    """Return the steps that a rule gives to samples of these entropies, `(n,)` long."""
    remaining = [rule.num_remaining(entropy, max_steps) for entropy in entropies.tolist()]
    return torch.tensor(remaining) + rule.decision_step


def fit_steps(entropies: Tensor, budget: StepBudget, *, max_steps: int) -> AdaptiveSteps:
    """Find slope and offset for a wanted mean number of steps.

    Args:
        entropies: `(n,)` float in [0, 1]: entropies of samples at the decision step.
        budget: What is wanted.
        max_steps: Most steps of a sample.

    Returns:
        The rule whose mean over these samples is nearest to the wanted one.

    Raises:
        ValueError: If there are fewer than two samples, or the budget contradicts itself.
    """
    budget.check(max_steps)
    if len(entropies) < 2:
        raise ValueError(f"calibration needs at least 2 samples, got {len(entropies)}.")
    values = entropies.double().cpu()
    tail = (1 - budget.coverage) / 2
    low, high = values.quantile(tail).item(), values.quantile(1 - tail).item()
    slope = (max_steps - budget.min_steps) / max(high - low, _MIN_SPREAD)
    if high - low < _MIN_SPREAD:
        slope = 0.0

    def rule(offset: float) -> AdaptiveSteps:
        return AdaptiveSteps(
            slope=slope,
            offset=offset,
            decision_step=budget.decision_step,
            min_steps=budget.min_steps,
            temperature_by_steps=budget.temperature_by_steps,
        )

    def excess(offset: float) -> float:
        return steps_of(rule(offset), values, max_steps).double().mean().item() - budget.mean_steps

    # The mean grows with the offset, from the fewest steps for all to the most.
    few, many = -slope * values.max().item(), max_steps - slope * values.min().item()
    for _ in range(60):
        middle = (few + many) / 2
        few, many = (middle, many) if excess(middle) < 0 else (few, middle)
    return rule(min(few, many, key=lambda offset: abs(excess(offset))))
