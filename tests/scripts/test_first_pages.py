"""docs/quickstart.md, docs/own-data.md and docs/generator.md, command by command, in small."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import grn_lightning
from grn_lightning.lit.generator import CorruptionConfig
from grn_lightning.models.tokenizer import HBQTokenizer
from tests.scripts.conftest import Runs
from tests.tiny_runs import call_grn

ROOT = Path(__file__).parents[2]
QUICKSTART = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
OWN_DATA = (ROOT / "docs" / "own-data.md").read_text(encoding="utf-8")
GENERATOR = (ROOT / "docs" / "generator.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^(<!-- [^>]* -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of every block that is run, or at least resolved."""
    return [
        (language, text)
        for mark, language, text in BLOCK.findall(page)
        if not mark or mark.startswith("<!-- resolved only: ")
    ]


def commands(page: str) -> list[list[str]]:
    """Words behind `grn` of every command that is not marked."""
    lines = [
        line
        for language, text in blocks(page)
        if language == ""
        for line in text.replace("\\\n", " ").splitlines()
    ]
    assert all(line.startswith("grn ") for line in lines)
    return [shlex.split(line)[1:] for line in lines]


@pytest.fixture
def home(trained: Runs, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout in which data and runs of the pages' names are tiny ones."""
    (tmp_path / "data").mkdir()
    shutil.copytree(digits, tmp_path / "data" / "digits")
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    shutil.copytree(trained.tokenizer, tmp_path / "runs" / "tokenizer-digits")
    shutil.copytree(trained.text, tmp_path / "runs" / "t2v-digits")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parses(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        call_grn(*words, "--print_config")
    assert stop.value.code == 0


# --- quickstart.md --------------------------------------------------------------------------------


def test_the_quickstart_can_be_followed(home: Path) -> None:
    ran = []
    for words in commands(QUICKSTART):
        ran.append(words[0])
        if words[0] == "fit":
            parses(words)
        else:
            call_grn(*(word.replace("16", "2") for word in words))
    assert ran == ["sample", "evaluate", "report", "fit"]
    assert (home / "runs" / "lesson" / "first" / "samples.json").is_file()
    assert (home / "runs" / "lesson" / "report.html").is_file()

    (code,) = (text for language, text in blocks(QUICKSTART) if language == "python")
    said: dict[str, Any] = {}
    exec(code.replace("num_steps=16", "num_steps=2"), said)
    assert said["drawn"].clips.shape == (2, 3, 9, 32, 32)


# --- generator.md ---------------------------------------------------------------------------------


@pytest.mark.scale  # parses eight trainings, a second each
def test_the_page_of_generators_can_be_followed(home: Path) -> None:
    ran = []
    for words in commands(GENERATOR):
        ran.append(words[0])
        if words[0] == "encode":
            call_grn(*words, "--accelerator", "cpu")
            assert (home / "data" / "digits-codes" / "clips" / "train.codes.json").is_file()
        elif words[0] == "fit":
            parses(words)
    assert ran == ["fit"] * 4 + ["encode", "fit", "check"] + ["fit"] * 2


def test_what_the_page_of_generators_names_exists() -> None:
    (block,) = (text for language, text in blocks(GENERATOR) if language == "yaml")
    corruption = CorruptionConfig(**yaml.safe_load(block)["corruption"])
    assert corruption == CorruptionConfig()
    for name in re.findall(r"`corruption\.(\w+)`", GENERATOR):
        assert hasattr(corruption, name)
    for file in re.findall(r"`(\w+/\w+\.yaml)`", GENERATOR):
        assert (ROOT / "experiments" / file).is_file(), file


# --- own-data.md ----------------------------------------------------------------------------------

SHORT = {
    "fit": ["--trainer.max_steps=1", "--trainer.enable_progress_bar=false"],
    "encode": ["--accelerator", "cpu"],
    "sample": ["--refine.num_steps=2"],
}
CHEAP = {"image_size: 64": "image_size: 32", "[8, 8]": "[4, 4]", "_width: 32": "_width: 8"}


@pytest.mark.scale  # two trainings, encoding and drawing
def test_own_pictures_become_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    for number in range(40):
        file = tmp_path / "pictures" / f"class-{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 96), (6 * number, 90, 255 - 6 * number)).save(file)
    for language, text in blocks(OWN_DATA):
        if language == "yaml":
            kind = "tokenizer" if "LitTokenizer" in text else "generator"
            for large, small in CHEAP.items():
                assert large in OWN_DATA
                text = text.replace(large, small)
            (tmp_path / f"{kind}.yaml").write_text(text)
            assert f"`{kind}.yaml`" in OWN_DATA

    ran, report = [], None
    for words in commands(OWN_DATA):
        ran.append(words[0])
        result = call_grn(*words, *SHORT.get(words[0], []))
        report = result if words[0] == "check" else report
    assert ran == ["shards", "fit", "evaluate", "encode", "check", "fit", "sample"]
    assert report is not None
    assert report.exit_code == 0

    assert len(list((tmp_path / "samples").glob("*.png"))) == 9  # eight samples and their sheet
    tokenizer = grn_lightning.load("runs/tokenizer-mine")
    assert isinstance(tokenizer, HBQTokenizer)
    codes = tokenizer.tokenize(torch.zeros(1, 3, 1, 64, 64))
    assert codes.shape == (1, 8, 1, 8, 8)  # as the page says of 64 pixels
