"""How many steps a sample needs, decided from how uncertain the first ones leave the generator.

Source: Generative Refinement Networks (arXiv 2604.13030), complexity-aware refinement. All samples
walk alike until the decision step `w`, where the mean normalized entropy `H` of the conditional
prediction, before guidance and temperature, tells how many steps remain, that one included:

    D = clip(round(k H + b), T_min - w, T_max - w)

and the rest of the way is walked in `D` equal steps. The published program counts `w + D` steps
but computes all `T_max` for everybody; here a sample that is done leaves the batch.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class AdaptiveSteps:
    """The rule by which a sample gets its number of steps; `num_steps` is the most it can get."""

    slope: float
    """`k`: steps per unit of entropy. `grn calibrate` finds it for a model."""

    offset: float
    """`b`: steps at entropy 0."""

    decision_step: int = 5
    """`w`: number of the step, from 0, whose entropy decides."""

    min_steps: int = 20
    """Fewest steps of a sample, those before the decision included."""

    temperature_by_steps: bool = False
    """Whether the temperature from the decision on is multiplied by
    clip((D - 10) / 40 + 0.5, 0.5, 1), as published: the fewer steps, the greedier."""

    def issues(self, max_steps: int) -> list[str]:
        """Return what is wrong with these settings for walks of at most `max_steps` steps."""
        found = []
        if not (math.isfinite(self.slope) and math.isfinite(self.offset)):
            found.append(f"slope and offset must be finite, got {self.slope} and {self.offset}")
        if not 0 <= self.decision_step < self.min_steps <= max_steps:
            found.append(
                f"0 <= decision_step < min_steps <= num_steps must hold, got {self.decision_step}, "
                f"{self.min_steps} and {max_steps}"
            )
        return [f"adaptive: {text}" for text in found]

    def num_remaining(self, entropy: float, max_steps: int) -> int:
        """Return the steps that remain at the decision, that step included.

        Args:
            entropy: Mean normalized entropy in [0, 1] at the decision step.
            max_steps: Most steps of a sample.

        Raises:
            ValueError: If the entropy is NaN: the generator has returned NaN.
        """
        if math.isnan(entropy):
            raise ValueError(
                f"the entropy at step {self.decision_step} is NaN, because the generator returned "
                "NaN; look at its weights and its precision."
            )
        wanted = round(self.slope * entropy + self.offset)
        low, high = self.min_steps - self.decision_step, max_steps - self.decision_step
        return min(max(wanted, low), high)

    def temperature_factor(self, num_remaining: int) -> float:
        """Return what the temperature is multiplied by from the decision on."""
        if not self.temperature_by_steps:
            return 1.0
        return min(max((num_remaining - 10) / 40 + 0.5, 0.5), 1.0)
