"""`grn evaluate samples --keep_samples`: whatever was there before, all samples are there then."""

import json
from pathlib import Path
from typing import Any

import pytest

from grn_lightning.samplers import RefineConfig
from grn_lightning.scripts.draw_plan import DrawOptions
from grn_lightning.scripts.evaluate_samples import evaluate_samples
from tests.scripts.conftest import Runs

QUICK = DrawOptions(refine=RefineConfig(num_steps=2), batch_size=4)


@pytest.mark.parametrize("kind", ["classes", "text"])
def test_samples_are_kept_also_of_parts_that_were_judged_without(
    runs: Runs, digits: Path, tmp_path: Path, kind: str
) -> None:
    options: dict[str, Any] = {"features": "digits-cnn", "judge": digits / "judge.safetensors"}
    if kind == "classes":
        options |= {"num_samples": 10, "part_size": 5}
    else:
        options |= {"conditions": digits / "clips", "part_size": 3}
    run, suffix = getattr(runs, kind), ".png" if kind == "classes" else ".mp4"

    def judged(name: str, **more: Any) -> tuple[list[Any], dict[str, bytes]]:
        report = evaluate_samples(run, out=tmp_path / name, config=QUICK, **options, **more)
        assert report is not None
        kept = sorted((tmp_path / name / "samples").glob(f"*{suffix}"))
        numbers = json.loads(report.file.read_text())["measurements"]
        return numbers, {file.name: file.read_bytes() for file in kept}

    numbers, samples = judged("at once", keep_samples=True)
    assert len(samples) == (10 if kind == "classes" else 6)
    without = judged("late")
    assert without == (numbers, {})
    assert judged("late", keep_samples=True) == (numbers, samples)

    parts = sorted((tmp_path / "late" / "parts").iterdir())
    before = [file.stat().st_mtime_ns for file in parts]
    (tmp_path / "late" / "samples" / f"00001{suffix}").unlink()
    assert judged("late", keep_samples=True) == (numbers, samples)
    after = [file.stat().st_mtime_ns for file in parts]
    assert [a == b for a, b in zip(after, before, strict=True)] == [False, True]  # only its part
    assert judged("late") == (numbers, samples)  # they stay where they are
