"""The commands of docs/judging.md, one after the other, with tiny runs for real ones."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from grn_lightning.lit.callbacks import EvaluateSamples
from grn_lightning.scripts.evaluate_samples import SetReport
from tests.scripts.conftest import Runs
from tests.tiny_runs import call_grn

PAGE = (Path(__file__).parents[2] / "docs" / "judging.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^(<!-- not run.*\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CHEAP = {
    "--refine.num_steps 16": "--refine.num_steps 2",
    "--num_samples 500": "--num_samples 20",
    "--num_samples 200": "--num_samples 6",
    "--keep 200": "--keep 5",
}


def commands() -> list[str]:
    return [
        " ".join(line.split())
        for mark, language, block in BLOCK.findall(PAGE)
        if not mark and not language
        for line in block.replace("\\\n", " ").splitlines()
    ]


def tags(report: object) -> set[str]:
    """What stands before the numbers of a report."""
    return set(re.findall(r"^(\w[^=\n]*\])=", str(report), re.MULTILINE))


def test_every_command_of_the_page_runs(
    trained: Runs, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained.text, "runs/t2v-digits")
    shutil.copytree(trained.classes, "runs/c2i-digits")
    shutil.copytree(digits, "data/digits")
    told = commands()
    assert len(told) == 8
    judged: list[SetReport] = []
    for command in told:
        for long, short in CHEAP.items():
            command = command.replace(long, short)
        words = shlex.split(command)
        if words[0] == "printf":
            subprocess.run(["bash", "-c", command], check=True)
            continue
        report = call_grn(*words[1:])
        if words[2] == "samples":
            judged.append(report)

    shown, _, again = judged
    assert [str(one) for one in shown.measurements] == [str(one) for one in again.measurements]
    assert again.folder == shown.folder
    printed = re.findall(r"^([\w ]+)\[digits-cnn,500\]=", PAGE, re.MULTILINE)
    assert [tag.split("[")[0] for tag in map(str, shown.measurements)] == printed[:-1]
    assert {f"{name}[digits-cnn,20]" for name in printed} <= tags(shown)

    lines = re.findall(r"^(runs/(?:geneval|vbench)\S*(?: \S+)*\.\w+)", PAGE, re.MULTILINE)
    assert len(lines) == 4
    assert all(Path(line).is_file() for line in lines), lines
    assert len(list(Path("runs/vbench/videos").iterdir())) == 10
    assert [p.name for p in Path("runs/geneval/images").iterdir()] in (
        ["00000", "00001"],
        ["00001", "00000"],
    )


def test_the_callback_of_the_page_has_these_settings() -> None:
    [block] = [text for _, language, text in BLOCK.findall(PAGE) if language == "yaml"]
    [settings] = yaml.safe_load(block)
    arguments = settings["init_args"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(EvaluateSamples, skip={"extractor"})
    parser.parse_object({key: value for key, value in arguments.items() if key != "extractor"})
    assert settings["class_path"].endswith("callbacks.EvaluateSamples")
