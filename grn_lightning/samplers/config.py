"""How to walk from noise to data: schedule, guidance, temperature, number of steps."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from grn_lightning.functional.guidance import GUIDANCE_SCHEDULES, guidance_scale_at
from grn_lightning.functional.timesteps import SCHEDULES, step_grid
from grn_lightning.samplers.stopping import AdaptiveSteps


class Step(NamedTuple):
    """One step of the schedule."""

    number: int
    """Number of the step, from 0."""

    t: float
    """Time at which the generator is asked."""

    t_next: float
    """Share of elements that the step keeps, in expectation; 1 at the last step."""

    guidance_scale: float
    """Weight of the condition; where it is exactly 1, the unconditional branch is not evaluated."""

    temperature: float = 1.0
    """Divides the guided logits."""

    @property
    def is_guided(self) -> bool:
        """Whether the unconditional branch is evaluated."""
        return self.guidance_scale != 1.0


def _is_positive(value: float) -> bool:
    return 0 < value < math.inf


@dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """How to walk from noise to data; independent of the model and of what is asked from it."""

    num_steps: int = 50
    """Steps, each one call of the generator; with `adaptive`, the most that a sample can get."""

    schedule: Literal["linear", "cosine"] = "linear"
    """Spacing of the steps in t; "cosine" takes small steps at first."""

    alpha: float = 1.0
    """Shift of the schedule, t / (t + alpha (1 - t)); above 1 spends more steps near the noise."""

    time_cap: float = 1.0
    """The schedule is multiplied by this and ends there; the last step then goes to 1 at once.
    Published for text: 0.999 at first, later 0.95, because training hardly sees later times."""

    realised_time: bool = False
    """Whether the generator is told the share of elements that were kept instead of its
    expectation, as published for text. Guidance follows the expectation in any case."""

    guidance_scale: float = 1.0
    """Weight of the condition; 1 is the plain conditional prediction. In "power_cosine" alone it is
    what is added to 1 in the end, so that published values carry over: there 0 does not guide."""

    guidance_schedule: Literal["constant", "interval", "power_cosine"] = "constant"
    """How the scale depends on t."""

    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times (low, high) between which "interval" guides."""

    guidance_power: float = 1.0
    """Exponent of t in "power_cosine"; above 1 guides later."""

    temperature: float = 1.0
    """Divides the guided logits; below 1 is greedier, 0 takes the most likely value."""

    adaptive: AdaptiveSteps | None = None
    """Gives every sample its own number of steps; None gives `num_steps` to all."""

    compact: bool = True
    """Whether samples that are done leave the batch. They are the same if not; it only costs."""

    rows_per_call: int | None = None
    """Rows of every call of the generator, the last one of a step filled up. Without it the rows
    are as many as there are, and a kernel that rounds differently for another number of rows
    can change a sample. With it samples are the same, bit for bit, in any batch, if the kernels
    treat the rows of a call alike; multiples of 16 let them on a CPU, and 1 leaves no choice."""

    def __post_init__(self) -> None:
        issues = [text for is_wrong, text in self._rules() if is_wrong]
        if self.adaptive is not None:
            issues += self.adaptive.issues(self.num_steps)
        if issues:
            raise ValueError("RefineConfig: " + "; ".join(issues) + ".")
        if self.guidance_schedule != "interval" and tuple(self.guidance_interval) != (0.0, 1.0):
            warnings.warn(
                f"guidance_interval={self.guidance_interval} is ignored, "
                f"because guidance_schedule is {self.guidance_schedule!r} and not 'interval'.",
                stacklevel=3,
            )

    def _rules(self) -> list[tuple[bool, str]]:
        low, high = self.guidance_interval

        def must(name: str, is_right: bool, allowed: str) -> tuple[bool, str]:
            return not is_right, f"{name} must be {allowed}, got {getattr(self, name)!r}"

        return [
            must("num_steps", self.num_steps >= 1, "at least 1"),
            must("schedule", self.schedule in SCHEDULES, f"one of {SCHEDULES}"),
            must("alpha", _is_positive(self.alpha), "positive and finite"),
            must("time_cap", 0 < self.time_cap <= 1, "in (0, 1]"),
            must("guidance_scale", 0 <= self.guidance_scale < math.inf, "finite and at least 0"),
            must(
                "guidance_schedule",
                self.guidance_schedule in GUIDANCE_SCHEDULES,
                f"one of {GUIDANCE_SCHEDULES}",
            ),
            must("guidance_interval", 0 <= low < high <= 1, "(low, high), 0 <= low < high <= 1"),
            must("guidance_power", _is_positive(self.guidance_power), "positive and finite"),
            must("temperature", 0 <= self.temperature < math.inf, "finite and at least 0"),
            must(
                "rows_per_call",
                self.rows_per_call is None or self.rows_per_call >= 1,
                "None or at least 1",
            ),
        ]

    @property
    def is_guided(self) -> bool:
        """Whether guidance has a weight at any time."""
        neutral = 0.0 if self.guidance_schedule == "power_cosine" else 1.0
        return self.guidance_scale != neutral

    def steps(self, start_time: float = 0.0, *, num_remaining: int | None = None) -> list[Step]:
        """Return what every step does, in order.

        Args:
            start_time: Where to start; steps that end before are left out, and the first one
                that is left starts here. Numbers of steps stay what they are.
            num_remaining: Steps from the decision step of `adaptive` on; None plans them all.
        """
        decision_step, factor = None, 1.0
        if self.adaptive is not None and num_remaining is not None:
            decision_step = self.adaptive.decision_step
            factor = self.adaptive.temperature_factor(num_remaining)
        times = step_grid(
            self.num_steps,
            schedule=self.schedule,
            alpha=self.alpha,
            cap=self.time_cap,
            decision_step=decision_step,
            num_remaining=num_remaining,
        ).tolist()
        scale_at = partial(
            guidance_scale_at,
            scale=self.guidance_scale,
            schedule=self.guidance_schedule,
            interval=self.guidance_interval,
            power=self.guidance_power,
        )
        planned = []
        for number, (t, t_next) in enumerate(pairwise(times)):
            if t_next <= start_time:
                continue
            is_decided = decision_step is not None and number >= decision_step
            temperature = self.temperature * (factor if is_decided else 1.0)
            t = max(t, start_time)
            planned.append(Step(number, t, t_next, scale_at(t), temperature))
        return planned


def config_from_plain(values: Mapping[str, Any]) -> RefineConfig:
    """Return the settings that were stored as plain data (`dataclasses.asdict`, JSON, YAML).

    Raises:
        ValueError: If there is a setting that this version does not know.
    """
    plain: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    try:
        if plain.get("adaptive") is not None:
            plain["adaptive"] = AdaptiveSteps(**plain["adaptive"])
        return RefineConfig(**plain)
    except TypeError as error:
        raise ValueError(f"no settings of sampling: {error}.") from error
