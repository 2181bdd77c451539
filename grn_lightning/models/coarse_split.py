"""What is coarse and what is fine: the splits of a code map that coarse-to-fine prediction can use.

A split turns codes into a coarse map, which stage 1 draws position by position, and a fine map,
which stage 2 draws in one pass; together they are the codes again. The coarse map is a function of
the codes, never of unquantized latents: else the two stages are no factorization of anything.

`c` channels of a position, `k` values, `h w` grid; subscripts 1 and 2 are coarse and fine.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from grn_lightning.functional.clusters import cluster_members, member_mask
from grn_lightning.functional.hbq import hbq_decode


class MapSizes(NamedTuple):
    """Sizes of a map of labels."""

    channels: int
    """Labels per position."""
    size: int
    """Values of a label."""


class CoarseSplit(Protocol):
    """Codes `(b, c, h, w)` to coarse and fine maps, and back."""

    @property
    def coarse_sizes(self) -> MapSizes:
        """Channels and values of the coarse map."""

    @property
    def fine_sizes(self) -> MapSizes:
        """Channels and values of the fine map."""

    def coarse(self, codes: Tensor) -> Tensor:
        """Map codes `(b, c, h, w)` to their coarse map `(b, c_1, h, w)`."""

    def fine(self, codes: Tensor) -> Tensor:
        """Map codes `(b, c, h, w)` to what stage 2 predicts, `(b, c_2, h, w)`."""

    def join(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Return the codes of a coarse and a fine map."""

    def allowed(self, coarse: Tensor) -> Tensor | None:
        """Return which fine values a coarse map admits, `(b, c_2, h, w, k_2)`; None for all.

        Where it is not None, a fine value outside of it contradicts the coarse map.
        """


@dataclass(frozen=True)
class ClusterSplit:
    """The published split: a code is fine, its cluster in the codebook is coarse (one channel).

    Args:
        cluster_of: `(k,)` long, cluster of every codeword.
        num_clusters: Number of clusters; none is empty.
    """

    cluster_of: Tensor
    num_clusters: int

    def __post_init__(self) -> None:
        """Refuse a map with holes."""
        cluster_members(self.cluster_of, num_clusters=self.num_clusters)

    @property
    def coarse_sizes(self) -> MapSizes:
        """One label of `num_clusters` values."""
        return MapSizes(1, self.num_clusters)

    @property
    def fine_sizes(self) -> MapSizes:
        """One code of the whole codebook."""
        return MapSizes(1, len(self.cluster_of))

    def coarse(self, codes: Tensor) -> Tensor:
        """Look up the cluster of every code."""
        return self._table(codes)[codes]

    def fine(self, codes: Tensor) -> Tensor:
        """Return the codes themselves."""
        return codes

    def join(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Return the fine map, which holds everything."""
        return fine

    def allowed(self, coarse: Tensor) -> Tensor:
        """Allow the members of each position's cluster."""
        return member_mask(coarse, self._table(coarse))

    def _table(self, like: Tensor) -> Tensor:
        return self.cluster_of.to(like.device)


@dataclass(frozen=True)
class PrefixSplit:
    """Our split of HBQ codes: the first bits of every channel are coarse, the others fine.

    Codes that share a prefix are close by construction, all cells are of equal size, and every
    fine value fits every coarse one: nothing has to be masked.

    Args:
        num_channels: Channels of the codes.
        num_rounds: Bits per channel.
        coarse_rounds: Bits per channel that are coarse, in [0, num_rounds].
        is_joint: Write the coarse bits of all channels of a position as one label of
            `2**(num_channels coarse_rounds)` values, which a softmax can tell apart without
            assuming that the channels are independent.
    """

    num_channels: int
    num_rounds: int
    coarse_rounds: int
    is_joint: bool = False

    def __post_init__(self) -> None:
        """Refuse prefixes that are none, and joint labels that no softmax can hold."""
        if not 0 <= self.coarse_rounds <= self.num_rounds:
            raise ValueError(
                f"coarse_rounds must be in [0, {self.num_rounds}], got {self.coarse_rounds}."
            )
        num_bits = self.num_channels * self.coarse_rounds
        if self.is_joint and num_bits > 16:
            raise ValueError(
                f"a joint label must have at most 16 bits, got {self.num_channels} channels of "
                f"{self.coarse_rounds}; set is_joint=False."
            )

    @property
    def fine_rounds(self) -> int:
        """Bits per channel that are fine."""
        return self.num_rounds - self.coarse_rounds

    @property
    def coarse_sizes(self) -> MapSizes:
        """A label per channel, or one for all."""
        if self.is_joint:
            return MapSizes(1, 2 ** (self.num_channels * self.coarse_rounds))
        return MapSizes(self.num_channels, 2**self.coarse_rounds)

    @property
    def fine_sizes(self) -> MapSizes:
        """A label per channel."""
        return MapSizes(self.num_channels, 2**self.fine_rounds)

    def coarse(self, codes: Tensor) -> Tensor:
        """Drop the fine bits."""
        coarse = codes >> self.fine_rounds
        if not self.is_joint:
            return coarse
        return (coarse << self._shifts(codes)).sum(1, keepdim=True)

    def fine(self, codes: Tensor) -> Tensor:
        """Drop the coarse bits."""
        return codes & (2**self.fine_rounds - 1)

    def join(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Put the bits together again."""
        if self.is_joint:
            coarse = (coarse >> self._shifts(coarse)) & (2**self.coarse_rounds - 1)
        return (coarse << self.fine_rounds) | fine

    def allowed(self, coarse: Tensor) -> None:
        """Allow everything: any fine bits go with any coarse bits."""

    def _shifts(self, like: Tensor) -> Tensor:
        channels = torch.arange(self.num_channels, device=like.device)
        return self.coarse_rounds * channels[:, None, None]


@dataclass(frozen=True)
class LatentSplit:
    """Clusters of HBQ latents: the nearest of some centroids is coarse, all bits are fine.

    The nearest to the published split, for a codebook that cannot be listed. Cells are no products
    over channels, so stage 2 cannot be masked channel by channel; how often it contradicts stage 1
    is to be measured.

    Args:
        centroids: `(m, d)` centroids of quantized latents.
        num_rounds: Bits per channel of the codes.
    """

    centroids: Tensor
    num_rounds: int

    @property
    def coarse_sizes(self) -> MapSizes:
        """One label, the number of a centroid."""
        return MapSizes(1, len(self.centroids))

    @property
    def fine_sizes(self) -> MapSizes:
        """The codes of all channels."""
        return MapSizes(self.centroids.shape[1], 2**self.num_rounds)

    def coarse(self, codes: Tensor) -> Tensor:
        """Find the centroid nearest to the quantized latents of each position."""
        z_hat = hbq_decode(codes, num_rounds=self.num_rounds).movedim(1, -1)  # (b, h, w, d)
        centroids = self.centroids.to(z_hat)
        # |z - mu|^2 without |z|^2, which all centroids share
        scores = centroids.square().sum(-1) - 2 * z_hat @ centroids.T
        return scores.argmin(-1).unsqueeze(1)

    def fine(self, codes: Tensor) -> Tensor:
        """Return the codes themselves."""
        return codes

    def join(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Return the fine map, which holds everything."""
        return fine

    def allowed(self, coarse: Tensor) -> None:
        """Allow everything; see the class."""


def leak_rate(split: CoarseSplit, coarse: Tensor, codes: Tensor) -> Tensor:
    """Return the share of positions whose codes lie in another coarse cell than drawn, `(b,)`."""
    return (split.coarse(codes) != coarse).any(1).flatten(1).float().mean(1)
