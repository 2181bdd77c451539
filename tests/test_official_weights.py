"""The walk of docs/official-weights.md, block by block, on random files of the official layout."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import grn_lightning
from grn_lightning.models.convert import read_official
from grn_lightning.models.grn_class import GRNClass, GRNClassConfig
from grn_lightning.models.tokenizer import HBQTokenizer, TokenizerConfig
from tests.official_files import random_state, write_official_file
from tests.tiny_runs import call_grn, tensors_equal

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "official-weights.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Strides, channels, grid and classes of the published networks, at a fraction of their width.
TOKENIZER = TokenizerConfig(encoder_width=2, decoder_width=2, num_res_blocks=1)
CLASS = GRNClassConfig(
    num_elements=16,
    alphabet_size=16,
    depth=3,
    width=16,
    num_heads=2,
    bottleneck=4,
    num_context_tokens=2,
    context_start=1,
)
SHORT = {"fit": ["--trainer.max_steps=2"], "sample": ["--refine.num_steps=3"]}


def write_weights(folder: Path) -> None:
    files: dict[str, tuple[nn.Module, str]] = {
        "HBQ_image_tokenizer_16dim_M4.ckpt": (HBQTokenizer(TOKENIZER), "ema"),
        "GRN_ind_B_ep599.pth": (GRNClass(CLASS), "model_ema1"),
    }
    folder.mkdir()
    for name, (network, layout) in files.items():
        write_official_file(folder / name, random_state(network), layout)


def write_pictures(folder: Path) -> None:
    """Four pictures of each of two classes."""
    for number in range(8):
        file = folder / f"class-{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (256, 256), (30 * number, 90, 255 - 30 * number)).save(file)


@pytest.mark.slow
def test_the_walk_can_be_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_weights(tmp_path / "weights")
    write_pictures(tmp_path / "pictures")
    shutil.copytree(ROOT / "experiments" / "_base", tmp_path / "experiments" / "_base")
    said: dict[str, Any] = {}
    answers: dict[str, Any] = {}
    for language, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if language == "python":
            exec(text, said)
        elif language == "yaml":
            (tmp_path / "fine-tune.yaml").write_text(text)
        else:
            for line in text.replace("\\\n", " ").splitlines():
                command = shlex.split(line)
                assert command[0] == "grn"
                answers[line] = call_grn(*command[1:], *SHORT.get(command[1], []))

    assert said["codes"].shape == (2, 16, 1, 16, 16)
    assert said["logits"].shape == (2, 16, 16, 16, 16)
    assert said["drawn"].clips.shape == (2, 3, 1, 256, 256)
    assert len(list((tmp_path / "samples").glob("*.png"))) == 3  # two samples and their sheet

    bypassed, acting = (grn_lightning.load(f"weights/{n}") for n in ("bypassed", "tokenizer-16d"))
    assert acting.config == TOKENIZER
    assert not bypassed.config.use_mid_attention  # type: ignore[union-attr]
    started, tuned = (grn_lightning.load(f"weights/{name}") for name in ("c2i-b", "c2i-mine"))
    assert started.config == tuned.config == CLASS
    weights = [model.generator.state_dict() for model in (started, tuned)]  # type: ignore[union-attr]
    moved = [name for name in weights[0] if not weights[0][name].equal(weights[1][name])]
    assert "pos_embed" not in moved
    assert len(moved) > len(weights[0]) / 2
    back = torch.load(tmp_path / "c2i-mine.pth", weights_only=True)
    assert set(back) == {"model", "model_ema1", "model_ema2", "epoch"}
    assert tensors_equal(read_official(tmp_path / "c2i-mine.pth").tensors, weights[1])
