"""The commands of docs/sampling.md, one after the other, with tiny runs for real ones."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.scripts.conftest import Runs
from tests.tiny_runs import call_grn

ROOT = Path(__file__).parents[2]
LESSON = ROOT / "docs" / "sampling.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CHEAP = {
    "--refine.num_steps 16": "--refine.num_steps 2",
    "[16,0,16,32]": "[8,0,8,16]",
    "--steps.min_steps 10": "--steps.min_steps 10 --num_samples 6",
}


def commands() -> list[str]:
    text = LESSON.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [
        line
        for language, block in BLOCK.findall(text)
        if not language
        for line in block.splitlines()
    ]
    return [" ".join(line.split()) for line in lines]


def test_every_command_of_the_lesson_runs(
    trained: Runs, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained.text, "runs/t2v-digits")
    shutil.copytree(digits, "data/digits")
    told = commands()
    assert len(told) == 12
    ran = []
    for command in told:
        for long, short in CHEAP.items():
            command = command.replace(long, short)
        # The tiny shard has six clips; which of them is shown does not matter here.
        command = re.sub(r"clips/000000\d\d\.mp4", "clips/00000001.mp4", command)
        words = shlex.split(command)
        if words[0] in ("mkdir", "tar"):
            subprocess.run(words, check=True)
        elif words[1] != "predict":  # has a test of its own: tests/lit/test_predictions.py
            report = call_grn(*words[1:])
            ran.append(words[1])
            if words[1] == "calibrate":
                assert report.file.is_file()
                continue
            assert all(file.is_file() for file in report.files)
            if words[1] == "replay":
                assert report.same == report.compared == 1
    assert ran == ["sample", "replay", *["edit"] * 5, "calibrate", "sample"]


def test_pictures_of_the_lesson_are_there_and_small() -> None:
    pictures = re.findall(r"\((images/[^)]+)\)", LESSON.read_text(encoding="utf-8"))
    assert len(pictures) == 8
    for picture in pictures:
        assert (LESSON.parent / picture).stat().st_size < 150_000, picture
