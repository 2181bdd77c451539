"""A tiny digits set, and a tokenizer that was trained on it for a few steps."""

from pathlib import Path

import pytest

from grn_lightning.datasets.digits import build_digits
from tests.tiny_runs import (
    TINY_DIGITS,
    callback,
    checkpoints,
    fit,
    generator_config,
    tokenizer_config,
)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 clips and 24 images to train on, 6 of each to validate."""
    folder = tmp_path_factory.mktemp("digits")
    for _ in build_digits(folder, TINY_DIGITS):
        pass
    return folder


@pytest.fixture(scope="session")
def tokenizer_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tokenizer that was trained for a few steps, with an average."""
    folder = tmp_path_factory.mktemp("tokenizer")
    fit(folder, tokenizer_config(folder, digits, callbacks=[
        callback("EMA", decay=0.9), checkpoints(folder, 4)]))  # fmt: skip
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
