"""What a sampler asks, what it tells on the way, and what it returns."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from grn_lightning.samplers.conditions import Condition


class Generator(Protocol):
    """Anything that predicts a whole code map: a network, a compiled one, a closure."""

    def __call__(self, codes: Tensor, t: Tensor, condition: Condition, /) -> Tensor:
        """Map codes `(b, c, *grid)`, times `(b,)` and a condition to logits `(b, c, *grid, k)`."""


@dataclass(frozen=True)
class StepInfo:
    """What an observer is told after every step. The tensors are the sampler's own: read only."""

    step: Tensor
    """`(b,)` long: number of this step, from 0; samples may stand at different steps."""

    num_steps: Tensor
    """`(b,)` long: number after that of the last step, as planned so far."""

    t: Tensor
    """`(b,)` float: time at which the generator was asked."""

    t_next: Tensor
    """`(b,)` float: share of elements that this step kept, in expectation; 1 at the last step."""

    guidance_scale: Tensor
    """`(b,)` float: scale used at this step; 1 means that the unconditional branch was not
    evaluated."""

    sample_index: Tensor
    """`(b,)` long: which samples these are."""

    entropy: Tensor
    """`(b,)` float in [0, 1]: mean normalized entropy of the conditional prediction."""

    codes: Tensor
    """`(b, c, *grid)` long: the complete sample `x_hat` of this step."""

    keep: Tensor
    """`(b, c, *grid)` bool: True where `codes` enter the next input."""

    x_t: Tensor
    """`(b, c, *grid)` long: the next input."""

    changed_fraction: Tensor
    """`(b,)` float in [0, 1]: share of elements that differ from the complete sample of the step
    before (at step 0: from the random map)."""


class ForwardCount(NamedTuple):
    """How often the generator was asked."""

    calls: int
    """Calls: one per step of a batch, or several where `rows_per_call` cuts them."""

    rows: int
    """Samples in these calls: one per sample and step, two where the step is guided. What fills up
    a call is not counted."""


@dataclass(frozen=True)
class RefineResult:
    """The samples and what they cost."""

    codes: Tensor
    """`(b, c, *grid)` long in [0, k)."""

    num_forwards: ForwardCount
    """Calls of the generator and rows in them."""

    entropy: Tensor
    """`(num_steps, b)` float in [0, 1]: mean normalized entropy of the conditional prediction,
    before guidance and temperature; 0 behind the last step of a sample."""

    num_steps: Tensor
    """`(b,)` long: steps that each sample took."""

    num_evaluations: Tensor
    """`(b,)` long: how often the generator was asked about each sample, with its condition and
    without: `num_steps` plus the number of guided steps."""

    def entropy_curve(self, row: int) -> Tensor:
        """Return the entropies of one sample, `(num_steps[row],)`."""
        return self.entropy[: int(self.num_steps[row]), row]
