"""Judges of a training say the same on one process and on two, whole weights or divided ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grn_lightning.datasets.digits import load_scans
from grn_lightning.metrics.digits import DigitJudge
from tests.lit.test_strategies import CASES, run_in_turn
from tests.tiny_runs import (
    TINY_DIGITS,
    call_grn,
    callback,
    generator_config,
    logged,
    source,
    write_yaml,
)

pytestmark = [pytest.mark.slow, pytest.mark.scale]

STRATEGIES = ("ddp", "fsdp", "deepspeed_zero3")
TAGS = ("val/FID[digits-cnn,5]", "val/digit_accuracy", "val/direction_accuracy")
STEPS = 2


def settings(folder: Path, digits: Path, runs: dict[str, Path], judge: Path, **trainer: Any) -> str:
    """Two steps, each judged by five of the six held-out samples; two devices share a batch."""
    extractor = {
        "class_path": "grn_lightning.lit.callbacks.DigitFeatures",
        "init_args": {"path": str(judge)},
    }
    refine = {"num_steps": 3, "guidance_scale": 2.0}
    judging = callback("EvaluateSamples", extractor=extractor, num_samples=5, refine=refine)
    config = generator_config(
        folder,
        digits,
        runs["tokenizer"],
        kind="text",
        sources=[source(digits, "video", 8 // trainer.get("devices", 1))],
        init_args={"optim": {"name": "adamw", "lr": 1e-3}, "init_from": str(runs["text"])},
        callbacks=[callback("EMA", decay=0.5), judging],
        trainer={"max_steps": STEPS, "val_check_interval": 1, **trainer},
    )
    return str(write_yaml(folder, config))


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    scans, size = load_scans("train"), TINY_DIGITS.digit_size
    DigitJudge.fit(scans.images, scans.labels, digit_size=size, num_steps=40).save(file)
    return file


@pytest.fixture(scope="module")
def runs(tokenizer_run: Path, generator_runs: dict[str, Path]) -> dict[str, Path]:
    """All start from one generator: initial weights depend on what else has drawn numbers."""
    return {"tokenizer": tokenizer_run, **generator_runs}


@pytest.fixture(scope="module")
def two(
    digits: Path, runs: dict[str, Path], judge: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Two processes that train under one strategy after the other."""
    root = tmp_path_factory.mktemp("two")
    calls = [
        [
            "fit",
            "-c",
            settings(root / name, digits, runs, judge, devices=2, strategy=CASES[name]),
        ]
        for name in STRATEGIES
    ]
    with run_in_turn(calls, root):
        yield root


def test_two_processes_judge_as_one(
    two: Path, digits: Path, runs: dict[str, Path], judge: Path, tmp_path: Path
) -> None:
    call_grn("fit", "-c", settings(tmp_path / "one", digits, runs, judge))
    for tag in TAGS:
        expected = {step: float(value) for step, value in logged(tmp_path / "one", tag).items()}
        assert len(expected) == STEPS
        for name in STRATEGIES:
            found = {step: float(value) for step, value in logged(two / name, tag).items()}
            assert found == pytest.approx(expected, rel=1e-4), (name, tag)
