"""How well codes use their bits: balance, entropy and dead channels per round, values per channel.

One histogram per channel holds all that is asked, so the memory does not grow with the number of
samples, and processes add up what they counted. `CodeAlarms` says in sentences what looks wrong: a
quantizer that has collapsed goes on to train without an error.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class CodeReport(NamedTuple):
    """Statistics of all codes that were counted; round 0 is the most significant bit.

    Codes whose bits mean nothing by themselves have no rounds, `m = 0`; `k` is `2**m` otherwise.
    """

    ones_fraction: Tensor
    """`(m,)` in [0, 1]: share of ones; 0.5 is balanced."""

    entropy: Tensor
    """`(m,)` in [0, 1]: entropy in bits of the round in a channel, mean over channels."""

    dead_fraction: Tensor
    """`(m,)` in [0, 1]: share of channels in which the bit never changes."""

    usage: Tensor
    """`(d,)` in (0, 1]: share of the `k` values that the channel takes."""

    perplexity: Tensor
    """`(d,)` in [1, k]: number of values that the channel uses as if equally often."""

    histogram: Tensor
    """`(d, k)` long: how often each channel takes each value."""

    bit_entropy: Tensor
    """`(m, d)` in [0, 1]: entropy in bits of each round in each channel."""

    def scalars(self) -> dict[str, Tensor]:
        """Return what fits a logger: every round, and means over channels."""
        per_round = {
            f"{name}_round_{index}": value
            for name in ("ones_fraction", "entropy", "dead_fraction")
            for index, value in enumerate(getattr(self, name).reshape(-1))  # torchmetrics squeezes
        }
        return per_round | {
            "usage": self.usage.mean(),
            "perplexity": self.perplexity.mean(),
            "channel_entropy": self.channel_entropy.mean(),
            "dead_channels": self.dead_channels.double().mean(),
        }

    @property
    def channel_entropy(self) -> Tensor:
        """`(d,)` in [0, 1]: entropy of the channel's values as a share of `log2 k` bits."""
        return (self.perplexity.log() / math.log(self.histogram.shape[1])).reshape(-1)

    @property
    def dead_channels(self) -> Tensor:
        """`(d,)` boolean: whether the channel takes a single value."""
        return (self.histogram > 0).sum(1) == 1


class CodeStatistics(Metric):
    """Count codes `(b, d, *grid)` and report how well they use their bits.

    Args:
        num_channels: Channels `d` of a code map.
        num_rounds: Bits `m` of a code; 0 if single bits of a code mean nothing.
        alphabet_size: Values `k` of a code, if they are not the `2**num_rounds`.
    """

    is_differentiable = False
    full_state_update = False

    histogram: Tensor

    def __init__(
        self, *, num_channels: int, num_rounds: int = 0, alphabet_size: int | None = None
    ) -> None:
        super().__init__()
        num_values = 2**num_rounds if alphabet_size is None else alphabet_size
        if num_channels < 1 or num_rounds < 0 or num_values < 2:
            raise ValueError(
                "num_channels must be at least 1, and num_rounds too unless an alphabet_size of at "
                f"least 2 is given, got {num_channels}, {num_rounds} and {alphabet_size}."
            )
        if num_rounds and num_values != 2**num_rounds:
            raise ValueError(
                f"codes of num_rounds={num_rounds} have {2**num_rounds} values, got "
                f"alphabet_size={alphabet_size}."
            )
        self.num_channels, self.num_rounds = num_channels, num_rounds
        zeros = torch.zeros(num_channels, num_values, dtype=torch.long)
        self.add_state("histogram", zeros, dist_reduce_fx="sum")

    def update(self, codes: Tensor, weights: Tensor | None = None) -> None:
        """Count codes.

        Args:
            codes: `(b, d, *grid)` integers in `[0, k)`.
            weights: `(b,)`; a sample of weight 0 is padding and is not counted, all others count
                once.

        Raises:
            ValueError: If the channels or the range differ from what was announced.
        """
        num_values = self.histogram.shape[1]
        if codes.shape[1] != self.num_channels:
            raise ValueError(
                f"codes must have {self.num_channels} channels on axis 1, got {tuple(codes.shape)}."
            )
        if weights is not None:
            codes = codes[weights > 0]
        by_channel = codes.long().transpose(0, 1).flatten(1)
        if by_channel.numel() and not 0 <= by_channel.min() <= by_channel.max() < num_values:
            raise ValueError(
                f"codes must lie in [0, {num_values}) for num_rounds={self.num_rounds}, "
                f"got {int(by_channel.min())} to {int(by_channel.max())}."
            )
        first = num_values * torch.arange(self.num_channels, device=codes.device)[:, None]
        counts = torch.bincount((by_channel + first).flatten(), minlength=self.histogram.numel())
        self.histogram += counts.view_as(self.histogram)

    def compute(self) -> CodeReport:
        """Return the statistics, float64; NaN if nothing was counted."""
        values = torch.arange(self.histogram.shape[1], device=self.histogram.device)
        shifts = torch.arange(self.num_rounds - 1, -1, -1, device=self.histogram.device)
        bit_of_value = (values[:, None] >> shifts) & 1  # (k, m)
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
            bit_entropy=bits.t(),
        )


_ADVICE = "lower the learning rate, raise entropy_weight or revive_below, or take fewer channels"
_MIN_COUNT = 4  # codes per value, on average, before a share of values says anything


@dataclass(frozen=True, kw_only=True)
class CodeAlarms:
    """Limits beyond which codes are said to have collapsed; all are shares in [0, 1]."""

    max_dead_channels: float = 0.1
    """Channels that take a single value."""
    max_dead_bits: float = 0.1
    """Pairs of channel and round whose bit never changes."""
    min_usage: float = 0.5
    """Values that a channel takes, mean over channels."""
    min_entropy: float = 0.5
    """Entropy of a channel's values over the largest possible, mean over channels."""
    min_round_entropy: float = 0.1
    """Entropy of a round's bit, mean over channels, for every round."""

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        issues = [
            f"{k} must be in [0, 1], got {v}" for k, v in vars(self).items() if not 0 <= v <= 1
        ]
        if issues:
            raise ValueError("CodeAlarms: " + "; ".join(issues) + ".")

    def sentences(self, report: CodeReport) -> list[str]:
        """Return what looks wrong, a sentence each; nothing while too few codes were counted.

        Args:
            report: Of at least four codes per channel and value; fewer cannot show use.
        """
        num_values = report.histogram.shape[1]
        if int(report.histogram.sum(1).min()) < _MIN_COUNT * num_values:
            return []
        found = [*self._dead(report), *self._unused(report)]
        return [f"{text}; {_ADVICE}." for text in found]

    def _dead(self, report: CodeReport) -> list[str]:
        dead = report.dead_channels
        found, share = [], float(dead.double().mean())
        if share > self.max_dead_channels:
            names = ", ".join(map(str, dead.nonzero().flatten().tolist()[:12]))
            found.append(
                f"{int(dead.sum())} of {len(dead)} code channels ({share:.0%}, alarm above "
                f"{self.max_dead_channels:.0%}) take a single value: {names}"
            )
        num_bits = report.bit_entropy.numel()
        share = float(report.dead_fraction.mean()) if num_bits else 0.0
        if share > self.max_dead_bits:
            found.append(
                f"{round(share * num_bits)} of {num_bits} bits of a position ({share:.0%}, alarm "
                f"above {self.max_dead_bits:.0%}) never change"
            )
        return found

    def _unused(self, report: CodeReport) -> list[str]:
        found, num_values = [], report.histogram.shape[1]
        usage, entropy = float(report.usage.mean()), float(report.channel_entropy.mean())
        if usage < self.min_usage:
            found.append(
                f"a code channel takes {usage:.0%} of its {num_values} values on average (alarm "
                f"below {self.min_usage:.0%})"
            )
        if entropy < self.min_entropy:
            found.append(
                f"a code channel carries {entropy:.0%} of its {math.log2(num_values):.3g} bits "
                f"(alarm below {self.min_entropy:.0%})"
            )
        rounds = enumerate(report.entropy.reshape(-1).tolist())
        found += [
            f"round {index} carries {value:.2f} bits of 1 (alarm below {self.min_round_entropy})"
            for index, value in rounds
            if value < self.min_round_entropy
        ]
        return found
