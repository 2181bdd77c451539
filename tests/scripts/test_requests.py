"""Sizes by preset, aspect and seconds: what is asked for, what is usual, what contradicts."""

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grn_lightning.models.pretrained import write_pretrained
from grn_lightning.models.tokenizer import TokenizerConfig
from grn_lightning.models.variants import GRN_TEXT, TOKENIZERS
from grn_lightning.models.vq_tokenizer import VQTokenizer, VQTokenizerConfig
from grn_lightning.samplers import RefineConfig
from grn_lightning.samplers.presets import get_preset
from grn_lightning.scripts.opening import AUTO, Opened, open_drawer
from grn_lightning.scripts.requests import SizeRequest, read_picture
from tests.tiny_runs import TINY_TOKENIZER

NOTHING = SizeRequest(None, None, None, None, None)


def opened(weights: str | None = None, tokenizer: TokenizerConfig = TOKENIZERS["joint-64d"]) -> Any:
    """A drawer of which only the sizes matter."""
    pipeline: Any = SimpleNamespace(
        tokenizer=SimpleNamespace(config=tokenizer),
        generator=SimpleNamespace(config=GRN_TEXT["2b"]),
        latent_grid=tokenizer.latent_shape,
        sampling=RefineConfig(num_steps=7),
    )
    return Opened(pipeline, Path("x"), None, weights)


@pytest.mark.parametrize(
    ("weights", "asked", "picture", "size"),
    [
        ("t2v-2b", {}, None, (33, 480, 848)),
        ("t2i-2b", {}, None, (1, 1024, 1024)),
        ("t2v-2b", {"seconds": 5}, None, (81, 480, 848)),
        ("t2v-2b", {"preset": "0.25M", "aspect": "9:16", "seconds": 2}, None, (33, 688, 384)),
        ("t2v-2b", {"preset": "0.25M"}, None, (33, 384, 688)),
        ("t2v-2b", {"aspect": "4:3"}, None, (33, 560, 736)),
        ("t2v-2b", {"num_frames": 5, "image_size": 256}, None, (5, 256, 256)),
        ("t2v-2b", {}, (600, 610), (33, 640, 640)),  # a picture brings its aspect
        ("t2v-2b", {"aspect": "16:9"}, (600, 610), (33, 480, 848)),
        (None, {"preset": "0.06M", "seconds": 1}, None, (17, 256, 256)),
        (None, {"preset": "0.06M", "seconds": 10}, None, (161, 256, 256)),  # no limit is known
    ],
)
def test_a_size_is_asked_for_or_usual(
    weights: str | None, asked: Any, picture: Any, size: tuple[int, int, int]
) -> None:
    image = None if picture is None else torch.zeros(3, *picture, dtype=torch.uint8)
    found = replace(NOTHING, **asked).resolve(opened(weights), fps=16, picture=image)
    assert tuple(found) == size


@pytest.mark.parametrize(
    ("weights", "asked", "match"),
    [
        (None, {"num_frames": 0}, "`num_frames` must be at least 1, got 0"),
        (None, {"num_frames": 1, "image_size": 0}, "`image_size` must be at least 1, got 0"),
        (None, {"num_frames": 1, "image_size": (8, -8)}, "`image_size` must .* 1, got -8"),
        (None, {"seconds": 1, "num_frames": 5}, "either `--seconds` or `--num_frames`"),
        (None, {"preset": "1M", "image_size": 64}, "either `--preset` .* or `--image_size`"),
        (None, {"aspect": "1:1", "seconds": 1}, "`--aspect` needs a resolution: `--preset`"),
        (None, {"preset": "1M"}, "give `--num_frames`"),
        ("t2v-2b", {"seconds": 6}, "at most 5 at 16 frames per second"),
        ("t2v-2b", {"preset": "1G"}, "unknown resolution preset '1G'"),
    ],
)
def test_sizes_that_cannot_be_meant_are_refused(weights: Any, asked: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(NOTHING, **asked).resolve(opened(weights), fps=16, picture=None)


def test_presets_are_for_the_published_stride() -> None:
    tiny = opened(tokenizer=TokenizerConfig(**TINY_TOKENIZER))
    with pytest.raises(ValueError, match="16 pixels per latent position, this one has 8"):
        replace(NOTHING, preset="0.06M", seconds=1).resolve(tiny, fps=16, picture=None)


def test_settings_come_with_the_weights_and_options_beat_them() -> None:
    plain = RefineConfig()
    assert opened().sampling(AUTO, plain, "video").num_steps == 7
    first = opened("t2v-2b").sampling(AUTO, plain, "video")
    assert first == get_preset("t2v-first")
    given = RefineConfig(num_steps=20, temperature=0.9)
    assert opened("t2v-2b").sampling(AUTO, given, "video") == replace(
        first, num_steps=20, temperature=0.9
    )
    assert opened().sampling("c2i-l", plain, "class") == get_preset("c2i-l")
    with pytest.raises(ValueError, match="unknown sampling preset 'c2i-z'"):
        opened().sampling("c2i-z", plain, "class")


def test_one_thing_is_opened(tmp_path: Path) -> None:
    for checkpoint, weights in ((None, None), (tmp_path, "t2v-2b")):
        with pytest.raises(ValueError, match="give either a checkpoint, run or export, or"):
            open_drawer(checkpoint, weights, folder=tmp_path, tokenizer=None)
    with pytest.raises(ValueError, match="no published weights are called 't2v'"):
        open_drawer(None, "t2v", folder=tmp_path, tokenizer=None)
    codebook = tmp_path / "codebook"
    network = VQTokenizer(VQTokenizerConfig(codebook_size=4, codebook_dim=2, width=32))
    info = {"kind": "tokenizer", "config": {"tokenizer": asdict(network.config)}}
    write_pretrained(codebook, {"tokenizer": network}, info)
    with pytest.raises(ValueError, match="'t2v-2b' refines codes of an HBQ.* is a VQTokenizer; l"):
        open_drawer(None, "t2v-2b", folder=tmp_path, tokenizer=codebook)
    with pytest.raises(ValueError, match="no picture at"):
        read_picture(tmp_path / "none.png")
