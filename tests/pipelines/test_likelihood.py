"""The likelihood of code maps, against enumeration of toys."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from grn_lightning.models.coarse_split import ClusterSplit, LatentSplit, PrefixSplit
from grn_lightning.models.code_transformer import CodeTransformer, CodeTransformerConfig
from grn_lightning.pipelines.coarse_to_fine import CoarseToFinePipeline
from grn_lightning.pipelines.likelihood import negative_log_likelihood

GRID = (1, 2)
SPLITS = {
    "baseline": None,
    "prefix": PrefixSplit(2, 2, 1),
    "joint": PrefixSplit(2, 2, 1, is_joint=True),
    "clusters": ClusterSplit(torch.tensor([0, 1, 1, 0, 2]), 3),
}


def network(reads, predicts, *, is_causal: bool, channel_depth: int = 0) -> CodeTransformer:
    config = CodeTransformerConfig(
        input_channels=reads[0],
        input_size=reads[1],
        output_channels=predicts[0],
        output_size=predicts[1],
        is_causal=is_causal,
        grid_size=GRID,
        depth=1,
        width=8,
        num_heads=1,
        mlp_width=8,
        num_classes=3,
        channel_depth=channel_depth,
    )
    model = CodeTransformer(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return model


def toy(name: str, **rest) -> CoarseToFinePipeline:
    split = rest.pop("split", SPLITS.get(name))
    sizes = (1, 5) if name == "clusters" else (2, 4)
    tokenizer = SimpleNamespace(
        config=SimpleNamespace(code_channels=sizes[0], alphabet_size=sizes[1])
    )
    reads = sizes if split is None else split.coarse_sizes
    raster = network(reads, reads, is_causal=True, channel_depth=int(reads[0] > 1))
    fine = None if split is None else network(reads, split.fine_sizes, is_causal=False)
    return CoarseToFinePipeline(raster, tokenizer, fine=fine, split=split, **rest)  # type: ignore[arg-type]


def all_maps(pipeline: CoarseToFinePipeline) -> Tensor:
    channels, size = (
        pipeline.tokenizer.config.code_channels,
        pipeline.tokenizer.config.alphabet_size,
    )
    maps = itertools.product(range(size), repeat=channels * math.prod(GRID))
    return torch.tensor(list(maps)).view(-1, channels, *GRID)


@pytest.mark.parametrize("name", SPLITS)
def test_the_likelihoods_of_all_maps_sum_to_one(name: str) -> None:
    pipeline = toy(name)
    maps = all_maps(pipeline)
    label = torch.full((len(maps),), 2)
    coarse, fine = negative_log_likelihood(pipeline, maps, label)
    log_p = -(coarse + fine).double()
    assert log_p.exp().sum() == pytest.approx(1, abs=1e-5)
    assert log_p.std() > 0.3
    # another class is another distribution, which sums to one as well
    other = negative_log_likelihood(pipeline, maps, label - 1)
    assert not torch.allclose(sum(other), coarse + fine, atol=0.05)


@pytest.mark.parametrize("name", ["prefix", "clusters"])
def test_coarse_maps_have_the_summed_likelihood_of_their_members(name: str) -> None:
    pipeline = toy(name)
    maps = all_maps(pipeline)
    coarse, fine = negative_log_likelihood(pipeline, maps, torch.zeros(len(maps), dtype=torch.long))
    labels = pipeline.split.coarse(maps).flatten(1)  # type: ignore[union-attr]
    _, groups = labels.unique(dim=0, return_inverse=True)
    summed = torch.zeros(int(groups.max()) + 1).index_add(0, groups, (-coarse - fine).exp())
    assert torch.allclose(summed[groups], (-coarse).exp(), rtol=1e-4)


def test_it_is_what_draws_have() -> None:
    """Frequencies of drawn maps are their likelihoods, to the error of 4,000 draws."""
    pipeline = toy("clusters")
    pipeline.tokenizer.detokenize = lambda codes: torch.zeros(len(codes), 3, 1, 1, 1)  # type: ignore[method-assign]
    maps, count = all_maps(pipeline), 4000
    drawn = pipeline.draw(torch.ones(count, dtype=torch.long), torch.arange(count), seed=1).codes
    numbers = (drawn.flatten(1) * torch.tensor([5, 1])).sum(1)
    frequency = numbers.bincount(minlength=len(maps)) / count
    label = torch.ones(len(maps), dtype=torch.long)
    p = (-sum(negative_log_likelihood(pipeline, maps, label))).exp()  # type: ignore[operator]
    assert (frequency - p).abs().max() < 4 * (p * (1 - p) / count).sqrt().max()


@pytest.mark.parametrize(
    "pipeline",
    [
        lambda: toy("clusters", fine_mask="none"),
        lambda: toy("latents", split=LatentSplit(torch.randn(3, 2), 2)),
    ],
)
def test_where_stages_may_contradict_one_another_there_is_none(pipeline) -> None:
    model = pipeline()
    maps = all_maps(model)[:2]
    with pytest.raises(ValueError, match="not defined where stage 2 may contradict stage 1"):
        negative_log_likelihood(model, maps, torch.zeros(2, dtype=torch.long))
