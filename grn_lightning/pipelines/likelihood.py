"""How probable code maps are to coarse-to-fine prediction, or to the plain baseline.

A code map q has exactly one coarse map r, so that `p(q | c) = p_1(r | c) prod_i p_2(q_i | r, c)`.
This sums to one over all maps if stage 2 cannot contradict stage 1: with codeword clusters because
its logits are masked, with bit prefixes by themselves.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grn_lightning.functional import token_cross_entropy
from grn_lightning.models.coarse_split import LatentSplit
from grn_lightning.pipelines.coarse_to_fine import CoarseToFinePipeline


class NegativeLogLikelihood(NamedTuple):
    """`-log p` of whole code maps in nats, by stage; their sum is that of the map."""

    coarse: Tensor
    """`(b,)`: of the coarse map, or of the baseline's codes."""
    fine: Tensor
    """`(b,)`: of the codes, given the coarse map; 0 without a stage 2."""


@torch.no_grad()
def negative_log_likelihood(
    pipeline: CoarseToFinePipeline, codes: Tensor, condition: Any
) -> NegativeLogLikelihood:
    """Return how improbable code maps are, without guidance and at temperature 1.

    Args:
        pipeline: Its networks are asked in the mode in which the caller left them.
        codes: `(b, c, h, w)` long, codes of the tokenizer.
        condition: `b` rows, from `CoarseToFinePipeline.condition`.

    Raises:
        ValueError: If the two stages do not make a probability of code maps.
    """
    split, fine = pipeline.split, pipeline.fine
    if split is None or fine is None:
        return NegativeLogLikelihood(
            _nats(pipeline.coarse(codes, condition), codes),
            torch.zeros(len(codes)).to(codes.device),
        )
    coarse = split.coarse(codes)
    allowed = split.allowed(coarse)
    if isinstance(split, LatentSplit) or (allowed is not None and pipeline.fine_mask == "none"):
        raise ValueError(
            "the likelihood of code maps is not defined where stage 2 may contradict stage 1: "
            "clusters of latents, or fine_mask='none'."
        )
    logits = fine(coarse, condition)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    return NegativeLogLikelihood(
        _nats(pipeline.coarse(coarse, condition), coarse), _nats(logits, split.fine(codes))
    )


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum the cross-entropy of all labels of a map."""
    return token_cross_entropy(logits, targets) * targets[0].numel()
