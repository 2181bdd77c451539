"""What may be decoded in place of the codes of a coarse map, without asking a second stage."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from grn_lightning.functional import Stream, cluster_members, counter_uniform, hbq_decode
from grn_lightning.models.clusters import Clusters
from grn_lightning.models.coarse_split import PrefixSplit
from grn_lightning.models.tokenizer import HBQTokenizer
from grn_lightning.models.vq_tokenizer import VQTokenizer

StandIn = Callable[[Tensor, Tensor], Tensor]
"""Coarse maps `(b, c_1, h, w)` and the numbers of their samples to latents `(b, d, 1, h, w)`."""


def random_places(coarse: Tensor, cluster_of: Tensor, index: Tensor, seed: int) -> Tensor:
    """Draw a member of the cluster at every position, all members alike.

    Args:
        coarse: `(b, 1, h, w)` clusters.
        cluster_of: `(k,)` cluster of each of the things that are drawn.
        index: `(b,)` numbers of the samples.
        seed: Seed of the draws.

    Returns:
        `(b, 1, h, w)` in [0, k).
    """
    members = cluster_members(cluster_of, num_clusters=int(cluster_of.max()) + 1)
    sizes = (members >= 0).sum(1)
    shape = tuple(coarse.shape[1:])
    u = counter_uniform(index, seed=seed, step=0, stream=Stream.DRAW, shape=shape)
    place = (u.cpu() * sizes[coarse.cpu()]).long()
    return members[coarse.cpu(), place].to(coarse.device)


def table_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Return rows `(b, 1, h, w)` of a table of latents `(k, d)` as `(b, d, 1, h, w)`."""
    return table.to(rows.device)[rows].movedim(-1, 1)


def random_members(tokenizer: VQTokenizer, cluster_of: Tensor, *, seed: int) -> StandIn:
    """Return the stand-in by any codeword of the cluster at a position."""
    return lambda coarse, index: tokenizer.dequantize(
        random_places(coarse, cluster_of, index, seed)[:, :, None]
    )


def codeword_stand_ins(
    tokenizer: VQTokenizer, clusters: Clusters, *, seed: int
) -> dict[str, StandIn]:
    """Return centroid, nearest and random member of the clusters of a codebook."""
    cluster_of = clusters.cluster_of
    assert cluster_of is not None
    words, centroids = tokenizer.quantize.codewords().detach().cpu(), clusters.centroids
    is_other = cluster_of != torch.arange(len(centroids))[:, None]
    nearest = torch.cdist(centroids, words).masked_fill(is_other, torch.inf).argmin(1)

    def nearest_member(coarse: Tensor, index: Tensor) -> Tensor:
        return tokenizer.dequantize(nearest.to(coarse.device)[coarse][:, :, None])

    return {
        "centroid": lambda coarse, index: table_rows(normalize(centroids, dim=-1), coarse),
        "member nearest to the centroid": nearest_member,
        "random member": random_members(tokenizer, cluster_of, seed=seed),
    }


def prefix_stand_ins(
    tokenizer: HBQTokenizer, split: PrefixSplit, *, seed: int
) -> dict[str, StandIn]:
    """Return the middle of the cell of every channel, and random bits behind its prefix."""

    def middle(coarse: Tensor, index: Tensor) -> Tensor:
        first = split.join(coarse, torch.zeros_like(coarse[:, :1])) >> split.fine_rounds
        return hbq_decode(first, num_rounds=split.coarse_rounds)[:, :, None]

    def random_bits(coarse: Tensor, index: Tensor) -> Tensor:
        shape = (split.fine_sizes.channels, *coarse.shape[2:])
        u = counter_uniform(index, seed=seed, step=0, stream=Stream.DRAW, shape=shape)
        fine = (u.to(coarse.device) * split.fine_sizes.size).long()
        return tokenizer.dequantize(split.join(coarse, fine)[:, :, None])

    return {"middle of the cell": middle, "random bits": random_bits}


def latent_stand_ins(clusters: Clusters) -> dict[str, StandIn]:
    """Return the centroid of clusters of latents, which have no members of their own."""
    return {"centroid": lambda coarse, index: table_rows(clusters.centroids, coarse)}
