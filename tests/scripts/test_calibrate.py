"""Adaptive steps are calibrated on a trained run, stored beside it, and used from there."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grn_lightning.samplers import RefineConfig, StepBudget
from grn_lightning.scripts.calibrate import calibrate
from grn_lightning.scripts.export import export
from grn_lightning.scripts.sample import sample
from tests.scripts.conftest import Runs

WALK = RefineConfig(num_steps=12, guidance_scale=2.0)
BUDGET = StepBudget(mean_steps=7.0, min_steps=4, decision_step=2)


def steps_drawn(folder: Path) -> list[int]:
    listing = json.loads((folder / "samples.json").read_text())
    return [row["num_steps"] for row in listing["samples"]]


def test_samples_take_the_wanted_steps_once_calibrated(
    runs: Runs, digits: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"steps": BUDGET, "refine": WALK, "num_samples": 20}
    report = calibrate(runs.classes, batch_size=7, **options)
    assert report.file == runs.classes / "sampling.json"
    assert sum(report.num_steps) / 20 == pytest.approx(7.0, abs=0.5)
    assert len(set(report.num_steps)) > 1
    stored = json.loads(report.file.read_text())
    assert stored["calibration"]["wanted"]["mean_steps"] == 7.0
    assert len(stored["calibration"]["entropies"]) == 20

    # What it foresaw of samples 0 to 19 is what they take; a class is drawn as it was calibrated.
    third = sample(runs.classes, class_labels=3, first_index=3, out=tmp_path / "a")
    assert steps_drawn(third.folder) == [report.num_steps[3]]
    plain = sample(
        runs.classes,
        class_labels=3,
        out=tmp_path / "b",
        sampling="plain",
        refine=RefineConfig(num_steps=5),
    )
    assert steps_drawn(plain.folder) == [5]

    assert calibrate(runs.classes, **options).entropies == report.entropies


def test_an_export_carries_the_calibration(runs: Runs, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": BUDGET, "refine": WALK, "num_samples": 6}
    before = calibrate(runs.classes, **options)
    export(runs.tokenizer, out=tmp_path / "weights" / "tok")
    export(runs.classes, out=tmp_path / "weights" / "c2i")
    file = tmp_path / "weights" / "c2i.json"
    assert json.loads(file.read_text())["sampling"]["adaptive"] == vars(before.config.adaptive)

    again = calibrate(
        tmp_path / "weights" / "c2i", **options | {"steps": replace(BUDGET, mean_steps=9)}
    )
    assert again.file == file
    assert sum(again.num_steps) > sum(before.num_steps)
    stored = json.loads(file.read_text())
    assert stored["sampling"]["adaptive"] == vars(again.config.adaptive)
    assert stored["kind"] == "generator"
    made = sample(tmp_path / "weights" / "c2i", class_labels=2, first_index=2, out=tmp_path / "a")
    assert steps_drawn(made.folder) == [again.num_steps[2]]


@pytest.mark.parametrize("source", ["data", "prompts"])
def test_text_is_calibrated_on_captions(runs: Runs, digits: Path, source: str) -> None:
    captions: dict[str, Any] = {
        "data": {"data": digits / "clips"},
        "prompts": {"prompts": ["a", "b"]},
    }
    report = calibrate(runs.text, steps=BUDGET, refine=WALK, num_samples=8, **captions[source])
    assert len(report.entropies) == len(report.num_steps) == 8
    assert "mean" in str(report)


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("text", {}, "give `--data`, a folder of shards with captions"),
        ("classes", {"prompts": "x"}, "draws 10 classes"),
        ("classes", {"num_samples": 1}, "`num_samples` must be at least 2"),
        ("classes", {"steps": StepBudget(mean_steps=30.0)}, "mean_steps must be between"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    trained: Runs, kind: str, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        calibrate(getattr(trained, kind), **{"refine": WALK, "steps": BUDGET, **options})
    assert not (getattr(trained, kind) / "sampling.json").exists()


def test_a_file_of_another_make_is_named(runs: Runs, tmp_path: Path) -> None:
    (runs.classes / "sampling.json").write_text('{"num_step": 3}')
    with pytest.raises(ValueError, match="sampling.json.*num_step.*`grn calibrate` writes it anew"):
        sample(runs.classes, class_labels=3, out=tmp_path / "a")
