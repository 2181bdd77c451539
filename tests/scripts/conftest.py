"""Tiny trained runs of both stages, and the digits with a judge beside them."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from grn_lightning.datasets.digits import build_digits, load_scans
from grn_lightning.metrics import DigitJudge
from tests.clip_files import write_clip
from tests.tiny_runs import (
    TINY_DIGITS,
    callback,
    checkpoints,
    fit,
    generator_config,
    logger,
    tokenizer_config,
)


class Runs(NamedTuple):
    """Folders of one run each."""

    tokenizer: Path
    text: Path
    classes: Path


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 held-out clips and images, and a judge that was fitted for a moment."""
    folder = tmp_path_factory.mktemp("digits")
    for _ in build_digits(folder, TINY_DIGITS):
        pass
    scans = load_scans("train")
    judge = DigitJudge.fit(scans.images, scans.labels, digit_size=8, num_steps=60)
    judge.save(folder / "judge.safetensors")
    return folder


@pytest.fixture(scope="session")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A tokenizer, a text-to-video and a class-to-image run of four steps, with averages."""
    root = tmp_path_factory.mktemp("trained")
    runs = Runs(root / "tokenizer-tiny", root / "t2v-tiny", root / "c2i-tiny")
    configs = {
        runs.tokenizer: tokenizer_config(runs.tokenizer, digits),
        runs.text: generator_config(runs.text, digits, runs.tokenizer, kind="text"),
        runs.classes: generator_config(runs.classes, digits, runs.tokenizer, kind="class"),
    }
    for folder, config in configs.items():
        config["trainer"]["logger"] = logger("TensorBoardLogger", folder)
        config["trainer"]["callbacks"] = [callback("EMA", decay=0.5), checkpoints(folder, 4)]
        fit(folder, config)
    return runs


@pytest.fixture
def runs(trained: Runs, tmp_path: Path) -> Runs:
    """Copies of the runs, to be written to."""
    return Runs(*(shutil.copytree(run, tmp_path / run.name) for run in trained))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP with random weights."""
    return write_clip(tmp_path_factory.mktemp("clip") / "small")
