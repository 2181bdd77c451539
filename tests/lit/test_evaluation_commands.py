"""`validate`, `test` and `predict` judge and use the averaged weights of a checkpoint."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from grn_lightning.lit.checkpoints import averaged_state, find_checkpoint, read_checkpoint, select
from grn_lightning.lit.data import ShardData, ShardSource
from grn_lightning.lit.generator import LitGenerator
from grn_lightning.lit.tokenizer import LitTokenizer, load_tokenizer
from tests.tiny_runs import TINY_DIGITS, source

pytestmark = [
    # These trainers have no callbacks, on purpose: the average must not depend on them.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You are using a custom batch sampler"),
]


def _data(digits: Path, media: str) -> ShardData:
    return ShardData(
        [ShardSource(**source(digits, media, 4))],
        image_size=TINY_DIGITS.canvas_size,
        with_captions=True,
        with_classes=True,
        num_classes=10,
    )


def _trainer(folder: Path) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )


def test_validate_and_test_judge_the_average(
    digits: Path, tokenizer_run: Path, tmp_path: Path
) -> None:
    file = find_checkpoint(tokenizer_run)
    checkpoint = read_checkpoint(file)
    averaged = select(averaged_state(checkpoint), "tokenizer")
    raw = select(checkpoint["state_dict"], "tokenizer")
    assert any(not torch.equal(averaged[name], raw[name]) for name in raw), "nothing to tell apart"

    module = LitTokenizer(**checkpoint["hyper_parameters"] | {"init_from": None})
    trainer = _trainer(tmp_path)
    validated = trainer.validate(module, _data(digits, "video"), ckpt_path=file, verbose=False)[0]
    tested = trainer.test(module, _data(digits, "video"), ckpt_path=file, verbose=False)[0]
    assert all(torch.equal(module.tokenizer.state_dict()[n], averaged[n]) for n in averaged)
    assert tested["test/psnr"] == validated["val/psnr"]
    assert tested["test/ssim"] == validated["val/ssim"]


def _predictions(module: L.LightningModule, data: ShardData, folder: Path, file: Path) -> Any:
    return _trainer(folder).predict(module, data, ckpt_path=file)


def test_a_tokenizer_predicts_codes_and_reconstructions(
    digits: Path, tokenizer_run: Path, tmp_path: Path
) -> None:
    file = find_checkpoint(tokenizer_run)
    hyper_parameters = read_checkpoint(file)["hyper_parameters"] | {"init_from": None}
    parts = _predictions(LitTokenizer(**hyper_parameters), _data(digits, "video"), tmp_path, file)
    keys = [key for part in parts for key in part.keys]
    assert len(keys) == len(set(keys)) == TINY_DIGITS.num_val_clips

    tokenizer = load_tokenizer(tokenizer_run)
    clips = torch.cat([part.clips for part in parts])
    codes = torch.cat([part.codes for part in parts])
    torch.testing.assert_close(tokenizer.detokenize(codes).clamp(-1, 1), clips)


@pytest.mark.parametrize(("kind", "media"), [("class", "image"), ("text", "video")])
def test_a_generator_predicts_samples_that_depend_on_the_seed_alone(
    digits: Path, generator_runs: dict[str, Path], tmp_path: Path, kind: str, media: str
) -> None:
    file = find_checkpoint(generator_runs[kind])
    hyper_parameters = read_checkpoint(file)["hyper_parameters"]
    first, again = (
        _predictions(LitGenerator(**hyper_parameters), _data(digits, media), tmp_path, file)
        for _ in range(2)
    )
    assert sum(len(part.keys) for part in first) == TINY_DIGITS.num_val_clips
    for part, same in zip(first, again, strict=True):
        assert torch.equal(part.codes, same.codes)
        assert part.clips.shape[1] == 3
        assert part.clips.abs().max() <= 1


def test_testing_a_generator_equals_validating_it(
    digits: Path, generator_runs: dict[str, Path], tmp_path: Path
) -> None:
    file = find_checkpoint(generator_runs["text"])
    module = LitGenerator(**read_checkpoint(file)["hyper_parameters"])
    trainer = _trainer(tmp_path)
    validated = trainer.validate(module, _data(digits, "video"), ckpt_path=file, verbose=False)[0]
    tested = trainer.test(module, _data(digits, "video"), ckpt_path=file, verbose=False)[0]
    assert tested["test/loss"] == validated["val/loss"]
    assert tested["test/accuracy"] == validated["val/accuracy"]
