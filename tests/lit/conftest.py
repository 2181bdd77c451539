"""A tiny digits set, and a tokenizer that was trained on it for a few steps."""

from pathlib import Path

import pytest
import torch

from grn_lightning.datasets.digits import build_digits
from grn_lightning.lit.data import ShardData, ShardSource
from grn_lightning.lit.tokenizer import LitTokenizer
from grn_lightning.models.tokenizer import HBQTokenizer, TokenizerConfig
from tests.tiny_runs import (
    TINY_DIGITS,
    TINY_TOKENIZER,
    callback,
    checkpoints,
    fit,
    generator_config,
    source,
    tokenizer_config,
)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 clips and 24 images to train on, 6 of each to validate."""
    folder = tmp_path_factory.mktemp("digits")
    for _ in build_digits(folder, TINY_DIGITS):
        pass
    return folder


@torch.no_grad()
def stretch_latents(tokenizer: HBQTokenizer, digits: Path) -> None:
    """Give every latent channel mean 0 and variance 1 before its tanh, over the training clips."""
    clips = ShardSource(**source(digits, "video", TINY_DIGITS.num_train_clips))
    data = ShardData([clips], image_size=TINY_DIGITS.canvas_size)
    data.setup("fit")
    z = tokenizer.encode(next(iter(data.train_dataloader()))["clips"]).atanh()
    mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
    weight, bias = tokenizer.conv1.weight[: len(mean)], tokenizer.conv1.bias[: len(mean)]
    weight.div_(std[:, None, None, None, None])
    bias.sub_(mean).div_(std)


@pytest.fixture(scope="session")
def tokenizer_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tokenizer that was trained for a few steps, with an average.

    Its latents are stretched from the start, so that different samples have different codes.
    """
    folder = tmp_path_factory.mktemp("tokenizer")
    torch.manual_seed(0)
    start = LitTokenizer(TokenizerConfig(**TINY_TOKENIZER))
    start.configure_model()
    stretch_latents(start.tokenizer, digits)
    torch.save({"state_dict": start.state_dict()}, folder / "start.ckpt")
    config = tokenizer_config(
        folder,
        digits,
        init_args={"init_from": str(folder / "start.ckpt")},
        callbacks=[callback("EMA", decay=0.9), checkpoints(folder, 4)],
    )
    fit(folder, config)
    return folder


@pytest.fixture(scope="session")
def generator_runs(
    digits: Path, tokenizer_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Folders of a "class" and a "text" generator that were trained for a few steps, likewise."""
    folders = {}
    for kind in ("class", "text"):
        folders[kind] = folder = tmp_path_factory.mktemp(kind)
        saved = [callback("EMA", decay=0.9), checkpoints(folder, 4)]
        fit(folder, generator_config(folder, digits, tokenizer_run, kind=kind, callbacks=saved))
    return folders
