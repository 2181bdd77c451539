"""What docs/data.md tells to do can be done, on tiny data; a training is built and not run."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from grn_lightning.media.images import encode_png
from grn_lightning.media.video import encode_mp4
from tests.scripts.conftest import Runs
from tests.tiny_runs import call_grn

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line
    for kind, text in BLOCKS
    for line in text.replace("\\\n", " ").splitlines()
    if kind == "" and line.startswith("grn ")
]


@pytest.fixture
def home(trained: Runs, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout in which data and run of the page's names are tiny ones."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    shutil.copytree(trained.tokenizer, tmp_path / "runs" / "tokenizer-digits")
    (tmp_path / "videos").mkdir()
    clip = torch.randint(256, (5, 3, 24, 32), dtype=torch.uint8)
    for name in ("VIDEO.mp4", "videos/one.mp4", "videos/two.mp4"):
        (tmp_path / name).write_bytes(encode_mp4(clip, fps=8))
    (tmp_path / "PICTURE.png").write_bytes(encode_png(clip[0]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path


def test_every_command_runs(home: Path) -> None:
    assert len(COMMANDS) == 7
    for command in COMMANDS:
        # One process, since a pair would start this test again; and as many samples as there are.
        tiny = command.replace("~", str(home)).replace("--devices 2", "--devices 1")
        words = shlex.split(tiny.replace("--num_samples 100", "--num_samples 6"))[1:]
        if words[0] != "fit":
            call_grn(*words)
            continue
        with pytest.raises(SystemExit) as stop:
            call_grn(*words, "--print_config")
        assert stop.value.code == 0
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, "docs/data.md", "exec"), {})


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link


def test_every_option_that_is_named_exists(capsys: pytest.CaptureFixture[str]) -> None:
    named = set(re.findall(r"`--(\w+)", PAGE))
    known = set()
    for tool in ("shards", "encode", "evaluate", "reconstruct"):
        with pytest.raises(SystemExit):
            call_grn(tool, "--help")
        known |= set(re.findall(r"--(\w+)", capsys.readouterr().out))
    assert named <= known
