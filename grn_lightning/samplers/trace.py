"""A record of a refinement, step by step and sample by sample: what an observer can be told.

Of every element a step says one of four things, by whether the map before the step and the map
after it hold a drawn value there or the random one of the start:

    filled   drawn now, random before        kept    drawn now, drawn before
    erased   random now, drawn before        blank   random now, random before

A kept element may have changed its value: the step has drawn it anew (`flips`).
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from grn_lightning.samplers.refine import StepInfo


class ElementMasks(NamedTuple):
    """Four bool masks `(..., c, *grid)`; each element is in exactly one."""

    filled: Tensor
    """Drawn now, random before."""
    kept: Tensor
    """Drawn now, drawn before."""
    erased: Tensor
    """Random now, drawn before."""
    blank: Tensor
    """Random now, random before."""


def element_masks(keep: Tensor, keep_before: Tensor) -> ElementMasks:
    """Sort elements by what a step did to them.

    Args:
        keep: Bool, True where the map after the step holds a drawn value.
        keep_before: The same of the map before the step.
    """
    return ElementMasks(
        filled=keep & ~keep_before,
        kept=keep & keep_before,
        erased=~keep & keep_before,
        blank=~keep & ~keep_before,
    )


@dataclass(frozen=True)
class SampleTrace:
    """How one sample came about; `n` steps."""

    t: Tensor
    """`(n,)` float: time at which the generator was asked."""
    t_next: Tensor
    """`(n,)` float: share of elements kept by the step, in expectation."""
    entropy: Tensor
    """`(n,)` float in [0, 1]: mean normalized entropy of the conditional prediction."""
    flips: Tensor
    """`(n,)` float in [0, 1]: share of elements that differ from the complete sample before."""
    codes: Tensor
    """`(n, c, *grid)` long: the complete samples."""
    masks: ElementMasks
    """`(n, c, *grid)` each."""

    @property
    def num_steps(self) -> int:
        """Steps that the sample took."""
        return len(self.t)

    @property
    def shares(self) -> dict[str, Tensor]:
        """Share of each mask by step, `(n,)` float; they add up to 1."""
        named = self.masks._asdict()
        return {name: mask.flatten(1).float().mean(1) for name, mask in named.items()}


@dataclass
class _Steps:
    """What was seen of one sample so far; one entry per step."""

    scalars: list[Tensor] = field(default_factory=list)
    codes: list[Tensor] = field(default_factory=list)
    keep: list[Tensor] = field(default_factory=list)


def observers(*parts: Callable[[StepInfo], None]) -> Callable[[StepInfo], None]:
    """Return an observer that tells several, in order."""

    def observe(info: StepInfo) -> None:
        for part in parts:
            part(info)

    return observe


class Trace:
    """An observer of `refine` that remembers everything, in main memory.

    Rows are told apart by their sample index, so it does not matter in which batch, at which place
    in it, or at which of its steps a sample was met. It is for a few samples at a time: a step
    takes nine bytes per element.

    Args:
        only: Sample indices to remember; None remembers all.

    Example:
        >>> from grn_lightning.samplers import RefineConfig, refine
        >>> trace = Trace()
        >>> result = refine(
        ...     lambda codes, t, condition: torch.zeros(*codes.shape, 4),
        ...     (2, 3, 3),
        ...     condition=torch.tensor([0]),
        ...     sample_index=torch.tensor([5]),
        ...     seed=0,
        ...     alphabet_size=4,
        ...     config=RefineConfig(num_steps=6),
        ...     observer=trace,
        ... )
        >>> trace[5].codes[-1].equal(result.codes[0])
        True
    """

    def __init__(self, only: Collection[int] | None = None) -> None:
        self._samples: dict[int, _Steps] = {}
        self._only = only

    def __call__(self, info: StepInfo) -> None:
        """Remember a step of every sample in it."""
        index, count = info.sample_index.tolist(), len(info.sample_index)
        wanted = [n for n, number in enumerate(index) if self._only is None or number in self._only]
        if not wanted:
            return
        times = [torch.as_tensor(value).double().expand(count) for value in (info.t, info.t_next)]
        rows = [*times, info.entropy, info.changed_fraction]
        scalars = torch.stack([value.detach().double().cpu() for value in rows], dim=1)  # (b, 4)
        codes, keep = info.codes.cpu(), info.keep.expand_as(info.codes).cpu()
        for row in wanted:
            steps = self._samples.setdefault(index[row], _Steps())
            steps.scalars.append(scalars[row])
            steps.codes.append(codes[row].clone())
            steps.keep.append(keep[row].clone())

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[int]:
        """Iterate over the sample indices, in the order in which they were met."""
        return iter(self._samples)

    def __getitem__(self, sample_index: int) -> SampleTrace:
        """Return what is known of a sample.

        Raises:
            KeyError: If it was not seen.
        """
        steps = self._samples[sample_index]
        t, t_next, entropy, flips = torch.stack(steps.scalars).float().unbind(1)
        keep = torch.stack(steps.keep)
        before = torch.cat([torch.zeros_like(keep[:1]), keep[:-1]])
        return SampleTrace(
            t=t,
            t_next=t_next,
            entropy=entropy,
            flips=flips,
            codes=torch.stack(steps.codes),
            masks=element_masks(keep, before),
        )
