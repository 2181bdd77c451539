"""What is already known of a sample: elements that refinement must return as they are.

An element of a code map that is known (the unmasked part of a picture, the first frame of a clip,
the past of a video) enters refinement in one of two ways:

* "clean": it stands in every input of the generator as it is, from the first step on;
* "renoised": it is kept in the input with probability `t`, like every element that the generator
  has drawn itself. That is what the generator has seen in training.

In both the answer has exactly the known codes. Beside that, `start_time` begins a refinement at a
later time from a whole map, of which each element is kept with that probability: a variation.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from grn_lightning.functional.corruption import corrupt

MODES = ("clean", "renoised")


@dataclass(frozen=True, eq=False)
class Constraint:
    """Elements that are known before refinement begins."""

    known_codes: Tensor
    """`(b | 1, c, *grid)` long in [0, k). Where `known_mask` is False they are read by
    `start_time` alone."""

    known_mask: Tensor
    """`(b | 1, 1 | c, *grid)` bool, True = known."""

    mode: Literal["clean", "renoised"] = "clean"
    """Whether known elements stand in every input, or with probability t like the others."""

    start_time: float = 0.0
    """Time at which refinement starts. Above 0, the first input keeps every element of
    `known_codes`, known or not, with this probability."""

    def __post_init__(self) -> None:
        codes, mask = self.known_codes, self.known_mask
        issues = []
        if self.mode not in MODES:
            issues.append(f"mode must be one of {MODES}, got {self.mode!r}")
        if not 0 <= self.start_time < 1:
            issues.append(f"start_time must be in [0, 1), got {self.start_time}")
        if codes.dtype != torch.long or mask.dtype != torch.bool:
            issues.append(
                f"known_codes must be long and known_mask bool, got {codes.dtype} and {mask.dtype}"
            )
        if codes.ndim != mask.ndim or codes.shape[2:] != mask.shape[2:]:
            issues.append(
                "known_codes and known_mask must have the same axes and grid, "
                f"got {tuple(codes.shape)} and {tuple(mask.shape)}"
            )
        if issues:
            raise ValueError("Constraint: " + "; ".join(issues) + ".")

    def expand(self, num_samples: int, shape: tuple[int, ...], *, alphabet_size: int) -> Self:
        """Return the same for every sample and element, checked against what is to be drawn.

        Args:
            num_samples: `b`; a constraint of one row serves all.
            shape: Elements of one sample, `(c, *grid)`.
            alphabet_size: Number of values of an element.

        Returns:
            A constraint whose codes and mask are `(b, c, *grid)`, without a copy.

        Raises:
            ValueError: If the shape is another one, or a code that will be read is no value.
        """
        target = (num_samples, *shape)
        parts = {}
        for name, free in (("known_codes", 1), ("known_mask", 2)):
            part = getattr(self, name)
            wanted = zip(part.shape, target, strict=False)
            if part.ndim != len(target) or any(
                have != want and not (axis < free and have == 1)
                for axis, (have, want) in enumerate(wanted)
            ):
                raise ValueError(
                    f"{name} must fit samples {target}, got {tuple(part.shape)}; one row serves "
                    "all samples, and a mask of one channel all channels."
                )
            parts[name] = part.expand(target)
        is_read = parts["known_mask"] if self.start_time == 0 else torch.ones((), dtype=torch.bool)
        codes = parts["known_codes"].where(is_read.to(parts["known_codes"].device), 0)
        if ((codes < 0) | (codes >= alphabet_size)).any():
            raise ValueError(
                f"known_codes must be in [0, {alphabet_size}), got {int(codes.min())} to "
                f"{int(codes.max())}; is the target ('index' or 'bit') the one of the generator?"
            )
        return replace(self, **parts)

    def select_part(self, rows: slice) -> Self:
        """Take some samples of a longer job; what serves all of them stays as it is."""
        codes, mask = (
            part if len(part) == 1 else part[rows] for part in (self.known_codes, self.known_mask)
        )
        return replace(self, known_codes=codes, known_mask=mask)

    def begin(self, x_0: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first input, its complete sample and which elements come from it.

        Args:
            x_0: Random map `(b, c, *grid)`.
            keep: `(b, c, *grid)` bool, drawn with probability `start_time`.
        """
        x_hat = self.known_codes if self.start_time > 0 else self.complete(x_0)
        keep = self.shown(keep)
        return corrupt(x_hat, x_0, keep), x_hat, keep

    def complete(self, x_hat: Tensor) -> Tensor:
        """Put the known codes into a complete sample `(b, c, *grid)`."""
        return torch.where(self.known_mask, self.known_codes, x_hat)

    def shown(self, keep: Tensor) -> Tensor:
        """Return which elements of the complete sample the next input has `(b, c, *grid)`."""
        return keep | self.known_mask if self.mode == "clean" else keep
