"""docs/pipelines.md, block by block: on tiny runs, and on random files of the official layout."""

import dataclasses
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from grn_lightning import pipelines
from grn_lightning.media.images import encode_png
from grn_lightning.models.grn_class import GRNClass, GRNClassConfig
from grn_lightning.models.grn_text import GRNText, GRNTextConfig
from grn_lightning.models.text_encoder import TextEncoderConfig
from grn_lightning.models.tokenizer import HBQTokenizer, TokenizerConfig
from grn_lightning.pipelines import picture_size, registry
from grn_lightning.pipelines.resolutions import PRESETS
from tests.official_files import random_state, write_official_file
from tests.scripts.conftest import Runs
from tests.tiny_runs import TINY_TEXT, call_grn

PAGE = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Strides and channels of the published networks, at a fraction of their width.
THIN: dict[str, Any] = {"encoder_width": 2, "decoder_width": 2, "num_res_blocks": 1}
CLASS = GRNClassConfig(
    num_elements=16, alphabet_size=16, depth=3, width=16, num_heads=2,
    bottleneck=4, num_context_tokens=2, context_start=1,
)  # fmt: skip
TEXT = GRNTextConfig(**TINY_TEXT | {"num_elements": 256})
FILES: dict[str, tuple[torch.nn.Module, str]] = {
    "HBQ_image_tokenizer_16dim_M4.ckpt": (HBQTokenizer(TokenizerConfig(**THIN)), "ema"),
    "HBQ_tokenizer_64dim_M4.ckpt": (
        HBQTokenizer(TokenizerConfig(latent_channels=64, **THIN)),
        "ema",
    ),
    "GRN_ind_B_ep599.pth": (GRNClass(CLASS), "model_ema1"),
    "GRN_T2V_2B.pth": (GRNText(TEXT), "flat"),
}


@pytest.fixture
def place(trained: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which everything lies where the page says."""
    (tmp_path / "runs").mkdir()
    for run, name in ((trained.text, "t2v-digits"), (trained.classes, "c2i-digits")):
        shutil.copytree(run, tmp_path / "runs" / name)
    (tmp_path / "weights" / "umt5-xxl").mkdir(parents=True)
    for file, (network, layout) in FILES.items():
        write_official_file(tmp_path / "weights" / file, random_state(network), layout)
    (tmp_path / "picture.png").write_bytes(encode_png(torch.zeros(3, 20, 30, dtype=torch.uint8)))
    thin = {
        name: dataclasses.replace(row, variant="auto") for name, row in registry.WEIGHTS.items()
    }
    monkeypatch.setattr(registry, "WEIGHTS", thin)
    monkeypatch.setattr(
        "grn_lightning.pipelines.published.umt5_config",
        lambda place, folder: TextEncoderConfig(width=16, layers=1, context_length=24),
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_can_be_followed(place: Path) -> None:
    said: dict[str, Any] = {}
    answers: dict[str, Any] = {}
    for language, text in BLOCK.findall(PAGE):
        if language == "python":
            exec(text, said)
            continue
        assert language == "sh"
        for line in text.splitlines():
            command = shlex.split(line)
            assert command[0] == "grn"
            short = ["--refine.num_steps=2"] if "--weights" in command else []
            answers[line] = call_grn(*command[1:], *short)

    assert said["drawn"].clips.shape == (2, 3, 9, 32, 32)
    assert said["clips"].shape == (1, 3, 9, 32, 32)
    first = said["pipeline"].first_frame([said["picture"]], size=(32, 32))
    assert said["continued"].elements[:, :, :1].equal(first)
    found = {folder.name: len(list(folder.glob("*.*"))) for folder in (place / "samples").iterdir()}
    assert found == {"clips": 6, "digits": 6, "continued": 4, "boat": 4, "dog": 3}
    assert "4 of 10 in 'weights'" in str(answers["grn weights"])


def test_the_page_s_sizes_are_those_of_the_presets() -> None:
    rows = re.findall(r"^\| `([\d.]+M)` \| (.*) \|$", PAGE, re.MULTILINE)
    assert [name for name, _ in rows] == list(PRESETS)
    for name, cells in rows:
        sizes = [tuple(map(int, cell.split(" x "))) for cell in cells.split(" | ")]
        assert sizes == [picture_size(name, aspect) for aspect in ("1:1", "16:9", "9:16", "4:3")]
    checked = 0
    for call, value in re.findall(r"^(\w+\(.*\))  # (.*)$", PAGE, re.MULTILINE):
        if function := getattr(pipelines, call.split("(")[0], None):
            assert eval(call, {function.__name__: function}) == eval(value.split(": ")[0])
            checked += 1
    assert checked == 4
