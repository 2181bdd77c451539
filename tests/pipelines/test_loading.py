"""`grn_lightning.load` of exports: whole generators, and those of which a part is not at hand."""

from pathlib import Path

import pytest
import torch

import grn_lightning
from grn_lightning.models.grn_class import GRNClass, GRNClassConfig
from grn_lightning.models.grn_text import GRNText, GRNTextConfig, TextCondition
from grn_lightning.models.hashes import weights_hash
from grn_lightning.models.pretrained import write_pretrained
from grn_lightning.models.text_encoder import TextEncoderConfig
from grn_lightning.models.tokenizer import HBQTokenizer, TokenizerConfig
from grn_lightning.pipelines import GeneratorPipeline
from grn_lightning.pipelines.loading import LonePipeline
from grn_lightning.samplers import RefineConfig
from grn_lightning.samplers.stopping import AdaptiveSteps
from tests.official_files import random_state
from tests.tiny_runs import TINY_CLASS, TINY_ENCODER, TINY_TEXT, TINY_TOKENIZER

TOKENIZER = TokenizerConfig(**TINY_TOKENIZER)
CLASS = GRNClassConfig(**TINY_CLASS | {"grid_size": (2, 2)})
TEXT = GRNTextConfig(**TINY_TEXT)
ENCODER = TextEncoderConfig(**TINY_ENCODER)


@pytest.fixture
def tokenizer() -> HBQTokenizer:
    return HBQTokenizer(TOKENIZER).eval()


def write(path: Path, config: GRNClassConfig | GRNTextConfig, **info) -> None:
    model = GRNClass(config) if isinstance(config, GRNClassConfig) else GRNText(config)
    model.load_state_dict(random_state(model))
    said = {"kind": "generator", "config": {"generator": config}, **info}
    write_pretrained(path, {"generator": model}, said)


def test_a_generator_whose_tokenizer_nobody_knows_gives_logits_and_elements(tmp_path):
    write(tmp_path / "x", CLASS)
    loaded = grn_lightning.load(tmp_path / "x")
    assert isinstance(loaded, LonePipeline)
    logits = loaded.generator(torch.zeros(1, 8, 2, 2).long(), torch.zeros(1), torch.tensor([1]))
    assert logits.shape == (1, 8, 2, 2, 2)
    result = loaded.sample(
        loaded.condition({"class_labels": [3]}),
        torch.arange(1),
        grid=(2, 2),
        config=RefineConfig(num_steps=2),
    )
    assert result.codes.shape == (1, 8, 2, 2)
    assert list(loaded.hashes) == ["generator"]
    assert loaded.to("cpu") is loaded
    for use in (
        lambda: loaded.detokenize(result.codes),
        lambda: loaded.latent_grid(1, 16, 16),
        lambda: loaded.tokenize(torch.zeros(1, 3, 1, 16, 16)),
    ):
        with pytest.raises(ValueError, match="was loaded without its tokenizer.*as `tokenizer`"):
            use()


def test_a_text_generator_without_its_encoder_takes_features(tokenizer, tmp_path):
    write(tmp_path / "x", TEXT)
    loaded = grn_lightning.load(tmp_path / "x", tokenizer)
    assert isinstance(loaded, LonePipeline)
    with pytest.raises(ValueError, match="was loaded without its text encoder.*as the condition"):
        loaded.condition({"captions": ["two"]})
    text = TextCondition(torch.randn(1, 4, 16), torch.ones(1, 4, dtype=torch.bool))
    drawn = loaded.draw(
        text,
        torch.arange(1),
        size=(5, 16, 16),
        config=RefineConfig(num_steps=2),
        null_condition=text,
    )
    assert drawn.clips.shape == (1, 3, 5, 16, 16)
    assert set(loaded.hashes) == {"generator", "tokenizer"}
    whole = grn_lightning.load(tmp_path / "x", tokenizer, text_encoder=ENCODER)
    assert type(whole) is GeneratorPipeline
    with pytest.raises(
        ValueError, match="`generator.text_channels` must be the text encoder's wid"
    ):
        grn_lightning.load(tmp_path / "x", text_encoder=TextEncoderConfig(width=32))


def test_parts_that_do_not_fit_are_refused(tmp_path):
    write(tmp_path / "x", CLASS)
    other = HBQTokenizer(TokenizerConfig(**TINY_TOKENIZER | {"latent_channels": 3}))
    with pytest.raises(
        ValueError, match=r"`num_elements`, `alphabet_size`\) must be .*got \(8, 2\)"
    ):
        grn_lightning.load(tmp_path / "x", other)


def test_an_unknown_tokenizer_is_not_guessed_from_the_folder(tokenizer, tmp_path):
    said = {"kind": "tokenizer", "config": {"tokenizer": TOKENIZER}}
    write_pretrained(tmp_path / "t", {"tokenizer": tokenizer}, said)
    write(tmp_path / "x", CLASS, tokenizer_hash=None)
    write(tmp_path / "y", CLASS, tokenizer_hash=weights_hash(tokenizer))
    assert isinstance(grn_lightning.load(tmp_path / "x"), LonePipeline)
    assert type(grn_lightning.load(tmp_path / "y")) is GeneratorPipeline
    assert type(grn_lightning.load(tmp_path / "x", tmp_path / "t")) is GeneratorPipeline


def test_recommended_settings_are_those_of_the_export(tokenizer, tmp_path):
    wanted = RefineConfig(
        guidance_scale=2.0,
        guidance_schedule="interval",
        guidance_interval=(0.25, 1.0),
        adaptive=AdaptiveSteps(slope=700.0, offset=-620.0, min_steps=20),
    )
    write(tmp_path / "x", CLASS, sampling=wanted)
    write(tmp_path / "y", CLASS, sampling={"num_steps": 7, "calibration": {"mean": 0.5}})
    write(tmp_path / "z", CLASS, sampling={"num_leaps": 7})
    assert grn_lightning.load(tmp_path / "x", tokenizer).sampling == wanted
    assert grn_lightning.load(tmp_path / "y", tokenizer).sampling == RefineConfig(num_steps=7)
    with pytest.raises(ValueError, match="no settings of sampling: .*num_leaps"):
        grn_lightning.load(tmp_path / "z", tokenizer)
    write(tmp_path / "w", CLASS, sampling=[1])
    with pytest.raises(ValueError, match=r"w.json': no settings of sampling: \[1\]"):
        grn_lightning.load(tmp_path / "w", tokenizer)
