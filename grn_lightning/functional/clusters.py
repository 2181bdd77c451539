"""Coarse and fine labels: a fixed map from codes to clusters, and its members (CTF, section 3).

`k` codes, `m` clusters, `s` size of the largest cluster. The map is `cluster_of` `(k,)`; its
inverse is a table `members` `(m, s)` padded with -1.
"""

import math

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor


def cluster_members(cluster_of: Integer[Tensor, " k"], *, num_clusters: int) -> Int[Tensor, "m s"]:
    """List the codes of every cluster in ascending order, padded with -1.

    Args:
        cluster_of: Cluster of every code, in [0, num_clusters).
        num_clusters: Number of clusters; none may be empty.

    Raises:
        ValueError: If an index is out of range or a cluster is empty.

    Example:
        >>> cluster_members(torch.tensor([1, 0, 1]), num_clusters=2)
        tensor([[ 1, -1],
                [ 0,  2]])
    """
    cluster_of = cluster_of.long()
    if cluster_of.numel() == 0 or cluster_of.min() < 0 or cluster_of.max() >= num_clusters:
        raise ValueError(f"clusters must be in [0, {num_clusters}).")
    sizes = cluster_of.bincount(minlength=num_clusters)
    if sizes.min() == 0:
        empty = (sizes == 0).nonzero().flatten().tolist()
        raise ValueError(f"every cluster must have a member, {len(empty)} have none: {empty[:10]}.")
    order = cluster_of.argsort(stable=True)  # codes, cluster by cluster
    first = sizes.cumsum(0) - sizes
    place = torch.arange(len(order), device=order.device) - first[cluster_of[order]]
    members = order.new_full((num_clusters, int(sizes.max())), -1)
    members[cluster_of[order], place] = order
    return members


def member_mask(
    coarse: Integer[Tensor, "*shape"], cluster_of: Integer[Tensor, " k"]
) -> Bool[Tensor, "*shape k"]:
    """Return which codes belong to the cluster of each position, True = allowed."""
    return coarse.unsqueeze(-1) == cluster_of


def mask_fine_logits(
    logits: Float[Tensor, "*shape k"],
    coarse: Integer[Tensor, "*shape"],
    cluster_of: Integer[Tensor, " k"],
) -> Float[Tensor, "*shape k"]:
    """Forbid all codes outside the cluster of each position (logit -inf).

    With it the two stages are one proper likelihood: coarse times fine sums to 1 over all codes.
    """
    return logits.masked_fill(~member_mask(coarse, cluster_of), -math.inf)


def gather_member_logits(
    logits: Float[Tensor, "*shape k"],
    coarse: Integer[Tensor, "*shape"],
    members: Integer[Tensor, "m s"],
) -> Float[Tensor, "*shape s"]:
    """Return the logits of the members of each position's cluster; padding gets -inf.

    The softmax over them is that of `mask_fine_logits`, with `s` instead of `k` values.
    """
    rows = members[coarse]
    return logits.gather(-1, rows.clamp(min=0)).masked_fill(rows < 0, -math.inf)
