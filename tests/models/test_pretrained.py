"""Exports: what is written is read back, mapped; what is damaged, newer or another's is refused."""

import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from grn_lightning.models.grn_class import GRNClass
from grn_lightning.models.grn_text import GRNText
from grn_lightning.models.hashes import tensors_hash, weights_hash
from grn_lightning.models.pretrained import (
    FORMAT_VERSION,
    assign,
    clean_names,
    export_files,
    is_export,
    read_pretrained,
    write_pretrained,
)
from grn_lightning.models.text_encoder import TextEncoderConfig, build_text_encoder
from grn_lightning.models.tokenizer import HBQTokenizer
from tests.models.test_sizes import CLASS, TEXT, TOKENIZER
from tests.official_files import random_state
from tests.tiny_runs import tensors_equal

ENCODER = TextEncoderConfig(width=16, layers=1, heads=2, context_length=9)
CONFIGS = {"tokenizer": TOKENIZER, "class": CLASS, "text": TEXT}


def network(name: str) -> nn.Module:
    kind = {"tokenizer": HBQTokenizer, "class": GRNClass, "text": GRNText}[name]
    model = kind(CONFIGS[name])
    model.load_state_dict(random_state(model))
    return model


def write(path, name: str, **info) -> nn.Module:
    model = network(name)
    kind = "tokenizer" if name == "tokenizer" else "generator"
    write_pretrained(path, {kind: model}, {"kind": kind, "config": {kind: CONFIGS[name]}, **info})
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_back(name, tmp_path):
    model = write(tmp_path / "deep" / "net.v1", name, tokenizer_hash="0" * 16)
    assert sorted(file.name for file in (tmp_path / "deep").iterdir()) == [
        "net.v1.json",
        "net.v1.safetensors",
    ]
    for path in ("net.v1", "net.v1.json", "net.v1.safetensors"):
        assert is_export(tmp_path / "deep" / path)
    pretrained = read_pretrained(tmp_path / "deep" / "net.v1.safetensors")
    assert pretrained.config() == CONFIGS[name]
    assert pretrained.architecture == type(model).__name__
    read = pretrained.network()
    assert tensors_equal(read.state_dict(), model.state_dict())
    assert not read.training
    assert not any(parameter.requires_grad for parameter in read.parameters())
    part = pretrained.kind
    assert pretrained.info["weights_hash"] == {part: weights_hash(model)}
    own = weights_hash(model) if name == "tokenizer" else "0" * 16
    assert pretrained.tokenizer_hash == own


def test_both_files_may_be_read_by_the_same_people(tmp_path):
    write(tmp_path / "x", "class")
    modes = [(tmp_path / f"x.{kind}").stat().st_mode for kind in ("json", "safetensors")]
    assert modes[0] == modes[1]


def test_tensors_are_mapped_and_not_copied(tmp_path):
    write(tmp_path / "x", "text")
    pretrained = read_pretrained(tmp_path / "x")
    read = pretrained.network()
    for name, parameter in read.named_parameters():
        assert parameter.data_ptr() == pretrained.tensors[f"generator.{name}"].data_ptr()
    before = (tmp_path / "x.safetensors").read_bytes()
    with torch.no_grad():
        read.word_embed.weight.add_(1)  # a private map: the file stays as it is
    assert (tmp_path / "x.safetensors").read_bytes() == before


def test_a_trained_text_encoder_is_part_of_the_export(tmp_path):
    encoder = build_text_encoder(ENCODER)
    config = {"generator": TEXT, "text_encoder": ENCODER}
    modules = {"generator": network("text"), "text_encoder": encoder}
    write_pretrained(tmp_path / "x", modules, {"kind": "generator", "config": config})
    read = read_pretrained(tmp_path / "x").text_encoder()
    assert read is not None
    assert read.config == ENCODER
    assert tensors_equal(read.state_dict(), encoder.state_dict())
    assert not any(parameter.requires_grad for parameter in read.parameters())
    write(tmp_path / "y", "class")
    assert read_pretrained(tmp_path / "y").text_encoder() is None


def test_a_frozen_text_encoder_must_be_the_one_of_the_training(tmp_path):
    torch.manual_seed(1)
    config = {"generator": TEXT, "text_encoder": ENCODER}
    info = {"kind": "generator", "config": config, "text_encoder_hash": "f" * 16}
    write_pretrained(tmp_path / "x", {"generator": network("text")}, info)
    with pytest.raises(ValueError, match=f"trained with text encoder {'f' * 16}, but 'tiny' is "):
        read_pretrained(tmp_path / "x").text_encoder()


# --- names ----------------------------------------------------------------------------------------


def test_wrappers_of_compilers_and_strategies_never_reach_the_disk(tmp_path):
    model = network("text")
    plain = list(model.state_dict())
    model.block_chunks[0].module[1] = torch.compile(model.block_chunks[0].module[1])
    assert list(model.state_dict()) != plain
    info = {"kind": "generator", "config": {"generator": TEXT}}
    write_pretrained(tmp_path / "x", {"generator": model}, info | {"architecture": "GRNText"})
    assert sorted(load_file(tmp_path / "x.safetensors")) == sorted(f"generator.{n}" for n in plain)
    assert read_pretrained(tmp_path / "x").network().config == TEXT


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("_orig_mod.a.w", "a.w"),
        ("module.a.w", "a.w"),
        ("_forward_module.module.generator.a.w", "generator.a.w"),
        ("generator._fsdp_wrapped_module.a._checkpoint_wrapped_module.w", "generator.a.w"),
        ("block_chunks.0.module.1._orig_mod.w", "block_chunks.0.module.1.w"),
    ],
)
def test_names_are_cleaned(wrapped, plain):
    assert list(clean_names({wrapped: torch.zeros(1)})) == [plain]


def test_the_hash_of_tensors_is_that_of_their_module():
    model = network("tokenizer")
    assert tensors_hash(model.state_dict()) == weights_hash(model)


class WithBuffer(nn.Module):
    """A module with a buffer that is computed when it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("table", torch.arange(3.0), persistent=False)


def test_computed_buffers_are_not_left_empty():
    module = assign(WithBuffer, {"weight": torch.ones(2)})
    assert module.table.tolist() == [0, 1, 2]
    assert module.weight.tolist() == [1, 1]


# --- refusals -------------------------------------------------------------------------------------


def test_an_export_is_not_overwritten(tmp_path):
    write(tmp_path / "x", "class")
    before = (tmp_path / "x.json").read_bytes()
    with pytest.raises(ValueError, match="x.json' exists and is not overwritten"):
        write(tmp_path / "x", "class")
    (tmp_path / "x.json").unlink()
    with pytest.raises(ValueError, match="x.safetensors' exists and is not overwritten"):
        write(tmp_path / "x", "class")
    assert b'"kind": "generator"' in before


def change(path, **values) -> None:
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | values))


def test_a_newer_format_is_refused_whatever_else_it_says(tmp_path):
    write(tmp_path / "x", "class")
    (tmp_path / "x.json").write_text(
        json.dumps({"format_version": FORMAT_VERSION + 1, "created_by": "grn_lightning 9.0"})
    )
    match = "has format 2, written by grn_lightning 9.0; .* reads formats up to 1. Install a newer"
    with pytest.raises(ValueError, match=match):
        read_pretrained(tmp_path / "x")


def test_a_damaged_file_is_refused(tmp_path):
    write(tmp_path / "x", "class")
    file = tmp_path / "x.safetensors"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(
        ValueError, match="is damaged, or belongs to another JSON: its generator has"
    ):
        read_pretrained(tmp_path / "x")
    read_pretrained(tmp_path / "x", check=False)
    file.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="x.safetensors' is damaged or unfinished"):
        read_pretrained(tmp_path / "x")
    file.unlink()
    with pytest.raises(
        ValueError, match="no export at '.*x': there is no '.*x.safetensors'. An exp"
    ):
        read_pretrained(tmp_path / "x")


def test_a_tensor_under_two_names_is_written_twice(tmp_path):
    model = network("class")
    model.blocks[1].norm1.weight = model.blocks[0].norm1.weight
    write_pretrained(tmp_path / "x", {"generator": model}, {"kind": "generator", "config": {}})
    found = load_file(tmp_path / "x.safetensors")
    expected = {f"generator.{name}": x for name, x in model.state_dict().items()}
    assert tensors_equal(found, expected)


def test_tensors_of_another_export_are_refused(tmp_path):
    write(tmp_path / "x", "class")
    torch.manual_seed(3)
    other = {name: x + 1 for name, x in load_file(tmp_path / "x.safetensors").items()}
    save_file(other, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="Copy both files again"):
        read_pretrained(tmp_path / "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not the JSON of an export, or damaged: JSONDecodeError"),
        ("[1]", "is not the JSON of an export, or damaged: TypeError"),
        ("{}", "is not the JSON of an export, or damaged: KeyError"),
        ('{"format_version": 1, "kind": "tokenizer", "config": {}}', "it describes no network"),
        ('{"format_version": "2"}', "is not the JSON of an export: it has format '2'"),
        (
            '{"format_version": 1, "kind": "generator", "config": {"generator": null}, '
            '"weights_hash": {"generator": ""}}',
            "it describes no network",
        ),
    ],
)
def test_a_json_of_something_else_is_refused(text, message, tmp_path):
    write(tmp_path / "x", "class")
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pretrained(tmp_path / "x")


def test_what_the_json_says_must_fit_the_tensors(tmp_path):
    write(tmp_path / "x", "class")
    config = {"generator": dataclasses.asdict(CLASS)}
    for changed, message in (
        (
            {"config": {"generator": config["generator"] | {"depth": 3}}},
            "does not describe its ten",
        ),
        (
            {"config": {"generator": config["generator"] | {"sparks": 3}}},
            "no GRNClassConfig: .*spar",
        ),
        (
            {"config": {"generator": config["generator"] | {"depth": 0}}},
            "x.json': GRNClassConfig: context_start",
        ),
        ({"architecture": "GRNSound"}, "unknown architecture 'GRNSound'; known are HBQTok"),
        ({"architecture": ["GRNClass"]}, "unknown architecture .'GRNClass'.; known are"),
    ):
        change(tmp_path / "x.json", **({"config": config, "architecture": "GRNClass"} | changed))
        with pytest.raises(ValueError, match=message):
            read_pretrained(tmp_path / "x").network()


def test_a_generator_is_no_tokenizer(tmp_path):
    write(tmp_path / "x", "class")
    with pytest.raises(ValueError, match="is an export of a generator, not of a tokenizer"):
        read_pretrained(tmp_path / "x").tokenizer()


# --- the tokenizer beside -------------------------------------------------------------------------


def test_the_tokenizer_is_found_in_the_same_folder_by_its_hash(tmp_path):
    tokenizer = write(tmp_path / "b-tokenizer", "tokenizer")
    (tmp_path / "a.json").write_text("{}")  # somebody's
    (tmp_path / "a.safetensors").write_bytes(b"")
    write(tmp_path / "right", "class", tokenizer_hash=weights_hash(tokenizer))
    write(tmp_path / "wrong", "class", tokenizer_hash="0" * 16)
    write(tmp_path / "unknown", "class", tokenizer_hash=None)
    found = read_pretrained(tmp_path / "right").tokenizer_beside()
    assert found == export_files(tmp_path / "b-tokenizer").info
    for name in ("wrong", "unknown"):
        assert read_pretrained(tmp_path / name).tokenizer_beside() is None


def test_of_equal_tokenizers_the_one_with_the_noted_settings_is_found(tmp_path):
    tokenizer = write(tmp_path / "tokenizer", "tokenizer")
    bypassed = dataclasses.replace(TOKENIZER, use_mid_attention=not TOKENIZER.use_mid_attention)
    info = {"kind": "tokenizer", "config": {"tokenizer": bypassed}}
    write_pretrained(tmp_path / "bypassed", {"tokenizer": tokenizer}, info)
    noted = {"tokenizer_hash": weights_hash(tokenizer)}
    write(tmp_path / "unsure", "class", **noted)
    for name, config in (("tokenizer", TOKENIZER), ("bypassed", bypassed)):
        write(tmp_path / f"sure-{name}", "class", **noted, tokenizer_config=config)
        found = read_pretrained(tmp_path / f"sure-{name}").tokenizer_beside()
        assert found == export_files(tmp_path / name).info
    with pytest.raises(ValueError, match="bypassed.json' and '.*tokenizer.json' have the weights"):
        read_pretrained(tmp_path / "unsure").tokenizer_beside()


def test_hashes_are_short_hexadecimal_numbers(tmp_path):
    write(tmp_path / "x", "tokenizer")
    info = json.loads((tmp_path / "x.json").read_text())
    assert re.fullmatch("[0-9a-f]{16}", info["tokenizer_hash"])
    assert info["format_version"] == FORMAT_VERSION
    assert info["created_by"].startswith("grn_lightning ")
