"""Tiny trained runs of both stages, and the digits with a judge beside them."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from grn_lightning.datasets.digits import build_digits, load_scans
from grn_lightning.lit.coarse_to_fine import LitFine, LitRaster
from grn_lightning.metrics import DigitJudge
from tests.clip_files import write_clip
from tests.scripts.stages import VQ, Chain, stage_options, store, train
from tests.tiny_runs import (
    TINY_DIGITS,
    TINY_ENCODER,
    call_grn,
    callback,
    checkpoints,
    fit,
    generator_config,
    logger,
    run_config,
    source,
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


@pytest.fixture(scope="session")
def chain(digits: Path, trained: Runs, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Runs of a codebook, its codes and clusters, and of stages, trained for a moment or not."""
    root = tmp_path_factory.mktemp("chain")
    images = source(digits, "image", 8)
    tokenizer = train(
        root / "vq",
        tokenizer_config(root, digits, init_args={"tokenizer": VQ}, sources=[images]),
    )
    for split in ("train", "val"):
        call_grn(
            *("encode", images["path"], "--tokenizer", tokenizer, "--out", root / "codes"),
            *("--split", split, "--accelerator", "cpu"),
        )
    clusters = root / "clusters.safetensors"
    call_grn(
        *("cluster", tokenizer, images["path"], "--out", clusters, "--num_clusters", 4),
        *("--image_size", 16, "--num_restarts", 1, "--device", "cpu"),
    )
    baseline = run_config(
        root / "ar",
        model="coarse_to_fine.LitRaster",
        init_args=stage_options(tokenizer, optim={"lr": 1e-2}),
        sources=[{"path": str(root / "codes"), "media": "image", "batch_size": 8}],
    )
    split = {"clusters": str(clusters)}
    captions: dict[str, Any] = {"num_classes": None, "text_encoder": TINY_ENCODER}
    hbq = trained.tokenizer
    return Chain(
        tokenizer,
        root / "codes",
        clusters,
        train(root / "ar", baseline),
        store(root / "coarse", LitRaster, tokenizer, split=split),
        store(root / "fine", LitFine, tokenizer, split=split, fine_mask="sample"),
        store(root / "hbq", LitRaster, hbq, split={"coarse_rounds": 1}),
        store(root / "text", LitRaster, hbq, **captions),
    )


@pytest.fixture(scope="session")
def exports(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of the chain's runs as exports in one folder, the codebook with them."""
    folder = tmp_path_factory.mktemp("exports")
    for name in ("tokenizer", "baseline", "raster", "fine"):
        call_grn("export", getattr(chain, name), "--out", folder / name)
    return folder
