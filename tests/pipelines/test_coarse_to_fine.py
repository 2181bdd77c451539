"""CoarseToFinePipeline: degenerate splits, whole pictures, what does not fit."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from grn_lightning.models.coarse_split import ClusterSplit, PrefixSplit
from grn_lightning.models.code_transformer import CodeTransformer, CodeTransformerConfig
from grn_lightning.models.tokenizer import HBQTokenizer, TokenizerConfig
from grn_lightning.models.vq_tokenizer import VQTokenizer, VQTokenizerConfig
from grn_lightning.pipelines.coarse_to_fine import CoarseToFinePipeline
from grn_lightning.samplers.coarse_to_fine import CoarseToFineConfig, DrawConfig

VQ = VQTokenizerConfig(
    codebook_size=12, codebook_dim=3, width=32, width_multipliers=(1, 1), feature_width=4
)
HBQ = TokenizerConfig(
    latent_channels=3,
    num_rounds=2,
    encoder_width=8,
    decoder_width=8,
    width_multipliers=(1, 1),
    num_res_blocks=1,
    temporal_downsample=(False,),
)
LABELS = torch.tensor([0, 3, 1, 2])
INDEX = torch.arange(4)


def network(reads, predicts=None, seed=0):
    torch.manual_seed(seed)
    predicts = predicts or reads
    model = CodeTransformer(
        CodeTransformerConfig(
            input_channels=reads[0],
            input_size=reads[1],
            output_channels=predicts[0],
            output_size=predicts[1],
            is_causal=reads == predicts,
            grid_size=(2, 2),
            depth=1,
            width=16,
            num_heads=1,
            num_classes=4,
        )
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def vq():
    torch.manual_seed(0)
    return VQTokenizer(VQ).eval()


def test_clusters_of_one_codeword_are_the_plain_baseline(vq):
    causal = network((1, 12))
    split = ClusterSplit(torch.arange(12), 12)
    fine = CodeTransformer(
        CodeTransformerConfig(
            input_size=12,
            output_size=12,
            is_causal=False,
            grid_size=(2, 2),
            depth=1,
            width=16,
            num_heads=1,
            num_classes=4,
        )
    )
    baseline = CoarseToFinePipeline(causal, vq).draw(LABELS, INDEX, seed=3)
    both = CoarseToFinePipeline(causal, vq, fine, split).draw(LABELS, INDEX, seed=3)
    assert torch.equal(both.codes, baseline.codes)
    assert torch.equal(both.clips, baseline.clips)
    assert (baseline.num_steps, both.num_steps) == (4, 5)


@pytest.mark.parametrize("is_joint", [False, True])
def test_pictures_are_those_of_the_codes_of_both_stages(is_joint):
    torch.manual_seed(0)
    tokenizer = HBQTokenizer(HBQ).eval()
    split = PrefixSplit(3, 2, 1, is_joint=is_joint)
    pipeline = CoarseToFinePipeline(
        network(tuple(split.coarse_sizes)),
        tokenizer,
        network(tuple(split.coarse_sizes), tuple(split.fine_sizes), seed=1),
        split,
        sampling=CoarseToFineConfig(coarse=DrawConfig(guidance_scale=2.0)),
    )
    drawn = pipeline.draw(LABELS, INDEX)
    assert torch.equal(split.coarse(drawn.codes), drawn.coarse)
    assert drawn.leak_rate.tolist() == [0.0] * 4
    assert torch.equal(drawn.clips, pipeline.detokenize(drawn.codes))
    assert drawn.clips.shape == (4, 3, 1, 8, 8)
    alone = pipeline.draw(LABELS[2:3], INDEX[2:3])
    assert torch.equal(alone.codes[0], drawn.codes[2])


def test_the_mask_keeps_stage_2_within_its_clusters_and_leaks_are_told_without_it(vq):
    split = ClusterSplit(torch.arange(12) // 3, 4)
    coarse, fine = network((1, 4)), network((1, 4), (1, 12))
    masked = CoarseToFinePipeline(coarse, vq, fine, split).draw(LABELS, INDEX)
    free = CoarseToFinePipeline(coarse, vq, fine, split, fine_mask="none").draw(LABELS, INDEX)
    assert masked.leak_rate.sum() == 0
    assert torch.equal(masked.coarse, free.coarse)
    share = (split.coarse(free.codes) != free.coarse).float().mean()
    assert share > 0.3
    torch.testing.assert_close(free.leak_rate.mean(), share)


@pytest.mark.parametrize(
    ("coarse", "fine", "split", "match"),
    [
        ((1, 12), None, ClusterSplit(torch.arange(12) // 3, 4), "needs a split, and a split"),
        ((1, 9), None, None, r"read \(1, 12\) and predict \(1, 12\)"),
        ((1, 12), (1, 12), ClusterSplit(torch.arange(12) // 3, 4), r"stage 1 must read \(1, 4\)"),
        ((1, 4), (1, 9), ClusterSplit(torch.arange(12) // 3, 4), r"predict \(1, 12\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused(vq, coarse, fine, split, match):
    second = None if fine is None else network((1, 4), fine)
    with pytest.raises(ValueError, match=match):
        CoarseToFinePipeline(network(coarse), vq, second, split)


def test_the_control_of_independence_does_not_draw(vq):
    split = ClusterSplit(torch.arange(12) // 3, 4)
    control = network((1, 4), (1, 12))
    control.config = replace(control.config, sees_earlier=True)
    with pytest.raises(ValueError, match="is a control for its likelihood and cannot draw"):
        CoarseToFinePipeline(network((1, 4)), vq, control, split)
