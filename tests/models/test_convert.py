"""Published checkpoints: every wrapping is found, nothing foreign is run, misfits are listed."""

import argparse
import io
from pathlib import Path

import pytest
import torch
from torch import nn

from grn_lightning.models.code_transformer import CodeTransformer
from grn_lightning.models.convert import (
    LAYOUTS,
    WRITTEN,
    convert_official,
    hints_of,
    identify,
    load_official,
    read_official,
    write_official,
)
from grn_lightning.models.grn_class import GRNClass
from grn_lightning.models.grn_text import GRNText
from grn_lightning.models.pretrained import read_pretrained
from grn_lightning.models.sizes import VARIANTS, SizeHints, expected_shapes
from grn_lightning.models.tokenizer import HBQTokenizer
from grn_lightning.models.vq_tokenizer import VQTokenizer
from tests.models.test_sizes import CLASS, GPT, TEXT, TOKENIZER, VQ, stand_ins
from tests.official_files import random_state, wrap, write_official_file
from tests.tiny_runs import tensors_equal

FAMILY_OF_LAYOUT = {
    "ema": HBQTokenizer(TOKENIZER),
    "vae": HBQTokenizer(TOKENIZER),
    "model_ema1": GRNClass(CLASS),
    "gpt_fsdp": GRNText(TEXT),
    "gpt_ema_fsdp": GRNText(TEXT),
    "model": CodeTransformer(GPT),
    "flat": GRNText(TEXT),
}


# --- modules that exist already -------------------------------------------------------------------


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


@pytest.mark.parametrize("layout", FAMILY_OF_LAYOUT)
def test_averaged_weights_are_found_in_every_published_wrapping(layout):
    model, source = build(), build()
    load_official(model, wrap(source.state_dict(), layout))
    assert tensors_equal(model.state_dict(), source.state_dict())


def test_a_misfit_is_listed_and_loads_nothing():
    model, weights = build(), build().state_dict()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del weights["0.bias"]
    weights["1.weight"] = torch.zeros(1, 4)
    weights["2.weight"] = torch.zeros(5)
    with pytest.raises(ValueError, match="does not fit Sequential: 3 tensors differ") as caught:
        load_official(model, weights)
    lines = [" ".join(line.split()) for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        "missing 0.bias (3)",
        "unexpected 2.weight (5)",
        "other shape 1.weight (1, 4) in the file, (1, 3) in the model",
    ]
    assert tensors_equal(model.state_dict(), before)


def test_a_long_list_is_cut():
    with pytest.raises(ValueError, match=r"\.\.\. and 14 more"):
        load_official(build(), {f"{i}.weight": torch.zeros(1) for i in range(10, 40)})


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", FAMILY_OF_LAYOUT)
def test_files_are_read_in_every_layout(layout, tmp_path):
    state = random_state(FAMILY_OF_LAYOUT[layout])
    source = read_official(write_official_file(tmp_path / "x.pth", state, layout))
    assert source.layout == layout
    assert tensors_equal(source.tensors, state)
    arguments = {"model_ema1": "GRN-B", "gpt_fsdp": None}.get(layout)
    assert source.arguments.get("model") == arguments


def test_other_weights_of_a_file_are_read_when_asked_for(tmp_path):
    state = random_state(FAMILY_OF_LAYOUT["model_ema1"])
    file = write_official_file(tmp_path / "x.pth", state, "model_ema1")
    other = read_official(file, weights="model_ema2")
    assert other.layout == "model_ema2"
    assert tensors_equal(other.tensors, {name: x + 1 for name, x in state.items()})
    with pytest.raises(
        ValueError, match="holds no weights 'ema'; its entries are model, model_ema1"
    ):
        read_official(file, weights="ema")


def test_names_that_compilers_and_strategies_wrapped_are_cleaned(tmp_path):
    state = random_state(FAMILY_OF_LAYOUT["flat"])
    wrapped = {
        "module." + name.replace("block_chunks.", "_orig_mod.block_chunks."): x
        for name, x in state.items()
    }
    torch.save(wrapped, tmp_path / "x.pth")
    assert tensors_equal(read_official(tmp_path / "x.pth").tensors, state)


def test_tensors_of_a_gpu_are_read_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    torch.save({"w": torch.arange(5.0)}, tmp_path / "x.pth")
    assert b"cuda:3" in (tmp_path / "x.pth").read_bytes()
    tensors = read_official(tmp_path / "x.pth").tensors
    assert tensors["w"].tolist() == [0, 1, 2, 3, 4]
    assert tensors["w"].device.type == "cpu"


def test_a_file_older_than_zip_is_read(tmp_path):
    state = random_state(FAMILY_OF_LAYOUT["ema"])
    torch.save(wrap(state, "ema"), tmp_path / "x.ckpt", _use_new_zipfile_serialization=False)
    assert tensors_equal(read_official(tmp_path / "x.ckpt").tensors, state)


class Anything:
    """A class that a safe file must not bring along."""


def test_only_a_namespace_is_unpickled(tmp_path):
    state = {"w": torch.zeros(2)}
    torch.save({"model": state, "args": argparse.Namespace(lr=1.0)}, tmp_path / "x.pth")
    assert read_official(tmp_path / "x.pth").arguments == {"lr": 1.0}
    for name, content in (
        ("Anything", {"model": state, "args": argparse.Namespace(x=Anything())}),
        ("PosixPath", {"model": state, "args": Path("x")}),
        ("system", {"model": state, "args": _Shell()}),
    ):
        torch.save(content, tmp_path / "bad.pth")
        with pytest.raises(ValueError, match=rf"holds a [\w.]*{name}, which only its own code"):
            read_official(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


class _Shell:
    def __reduce__(self):
        import os

        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds a list, not tensors by name"),
        (
            {"epoch": 3, "model": {}},
            "holds no weights under any of .*; its entries are epoch, model",
        ),
    ],
)
def test_what_holds_no_weights_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        read_official(tmp_path / "x.pth")


def test_a_file_cut_off_is_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(10_000)}, buffer)
    (tmp_path / "x.pth").write_bytes(buffer.getvalue()[:-3000])
    with pytest.raises(ValueError, match="cannot be read: it is damaged, unfinished, or no file"):
        read_official(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("GRN_ind_B_ep599.pth", SizeHints(target="index")),
        ("GRN-bit-L.pth", SizeHints(target="bit")),
        ("GRN_T2V_2B_FSA_sft.pth", SizeHints(attention="full")),
        ("orbit_indices.pth", SizeHints()),
    ],
)
def test_names_of_files_tell_something(name, expected, tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / name)
    assert hints_of(read_official(tmp_path / name)) == expected


def test_arguments_of_the_training_tell_rounds_and_form(tmp_path):
    arguments = argparse.Namespace(method="GRN_bit", hbq_round=3)
    torch.save({"model": {"net.w": torch.zeros(1)}, "args": arguments}, tmp_path / "x.pth")
    told = hints_of(read_official(tmp_path / "x.pth"))
    assert told == SizeHints(num_rounds=3, target="bit")


# --- which network --------------------------------------------------------------------------------


def test_a_named_variant_must_be_that_variant():
    tensors = stand_ins("class", VARIANTS["class"]["B-bit"])
    guess = identify(tensors, variant="B-bit", hints=SizeHints(context_start=2))
    assert guess.config.context_start == 2
    with pytest.raises(
        ValueError, match="3 tensors do not fit variant 'B-index'; the nearest .* 'B-b"
    ):
        identify(tensors, variant="B-index")
    with pytest.raises(ValueError, match="unknown variant 'S'; known are 'auto', 'image-16d', 'jo"):
        identify(tensors, variant="S")


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_variant_does_not_tell_whether_the_middle_attention_acts(value):
    tensors = stand_ins("tokenizer", VARIANTS["tokenizer"]["joint-64d"])
    for side in ("encoder", "decoder"):
        tensors[f"{side}.middle.1.proj.weight"] = torch.tensor(value).expand(
            tensors[f"{side}.middle.1.proj.weight"].shape
        )
    assert identify(tensors, variant="joint-64d").config.use_mid_attention == bool(value)
    told = SizeHints(use_mid_attention=not value)
    assert identify(tensors, variant="joint-64d", hints=told).config.use_mid_attention != bool(
        value
    )


def test_missing_and_surplus_tensors_are_listed_with_the_nearest_variant():
    config = VARIANTS["text"]["0b"]
    tensors = stand_ins("text", config)
    del tensors["head.norm.weight"]
    tensors["class_tokens"] = torch.zeros(1)
    with pytest.raises(ValueError, match="2 tensors do not fit a GRNText of their sizes") as caught:
        identify(tensors)
    lines = [" ".join(line.split()) for line in str(caught.value).splitlines()]
    assert lines[0].endswith("; the nearest known variant is '0b' (2 of its tensors differ).")
    assert lines[1:] == ["missing head.norm.weight (512)", "unexpected class_tokens (1)"]


def test_a_block_of_another_shape_is_listed():
    tensors = stand_ins("text", VARIANTS["text"]["0b"])
    name = "block_chunks.1.module.0.mlp.up_proj.weight"
    tensors[name] = torch.zeros(8, 512)
    with pytest.raises(ValueError, match="1 tensors do not fit.*\n.*other shape .*in the file"):
        identify(tensors)


def test_without_what_tells_a_size_the_nearest_variant_is_compared_with():
    tensors = stand_ins("text", VARIANTS["text"]["0b"])
    del tensors["word_embed.weight"]
    match = (
        "sizes cannot be told: there is no tensor 'word_embed.weight'.*'0b' .1 of its.*\n  missing"
    )
    with pytest.raises(ValueError, match=match):
        identify(tensors)


# --- there and back -------------------------------------------------------------------------------

ALL_WRITTEN = [(layout, family) for family, layouts in WRITTEN.items() for layout in layouts]
NETWORKS = {
    "tokenizer": HBQTokenizer(TOKENIZER),
    "class": GRNClass(CLASS),
    "text": GRNText(TEXT),
    "vq": VQTokenizer(VQ),
    "gpt": CodeTransformer(GPT),
}


@pytest.mark.parametrize(("layout", "family"), ALL_WRITTEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_there_and_back_is_bitwise_the_same(layout, family, dtype, tmp_path):
    state = {name: x.to(dtype) for name, x in random_state(NETWORKS[family]).items()}
    hints = SizeHints(target="bit", grid_size=(2, 6), context_start=2)
    first = read_official(write_official_file(tmp_path / "a.pth", state, layout))
    done = convert_official(first, tmp_path / "ours", hints=hints)
    assert write_official(read_pretrained(done.file), tmp_path / "b.pth", layout=layout) == layout
    back = read_official(tmp_path / "b.pth")
    assert back.layout == layout
    assert list(back.tensors) == list(expected_shapes(family, done.guess.config))
    assert tensors_equal(back.tensors, state)
    size = sum(x.numel() * x.element_size() for x in state.values())
    assert (tmp_path / "b.pth").stat().st_size < 1.05 * size + 200_000  # no tensor twice


def test_safetensors_are_flat_in_both_directions(tmp_path):
    state = random_state(NETWORKS["class"])
    source = read_official(write_official_file(tmp_path / "a.pth", state, "model_ema1"))
    hints = SizeHints(grid_size=(2, 6))
    pretrained = read_pretrained(convert_official(source, tmp_path / "ours", hints=hints).file)
    assert write_official(pretrained, tmp_path / "b.safetensors") == "flat"
    assert tensors_equal(read_official(tmp_path / "b.safetensors").tensors, state)
    with pytest.raises(ValueError, match="b.safetensors' exists and is not overwritten"):
        write_official(pretrained, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="`layout` must be one of 'flat' .* got 'model_ema1'"):
        write_official(pretrained, tmp_path / "c.safetensors", layout="model_ema1")
    with pytest.raises(
        ValueError, match="`layout` must be one of 'model_ema1', 'flat' .* got 'vae'"
    ):
        write_official(pretrained, tmp_path / "c.pth", layout="vae")


def test_layouts_that_are_written_can_be_read():
    assert {layout for layout, _ in ALL_WRITTEN} <= set(LAYOUTS)
