"""What a batch is said to cost is what its step is counted to do."""

from functools import partial
from typing import Any

import pytest
import torch

from grn_lightning.lit.generator import LitGenerator, load_generator
from grn_lightning.lit.stepping import ProcedureConfig
from grn_lightning.lit.tokenizer import LitTokenizer
from grn_lightning.lit.work import Work
from grn_lightning.models.costs import count_flops
from grn_lightning.models.grn_text import TextCondition
from grn_lightning.models.tokenizer import TokenizerConfig
from tests.tiny_runs import TINY_DIGITS, TINY_TOKENIZER

SIZE = (TINY_DIGITS.num_frames, 16, 16)


def _clips(number: int, num_frames: int) -> torch.Tensor:
    return torch.rand(number, 3, num_frames, *SIZE[1:]) * 2 - 1


def _loaded(runs: Any, kind: str) -> LitGenerator:
    module = load_generator(runs[kind])
    module.generator.requires_grad_(True)  # but for the fixed table of positions
    if kind == "class":
        module.generator.pos_embed.requires_grad_(False)
    return module


def test_a_class_batch_is_what_its_step_is_counted_to_do(generator_runs):
    module = _loaded(generator_runs, "class")
    batch: Any = {"clips": _clips(3, 1), "keys": ["a", "b", "c"]}
    work = module.work_of(batch)
    codes, labels = module.tokenize(batch["clips"]), torch.tensor([1, 2, 3])
    counted = count_flops(lambda: module.generator(codes, torch.rand(3), labels))
    assert work == Work(3, 3 * (4 + 2), 3 * (4 + 2), counted.total)


def test_a_text_batch_is_what_the_step_of_each_caption_alone_is_counted_to_do(generator_runs):
    module = _loaded(generator_runs, "text")
    captions = ["one", "the digit two moves up"]
    batch: Any = {"clips": _clips(2, 5), "keys": ["a", "b"], "captions": captions}
    work = module.work_of(batch)
    codes = module.tokenize(batch["clips"])

    counted, lengths = 0.0, []
    for row in range(2):
        embeds, mask = module.text_encoder(module.text_encoder.tokenize(captions[row : row + 1]))
        alone = TextCondition(embeds[:, mask[0]].detach(), mask[:, mask[0]])
        t, part = torch.rand(1), codes[row : row + 1]
        counted += count_flops(partial(module.generator, part, t, alone)).total
        lengths.append(int(mask.sum()))
    assert lengths == [3, 7]  # with start and end
    assert work == Work(2, 2 * (3 * 2 * 2 + 1) + 10, 2 * (3 * 2 * 2 + 1 + 9), counted)


def test_cached_codes_and_features_are_the_same_work(generator_runs):
    module = _loaded(generator_runs, "text")
    captions = ["one", "the digit two moves up"]
    clips = _clips(2, 5)
    from_clips = module.work_of({"clips": clips, "keys": ["a", "b"], "captions": captions})
    embeds, mask = module.text_encoder(module.text_encoder.tokenize(captions))
    codes = module.tokenizer.tokenize(clips)
    cached = {"codes": codes, "keys": ["a", "b"], "text_embeds": embeds, "text_mask": mask}
    assert module.work_of(cached) == from_clips


@pytest.mark.parametrize("trains", ["all", "decoder"])
def test_a_tokenizer_batch_is_what_its_network_is_counted_to_do(trains):
    config = TokenizerConfig(**TINY_TOKENIZER)
    module = LitTokenizer(config, procedure=ProcedureConfig(trains=trains))
    module.configure_model()
    clips = _clips(2, 5)
    counted = count_flops(lambda: module(clips).reconstruction).total
    batch: Any = {"clips": clips, "keys": ["a", "b"]}
    work = module.work_of(batch)
    assert (work.samples, work.tokens, work.capacity) == (2, 2 * 12, 2 * 12)
    if trains == "all":
        assert work.flops == counted
    else:  # the gradient of the decoder's input is not needed either
        assert work.flops == pytest.approx(counted, rel=0.05)


def test_batches_add_up():
    assert Work(1, 2, 3, 4.0).plus(Work(10, 20, 30, 40.0)) == Work(11, 22, 33, 44.0)
