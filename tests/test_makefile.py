"""The Makefile: what `make` lists is what there is, and what each target would run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
MAKEFILE = ROOT / "Makefile"
TARGETS = ["setup", "data", "sample", "evaluate", "tensorboard", "demo", "test", "check"]
STAGES = ["tokenizer", "c2i", "t2i", "t2v"]
OWN_VARIABLES = {"ARGS", "CONFIG", "BASE", "RUN", "DATA", "VENV", "PYTHON", "INSTALL"}

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def _run(*args: str) -> subprocess.CompletedProcess[str]:
    """Run make as if it were not make that runs this test."""
    ours = {name for name in os.environ if name.startswith(("MAKE", "MFLAGS"))} | OWN_VARIABLES
    env = {name: value for name, value in os.environ.items() if name not in ours}
    command = ["make", "--no-print-directory", *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def _make(*args: str) -> str:
    result = _run(*args)
    assert result.returncode == 0, result.stderr
    return result.stdout


def _plan(target: str, *variables: str) -> list[str]:
    """Commands behind a target, in an environment that stands."""
    stamp = ("VENV=ENV", "-o", "ENV/.installed")
    return _make("-n", *stamp, target, *variables).splitlines()


def test_make_alone_lists_every_target() -> None:
    listed = _make()
    assert listed == _make("help")
    for target in TARGETS + [f"train-{stage}" for stage in STAGES]:
        assert re.search(rf"^  {target} +\S", listed, re.MULTILINE)
    declared = re.findall(r"^([a-z0-9-]+):.*##", MAKEFILE.read_text(), re.MULTILINE)
    assert set(declared) == set(re.findall(r"^  ([a-z0-9-]+) ", listed, re.MULTILINE))


@pytest.mark.parametrize("stage", STAGES)
def test_training_takes_experiment_and_options(stage: str) -> None:
    data, *fits = _plan(f"train-{stage}", "ARGS=--trainer.max_steps=20")
    assert data.split() == ["ENV/bin/grn", "digits", "data/digits"]
    names = ["digits_frames", "digits"] if stage == "tokenizer" else ["digits"]
    for name, fit in zip(names, fits, strict=True):
        experiment = f"experiments/{stage}/{name}.yaml"
        assert (ROOT / experiment).is_file()
        assert fit.split() == [
            *("ENV/bin/grn", "fit", "-c", "experiments/_base/cpu.yaml", "-c", experiment),
            "--trainer.max_steps=20",
        ]


def test_an_own_experiment_needs_no_embedded_data() -> None:
    (fit,) = _plan("train-t2v", "CONFIG=mine.yaml", "BASE=")
    assert fit.split() == ["ENV/bin/grn", "fit", "-c", "mine.yaml"]


def test_evaluation_takes_run_data_and_options() -> None:
    command = _plan("evaluate")[-1]
    assert command.startswith("ENV/bin/grn evaluate runs/t2v-digits data/digits/clips ")
    (command,) = _plan("evaluate", "RUN=runs/a", "DATA=data/b", "ARGS=--seed 3")
    assert command.split()[1:] == ["evaluate", "runs/a", "data/b", "--seed", "3"]


def test_clips_are_drawn_as_the_experiment_says() -> None:
    experiment = yaml.safe_load((ROOT / "experiments" / "t2v" / "digits.yaml").read_text())
    options = [callback.get("init_args", {}) for callback in experiment["trainer"]["callbacks"]]
    (refine,) = {tuple(o["refine"].items()) for o in options if "refine" in o}
    words = [word for key, value in refine for word in (f"--refine.{key}", str(value))]
    for target in ("sample", "evaluate", "demo"):
        assert " ".join(words) in "\n".join(_plan(target))


def test_the_demo_trains_and_judges_before_it_reports() -> None:
    commands = [line.split()[1] for line in _plan("demo", "-j4") if line.startswith("ENV/bin/grn")]
    assert commands == ["digits", "fit", "fit", "evaluate", "fit", "evaluate", "report"]


def test_check_is_lint_and_all_tests() -> None:
    assert _plan("check") == _plan("lint") + _plan("test") + _plan("test-scale")


def test_every_test_belongs_to_one_of_both_targets() -> None:
    [fast], [scale] = _plan("test"), _plan("test-scale")
    assert fast.rstrip().endswith("-m 'not scale'")
    assert scale.rstrip().endswith("-m scale")


def test_setup_is_done_once_and_again_when_the_dependencies_change(tmp_path: Path) -> None:
    stamp = tmp_path / ".installed"
    assert "venv" in _make("-n", f"VENV={tmp_path}", "setup")
    stamp.touch()
    assert "venv" not in _make("-n", f"VENV={tmp_path}", "setup")
    assert "venv" in _make("-n", "-W", "pyproject.toml", f"VENV={tmp_path}", "setup")


def test_an_old_interpreter_is_refused_in_one_sentence(tmp_path: Path) -> None:
    old = tmp_path / "python"
    code = "import sys; sys.version_info = (3, 9); $2"
    old.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}"\n')
    old.chmod(0o755)
    result = _run("setup", f"VENV={tmp_path}", f"PYTHON={old}")
    assert result.returncode != 0
    assert "Python 3.11 or newer is needed" in result.stderr
    assert not (tmp_path / "bin").exists()


def test_nothing_is_deleted() -> None:
    assert not re.search(r"\b(rm|rmdir|unlink|git clean)\b|-delete", MAKEFILE.read_text())
