"""How well codes use their bits: balance, entropy and dead channels per round, values per channel.

One histogram per channel holds all that is asked, so the memory does not grow with the number of
samples, and processes add up what they counted.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class CodeReport(NamedTuple):
    """Statistics of all codes that were counted; round 0 is the most significant bit."""

    ones_fraction: Tensor
    """`(m,)` in [0, 1]: share of ones; 0.5 is balanced."""

    entropy: Tensor
    """`(m,)` in [0, 1]: entropy in bits of the round in a channel, mean over channels."""

    dead_fraction: Tensor
    """`(m,)` in [0, 1]: share of channels in which the bit never changes."""

    usage: Tensor
    """`(d,)` in (0, 1]: share of the `2**m` values that the channel takes."""

    perplexity: Tensor
    """`(d,)` in [1, 2**m]: number of values that the channel uses as if equally often."""

    histogram: Tensor
    """`(d, 2**m)` long: how often each channel takes each value."""

    def scalars(self) -> dict[str, Tensor]:
        """Return what fits a logger: every round, and means over channels."""
        per_round = {
            f"{name}_round_{index}": value
            for name in ("ones_fraction", "entropy", "dead_fraction")
            for index, value in enumerate(getattr(self, name).reshape(-1))  # torchmetrics squeezes
        }
        return per_round | {"usage": self.usage.mean(), "perplexity": self.perplexity.mean()}


class CodeStatistics(Metric):
    """Count codes `(b, d, *grid)` and report how well they use their bits.

    Args:
        num_channels: Channels `d` of a code map.
        num_rounds: Bits `m` of a code.
    """

    is_differentiable = False
    full_state_update = False

    histogram: Tensor

    def __init__(self, *, num_channels: int, num_rounds: int) -> None:
        super().__init__()
        if num_channels < 1 or num_rounds < 1:
            raise ValueError(
                "num_channels and num_rounds must be at least 1, "
                f"got {num_channels} and {num_rounds}."
            )
        self.num_channels, self.num_rounds = num_channels, num_rounds
        zeros = torch.zeros(num_channels, 2**num_rounds, dtype=torch.long)
        self.add_state("histogram", zeros, dist_reduce_fx="sum")

    def update(self, codes: Tensor, weights: Tensor | None = None) -> None:
        """Count codes.

        Args:
            codes: `(b, d, *grid)` integers in `[0, 2**m)`.
            weights: `(b,)`; a sample of weight 0 is padding and is not counted, all others count
                once.

        Raises:
            ValueError: If the channels or the range differ from what was announced.
        """
        num_levels = 2**self.num_rounds
        if codes.shape[1] != self.num_channels:
            raise ValueError(
                f"codes must have {self.num_channels} channels on axis 1, got {tuple(codes.shape)}."
            )
        if weights is not None:
            codes = codes[weights > 0]
        by_channel = codes.long().transpose(0, 1).flatten(1)
        if by_channel.numel() and not 0 <= by_channel.min() <= by_channel.max() < num_levels:
            raise ValueError(
                f"codes must lie in [0, {num_levels}) for num_rounds={self.num_rounds}, "
                f"got {int(by_channel.min())} to {int(by_channel.max())}."
            )
        first = num_levels * torch.arange(self.num_channels, device=codes.device)[:, None]
        counts = torch.bincount((by_channel + first).flatten(), minlength=self.histogram.numel())
        self.histogram += counts.view_as(self.histogram)

    def compute(self) -> CodeReport:
        """Return the statistics, float64; NaN if nothing was counted."""
        values = torch.arange(2**self.num_rounds, device=self.histogram.device)
        shifts = torch.arange(self.num_rounds - 1, -1, -1, device=self.histogram.device)
        bit_of_value = (values[:, None] >> shifts) & 1  # (2**m, m)
        counts = self.histogram.double()  # exact up to 2**53
        total = counts.sum(1, keepdim=True)
        num_ones = counts @ bit_of_value.double()  # (d, m)
        ones, probabilities = num_ones / total, counts / total
        is_dead = (num_ones == 0) | (num_ones == total)
        nats = torch.special.entr(probabilities).sum(1)
        bits = (torch.special.entr(ones) + torch.special.entr(1 - ones)) / math.log(2)
        return CodeReport(
            ones_fraction=ones.mean(0),
            entropy=bits.mean(0),
            dead_fraction=is_dead.double().mean(0),
            usage=(counts > 0).double().mean(1),
            perplexity=nats.exp(),
            histogram=self.histogram.clone(),
        )
