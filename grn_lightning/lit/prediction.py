"""Which samples `predict` draws: so many per held-out condition, and only what is missing."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from grn_lightning.samplers import RefineConfig


def _nothing(number: int) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class PredictionPlan:
    """What `predict` draws.

    Condition `i` of the held-out set gets the numbers `i k .. i k + k - 1` for `k` samples per
    condition; a number names the noise, and the file.
    """

    refine: RefineConfig = field(default_factory=RefineConfig)
    """Steps, guidance, temperature."""
    samples_per_condition: int = 1
    """`k`."""
    num_samples: int | None = None
    """Numbers from here on are left out; None draws for every condition."""
    is_done: Callable[[int], bool] = _nothing
    """Tells which numbers need not be drawn, because they have been."""

    def missing(self, batch: Any) -> list[tuple[int, int]]:
        """Return what is to be drawn for a batch: pairs of a row and a number.

        Rows that only fill up a batch (weight 0) get nothing.

        Args:
            batch: With `sample_index`, places in the held-out set, and `weights`.
        """
        index: Tensor = batch["sample_index"]
        return [
            (row, number)
            for row, (place, weight) in enumerate(
                zip(index.tolist(), batch["weights"].tolist(), strict=True)
            )
            if weight > 0
            for number in range(
                place * self.samples_per_condition, (place + 1) * self.samples_per_condition
            )
            if (self.num_samples is None or number < self.num_samples) and not self.is_done(number)
        ]
