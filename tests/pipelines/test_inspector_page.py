"""What docs/inspector.md shows runs: its YAML is taken, its Python does what its comments say."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import grn_lightning
from grn_lightning.lit.callbacks import Inspector
from grn_lightning.metrics.refinement import RefinementAlarms
from tests.pipelines.conftest import Build

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "inspector.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def test_its_callback_is_that_of_the_recipes() -> None:
    [callback] = yaml.safe_load(block("yaml"))
    recipe = yaml.safe_load((ROOT / "experiments" / "t2v" / "digits.yaml").read_text())
    [used] = [
        one for one in recipe["trainer"]["callbacks"] if one["class_path"] == callback["class_path"]
    ]
    assert used["init_args"].items() <= callback["init_args"].items()
    defaults = inspect.signature(Inspector).parameters
    for name, value in callback["init_args"].items():
        if name != "refine":
            assert defaults[name].default == value, name


def test_its_python_runs(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny pipeline in place of the trained run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grn_lightning, "load", lambda path: build("prefix"))
    names: dict[str, Any] = {}
    exec(compile(block("python"), "docs/inspector.md", "exec"), names)
    found, known = names["found"], names["known"]
    assert found.states.shape == (16, 2, 8, 5, 4, 4)  # (steps, samples, c, *grid)
    assert found.shares.shape == (16, 2, 4)
    assert found.entropy.shape == found.bits.shape == (16, 2)
    assert found.complexity().shape == (2,)
    assert len(found.pages(names["pipeline"], 0)) == 16
    assert known.result.by_round.shape == (10, 2)
    assert (tmp_path / "strip.png").is_file()


def test_its_limits_are_the_defaults() -> None:
    limits = dict(re.findall(r"\| `((?:max|min)_\w+)` ([\d.]+) \|", PAGE))
    assert {name: float(value) for name, value in limits.items()} == vars(RefinementAlarms())


def test_its_pictures_are_there_and_small() -> None:
    files = re.findall(r"!\[[^\]]+\]\((images/[\w-]+\.\w+)\)", PAGE)
    assert len(files) >= 6
    for file in files:
        limit = 150_000 if file == "images/tensorboard.png" else 30_000
        assert (ROOT / "docs" / file).stat().st_size < limit, file
