"""A generator trained on UMT5 features: the encoder stays in its file, the run remembers which."""

from pathlib import Path
from typing import Any

import pytest
import torch

from grn_lightning.lit.generator import LitGenerator, load_generator
from grn_lightning.models.umt5 import UMT5TextEncoder
from grn_lightning.samplers import RefineConfig
from tests.tiny_runs import call_grn, callback, checkpoints, fit, generator_config
from tests.umt5_files import WIDTH, random_weights, write_umt5

pytest.importorskip("transformers", reason="needs the extra 'umt5'")
pytest.importorskip("sentencepiece", reason="needs the extra 'umt5'")


@pytest.fixture(scope="module")
def run(
    digits: Path, tokenizer_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Folder of a run, and of the files of its encoder."""
    folder, files = tmp_path_factory.mktemp("umt5-run"), tmp_path_factory.mktemp("umt5")
    write_umt5(files)
    encoder: dict[str, Any] = {
        "architecture": "umt5",
        "checkpoint": str(files / "encoder.pth"),
        "tokenizer": str(files / "umt5-tiny"),
        "context_length": 32,
        "feature_cache": str(files / "features"),
    }
    config = generator_config(
        folder,
        digits,
        tokenizer_run,
        kind="text",
        generator={"text_channels": WIDTH},
        init_args={"text_encoder": encoder},
        callbacks=[callback("EMA", decay=0.9), checkpoints(folder, 4)],
    )
    fit(folder, config)  # checks itself before the first step
    return folder, files


def test_a_checkpoint_holds_the_name_of_the_encoder_and_not_its_weights(run):
    folder, files = run
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert [name for name in state if name.startswith("text_encoder.")] == [
        "text_encoder.fingerprint"
    ]
    assert [*(files / "features").rglob("*.safetensors")]


def test_a_loaded_run_draws_from_known_captions_without_the_weights(run):
    module = load_generator(run[0])
    assert isinstance(module, LitGenerator)
    assert isinstance(module.text_encoder, UMT5TextEncoder)
    captions = [""]
    clips = module.draw_clips(
        {"captions": captions},
        torch.arange(1),
        size=(5, 16, 16),
        config=RefineConfig(num_steps=2, guidance_scale=2.0),
        seed=0,
    )
    assert clips.shape == (1, 3, 5, 16, 16)
    assert not module.text_encoder.is_loaded  # the empty caption was met in training


def test_a_run_refuses_other_weights_under_the_same_name(run):
    folder, files = run
    path = files / "encoder.pth"
    weights = random_weights()
    original = path.read_bytes()
    torch.save({name: -x for name, x in weights.items()}, path)
    try:
        with pytest.raises(ValueError, match="text features were made by the UMT5 encoder"):
            load_generator(folder)
    finally:
        path.write_bytes(original)


def test_an_export_refers_to_the_encoder_and_draws_the_same(run, tokenizer_run, tmp_path):
    folder, files = run
    call_grn("export", tokenizer_run, "--out", tmp_path / "tokenizer")
    call_grn("export", folder, "--out", tmp_path / "generator")
    assert (tmp_path / "generator.safetensors").stat().st_size < 2**20
    config = RefineConfig(num_steps=2, guidance_scale=2.0)
    drawn = [
        module.draw_clips(
            {"captions": [""]}, torch.arange(1), size=(5, 16, 16), config=config, seed=0
        )
        for module in (load_generator(folder), load_generator(tmp_path / "generator.safetensors"))
    ]
    torch.testing.assert_close(*drawn)
    path = files / "encoder.pth"
    original = path.read_bytes()
    torch.save({name: -x for name, x in random_weights().items()}, path)
    try:
        with pytest.raises(ValueError, match=r"text encoder|text features were made by"):
            load_generator(tmp_path / "generator.safetensors")
    finally:
        path.write_bytes(original)
