"""UMT5 in the published layout: against a plain implementation, a real tokenizer, and its rules.

Nothing is downloaded: weights are random and tiny, the tokenizer is trained here on five lines.
"""

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from grn_lightning.models.feature_cache import FeatureCache
from grn_lightning.models.text_encoder import TextEncoderConfig, build_text_encoder
from tests.umt5_files import HEADS, LAYERS, TEXT, VOCABULARY, WIDTH, random_weights, write_umt5

pytest.importorskip("transformers", reason="needs the extra 'umt5'")
spm = pytest.importorskip("sentencepiece", reason="needs the extra 'umt5'")

from grn_lightning.models.umt5 import (  # noqa: E402 behind the skips
    UMT5TextEncoder,
    assign_umt5,
    build_umt5,
    clean_caption,
    read_umt5,
    umt5_names,
    umt5_sizes,
)

XXL = {
    "vocab_size": 256_384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10_240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The encoder file and the tokenizer's folder."""
    folder = tmp_path_factory.mktemp("umt5")
    write_umt5(folder)
    return folder


@pytest.fixture(scope="module")
def config(files):
    return TextEncoderConfig(
        architecture="umt5",
        checkpoint=str(files / "encoder.pth"),
        tokenizer=str(files / "umt5-tiny"),
        context_length=24,
    )


@pytest.fixture
def encoder(config) -> UMT5TextEncoder:
    encoder = build_text_encoder(config)
    assert isinstance(encoder, UMT5TextEncoder)
    return encoder


# ------------------------------------------------------------------------------------- the network


def bucket(distance: int) -> int:
    """Which of 32 buckets `key - query` falls into: 16 for each direction, 8 of them exact."""
    start = 16 if distance > 0 else 0
    distance = abs(distance)
    if distance < 8:
        return start + distance
    return start + min(15, 8 + int(math.log(distance / 8) / math.log(128 / 8) * 8))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def plain_encoder(weights: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """Features `(l, d)` of one caption without padding, in float64, from the published names."""
    w = {name: x.double() for name, x in weights.items()}
    x = w["token_embedding.weight"][tokens]
    places = range(len(tokens))
    for i in range(LAYERS):
        block = f"blocks.{i}."
        normed = rms(x, w[f"{block}norm1.weight"])
        q, k, v = (normed @ w[f"{block}attn.{part}.weight"].T for part in "qkv")
        table = w[f"{block}pos_embedding.embedding.weight"]
        bias = torch.stack([torch.stack([table[bucket(b - a)] for b in places]) for a in places])
        heads = []
        for head in range(HEADS):
            mine = slice(head * 16, head * 16 + 16)
            scores = q[:, mine] @ k[:, mine].T + bias[:, :, head]  # not scaled
            heads.append(scores.softmax(-1) @ v[:, mine])
        x = x + torch.cat(heads, -1) @ w[f"{block}attn.o.weight"].T
        normed = rms(x, w[f"{block}norm2.weight"])
        gate = gelu(normed @ w[f"{block}ffn.gate.0.weight"].T)
        x = x + (gate * (normed @ w[f"{block}ffn.fc1.weight"].T)) @ w[f"{block}ffn.fc2.weight"].T
    return rms(x, w["norm.weight"])


@pytest.mark.parametrize("length", [1, 2, 9, 200], ids="{} tokens".format)
def test_features_are_those_of_the_published_equations(length):
    weights = random_weights()
    tower = build_umt5(umt5_sizes(weights))
    assign_umt5(tower, weights, "weights")
    tokens = torch.randint(2, VOCABULARY, (length,)).tolist()
    expected = plain_encoder(weights, tokens)
    found = tower(input_ids=torch.tensor([tokens])).last_hidden_state[0].double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_captions_of_all_lengths_together_have_the_features_that_each_has_alone(encoder):
    captions = [*TEXT, "", "cat " * 40]
    tokens = encoder.tokenize(captions)
    embeds, mask = encoder(tokens)
    assert embeds.shape == (7, 24, WIDTH)
    assert embeds.dtype == torch.float32
    assert mask.sum(1).tolist()[-2:] == [1, 24]  # the end token alone, and as many as there are
    for row in range(7):
        expected = plain_encoder(random_weights(), tokens[row][mask[row]].tolist())
        torch.testing.assert_close(embeds[row][mask[row]].double(), expected, rtol=0, atol=2e-5)
    assert not embeds[~mask].any()


def test_the_published_size_has_the_published_tensors():
    tower = build_umt5(XXL)
    tensors = tower.state_dict()
    assert len(tensors) == len(umt5_names(24)) == 242
    assert set(tensors) == set(umt5_names(24).values())
    assert sum(x.numel() for x in tensors.values()) == 5_680_910_336
    assert all(x.is_meta for x in tensors.values())


# ------------------------------------------------------------------------------------- the text


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("  a\t cat \n", "a cat"),
        ("cats &amp;amp; dogs", "cats & dogs"),
        ("&lt;b&gt;", "<b>"),
        ("schÃ¶n", "schön"),
        ("a&nbsp;&nbsp;cat", "a cat"),
        ("", ""),
    ],
)
def test_captions_are_mended(caption, cleaned):
    assert clean_caption(caption) == cleaned


def test_tokens_are_those_of_sentencepiece_and_end_with_the_end_token(encoder, files):
    pieces = spm.SentencePieceProcessor(model_file=str(files / "umt5-tiny" / "spiece.model"))
    tokens = encoder.tokenize([*TEXT, " the   digit&#32;two ", "", "dog " * 40])
    captions = [*TEXT, "the digit two", "", ("dog " * 40).strip()]
    for row, caption in zip(tokens.tolist(), captions, strict=True):
        expected = [*pieces.encode(caption)[:23], 1]
        assert row == expected + [0] * (24 - len(expected))


# ------------------------------------------------------------------------------------- the weights


def test_a_file_in_the_layout_of_transformers_is_the_same_encoder(encoder, config, tmp_path):
    weights, names = random_weights(), umt5_names(LAYERS)
    theirs = {f"encoder.{names[name]}": x for name, x in weights.items()}
    theirs["shared.weight"] = theirs.pop("encoder.embed_tokens.weight")
    save_file(theirs, tmp_path / "model.safetensors")
    read = read_umt5(tmp_path / "model.safetensors")
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], x) for name, x in weights.items())
    path = str(tmp_path / "model.safetensors")
    other = build_text_encoder(dataclasses.replace(config, checkpoint=path))
    other.load_state_dict(encoder.state_dict())  # the same weights


def test_weights_stay_in_their_file_until_a_new_caption_comes(config, tmp_path):
    config = dataclasses.replace(config, feature_cache=str(tmp_path), keep_loaded=False)
    encoder = build_text_encoder(config)
    assert not encoder.is_loaded
    expected = encoder(encoder.tokenize(TEXT))
    assert not encoder.is_loaded
    again = build_text_encoder(dataclasses.replace(config, keep_loaded=True))
    found = again(again.tokenize([*reversed(TEXT)]))
    assert not again.is_loaded  # a second process needs no weights for known captions
    assert torch.equal(found.embeds.flip(0), expected.embeds)
    again(again.tokenize(["a new one"]))
    assert again.is_loaded


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_are_mapped_and_neither_read_nor_copied(config, tmp_path, suffix):
    path = tmp_path / f"encoder.{suffix}"
    (torch.save if suffix == "pth" else save_file)(random_weights(), path)
    encoder = build_text_encoder(dataclasses.replace(config, checkpoint=str(path)))
    pointers = [x.data_ptr() for x in encoder.tower.parameters()]
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [[int(x, 16) for x in line[0].split("-")] for line in lines if line[-1] == str(path)]
    assert ranges
    assert all(any(low <= p < high for low, high in ranges) for p in pointers)


def test_the_network_is_no_part_of_the_module(encoder):
    encoder(encoder.tokenize(["a cat"]))
    assert encoder.is_loaded
    assert [*encoder.state_dict()] == ["fingerprint"]
    assert not [*encoder.parameters()]
    encoder.to("meta")  # moving the module does not move what it found
    assert next(encoder.tower.parameters()).device.type == "cpu"


def test_the_null_prompt_is_encoded_once(encoder):
    calls = []
    encoder.tower.register_forward_hook(lambda *_: calls.append(None))
    for captions in (["", ""], ["", "a cat"], ["a cat", ""]):
        encoder(encoder.tokenize(captions))
    assert len(calls) == 2


def test_features_found_in_validation_serve_training(encoder):
    with torch.inference_mode():
        encoder(encoder.tokenize(["a cat"]))
    weight = torch.ones(WIDTH, requires_grad=True)
    (encoder(encoder.tokenize(["a cat", "a dog"])).embeds * weight).sum().backward()
    assert weight.grad is not None


def test_bfloat16_weights_compute_in_bfloat16_and_give_float32(config, tmp_path):
    weights = {name: x.bfloat16() for name, x in random_weights().items()}
    torch.save(weights, tmp_path / "encoder.pth")
    encoder = build_text_encoder(
        dataclasses.replace(config, checkpoint=str(tmp_path / "encoder.pth"))
    )
    with torch.autocast("cpu", dtype=torch.float16):
        tokens = encoder.tokenize(TEXT[:1])
        embeds, mask = encoder(tokens)
    assert embeds.dtype == torch.float32
    assert torch.equal(embeds, embeds.bfloat16().float())
    expected = plain_encoder(weights, tokens[0][mask[0]].tolist())
    torch.testing.assert_close(embeds[0][mask[0]].double(), expected, rtol=0, atol=0.2)


def test_the_state_of_another_encoder_is_refused(encoder, config, tmp_path):
    weights = random_weights()
    weights["blocks.1.attn.q.weight"] *= 1.01
    torch.save(weights, tmp_path / "encoder.pth")
    other = build_text_encoder(
        dataclasses.replace(config, checkpoint=str(tmp_path / "encoder.pth"))
    )
    with pytest.raises(ValueError, match=r"text features were made by the UMT5 encoder [0-9a-f]+"):
        encoder.load_state_dict(other.state_dict())


# ------------------------------------------------------------------------------------- refusals


def spoil_missing(weights):
    del weights["blocks.1.attn.q.weight"]


def spoil_surplus(weights):
    weights["decoder.norm.weight"] = torch.ones(2)


def spoil_shape(weights):
    weights["blocks.1.attn.q.weight"] = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_missing, r"is not the file of a UMT5 encoder; .*\n  unexpected  blocks.1.norm1"),
        (spoil_surplus, r"1 of its tensors differ.\n  unexpected  decoder.norm.weight"),
        (spoil_shape, r"other shape blocks.1.attn.q.weight \(2, 2\), expected \(48, 24\)"),
        (dict.clear, "is not the file of a UMT5 encoder"),
    ],
)
def test_a_file_of_something_else_is_refused_by_its_tensors(config, tmp_path, spoil, message):
    weights = random_weights()
    spoil(weights)
    torch.save(weights, tmp_path / "encoder.pth")
    path = str(tmp_path / "encoder.pth")
    with pytest.raises(ValueError, match=message):
        build_text_encoder(dataclasses.replace(config, checkpoint=path)).tower.eval()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": None}, "architecture 'umt5' needs tokenizer"),
        ({"checkpoint": None}, "architecture 'umt5' needs a checkpoint"),
        ({"context_length": 513}, "context_length must be at most 512 with 'umt5', got 513"),
        (
            {"architecture": "tiny", "checkpoint": None},
            "tokenizer is for architecture 'umt5' only, got '.*' with 'tiny'",
        ),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("checkpoint", "must be the file of the UMT5 encoder.*does not exist"),
        ("tokenizer", "must be the folder of the UMT5 tokenizer"),
    ],
)
def test_files_that_are_not_there_are_named(config, field, message):
    with pytest.raises(ValueError, match=message):
        build_text_encoder(dataclasses.replace(config, **{field: "nowhere"}))


def test_a_file_that_is_no_checkpoint_is_refused(config, tmp_path):
    (tmp_path / "encoder.pth").write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match="cannot be mapped as weights"):
        build_text_encoder(dataclasses.replace(config, checkpoint=str(tmp_path / "encoder.pth")))


def test_a_tokenizer_with_more_tokens_than_the_encoder_knows_is_refused(config, tmp_path):
    weights = random_weights()
    weights["token_embedding.weight"] = weights["token_embedding.weight"][:9]
    torch.save(weights, tmp_path / "encoder.pth")
    with pytest.raises(ValueError, match="tokens, but '.*' knows 9; they do not belong together"):
        build_text_encoder(dataclasses.replace(config, checkpoint=str(tmp_path / "encoder.pth")))


def test_without_the_extra_the_message_says_what_to_install(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'grn-lightning\[umt5\]'"):
        build_text_encoder(config)


# ------------------------------------------------------------------------------------- the memory


def test_features_come_back_from_memory_and_from_files_bit_for_bit(tmp_path):
    features = torch.randn(3, 8, dtype=torch.bfloat16)
    cache = FeatureCache("encoder", tmp_path)
    cache.put((4, 5, 1), features)
    for source in (cache, FeatureCache("encoder", tmp_path)):
        found = source.get((4, 5, 1))
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, features)
    assert cache.get((4, 51)) is None
    assert FeatureCache("another", tmp_path).get((4, 5, 1)) is None
    assert not [*tmp_path.rglob("*.[0-9]*")]  # nothing unfinished


def test_memory_is_bounded_and_forgets_what_was_used_least_recently():
    cache = FeatureCache("encoder", memory_bytes=2 * 4 * 8)
    for name in (1, 2):
        cache.put((name,), torch.zeros(1, 8))
    cache.get((1,))
    cache.put((3,), torch.zeros(1, 8))
    assert [cache.get((name,)) is not None for name in (1, 2, 3)] == [True, False, True]


def test_a_damaged_file_of_features_is_named(tmp_path):
    cache = FeatureCache("encoder", tmp_path)
    path = cache.path((1, 2))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="holds no text features .* delete it"):
        cache.get((1, 2))
