"""The text encoder against open_clip itself, on a small random model; nothing is downloaded."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from grn_lightning.models.text_encoder import OpenClipTextEncoder, TextEncoderConfig

CAPTIONS = ["the digit seven moves left", "", "!", "a " * 40]
SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """A real open_clip architecture with random weights: the model and its folder."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "grn-small-clip.json").write_text(json.dumps(SMALL))
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL}))
    open_clip.add_model_config(folder / "grn-small-clip.json")
    torch.manual_seed(0)
    model = open_clip.create_model("grn-small-clip").eval()
    torch.save(model.state_dict(), folder / "weights.pt")
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return model, folder


def config_of(source: str, folder) -> TextEncoderConfig:
    if source == "local-dir":
        return TextEncoderConfig(architecture=f"local-dir:{folder}")
    return TextEncoderConfig(architecture="grn-small-clip", checkpoint=str(folder / source))


@pytest.mark.parametrize("source", ["weights.pt", "open_clip_model.safetensors", "local-dir"])
def test_pooled_features_are_what_open_clip_computes(small_clip, source):
    model, folder = small_clip
    encoder = OpenClipTextEncoder(config_of(source, folder))
    tokens = encoder.tokenize(CAPTIONS)
    assert torch.equal(tokens, open_clip.get_tokenizer("grn-small-clip")(CAPTIONS))
    embeds, mask = encoder(tokens)
    assert embeds.shape == (len(CAPTIONS), 12, encoder.text_channels)
    at_end = embeds[torch.arange(len(CAPTIONS)), mask.sum(1) - 1]
    with torch.no_grad():
        torch.testing.assert_close(
            at_end @ encoder.tower.text_projection, model.encode_text(tokens)
        )


def test_a_loaded_tower_is_frozen_and_comes_without_its_picture_half(small_clip):
    encoder = OpenClipTextEncoder(config_of("weights.pt", small_clip[1]))
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any("visual" in name for name, _ in encoder.named_parameters())


def test_a_shorter_context_leaves_the_remaining_features_as_they_are(small_clip):
    config = config_of("local-dir", small_clip[1])
    whole = OpenClipTextEncoder(config)
    short = OpenClipTextEncoder(
        TextEncoderConfig(architecture=config.architecture, context_length=8)
    )
    captions = ["the digit seven moves left", "a cat"]
    embeds, mask = short(short.tokenize(captions))
    expected = whole(whole.tokenize(captions))
    assert embeds.shape[1] == 8
    torch.testing.assert_close(embeds[mask], expected.embeds[expected.mask])
    with pytest.raises(ValueError, match="context_length must be 12 or less with this tower"):
        OpenClipTextEncoder(TextEncoderConfig(architecture=config.architecture, context_length=13))


def test_the_mask_ends_with_the_end_token():
    encoder = OpenClipTextEncoder(TextEncoderConfig())
    tokens = encoder.tokenize(CAPTIONS)
    condition = encoder(tokens)
    assert condition.embeds.shape == (4, 16, 64)
    assert condition.mask.sum(1).tolist() == [7, 2, 3, 16]
    assert set(tokens[torch.arange(4), condition.mask.sum(1) - 1].tolist()) == {49407}


def test_the_tiny_tower_trains_everything_but_its_vocabulary():
    encoder = OpenClipTextEncoder(TextEncoderConfig(width=32, layers=1))
    encoder(encoder.tokenize(CAPTIONS)).embeds.square().sum().backward()
    without = {name for name, p in encoder.named_parameters() if p.grad is None}
    assert without == {"tower.token_embedding.weight"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "ViT-B-32"}, "'ViT-B-32' needs a checkpoint: the path of a local file"),
        ({"checkpoint": "weights.pt"}, "'tiny' takes no checkpoint, got 'weights.pt'"),
        ({"architecture": "ViT-B-33", "checkpoint": "x"}, "unknown architecture 'ViT-B-33'"),
        (
            {"architecture": "ViT-B-32", "checkpoint": "openai"},
            "must be an existing file with weights of 'ViT-B-32', got 'openai'; .* not downloaded",
        ),
        ({"architecture": "hf-hub:a/b", "checkpoint": "x"}, "'hf-hub:a/b' would be downloaded"),
        ({"architecture": "local-dir:nowhere"}, "no file open_clip_config.json in nowhere"),
        (
            {"architecture": "ViT-B-16-SigLIP", "checkpoint": __file__},
            "'ViT-B-16-SigLIP' has no plain CLIP text tower",
        ),
        ({"architecture": "ViT-S-32-alt", "checkpoint": __file__}, "cannot load the weights of"),
        ({"context_length": 1}, "context_length must be at least 2"),
        ({"width": 30, "heads": 4}, "heads must divide width = 30, got 4"),
    ],
)
def test_what_cannot_be_loaded_from_disk_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        OpenClipTextEncoder(TextEncoderConfig(**arguments))
