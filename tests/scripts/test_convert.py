"""`grn convert`: stored numbers of the published networks through the public path, and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import grn_lightning
from grn_lightning.models.grn_class import GRNClass
from grn_lightning.models.grn_text import GRNText, TextCondition
from grn_lightning.models.hashes import weights_hash
from grn_lightning.models.pretrained import read_pretrained
from grn_lightning.models.text_encoder import TextEncoderConfig
from grn_lightning.models.tokenizer import HBQTokenizer
from grn_lightning.scripts.convert import convert
from tests.official_files import read_golden, write_official_file
from tests.tiny_runs import call_grn, tensors_equal

RELATIVE_ERROR = 1e-5  # of the largest magnitude, as the numbers were stored in float32
LAYOUTS = {
    "tokenizer": "ema",
    "class_index": "model_ema1",
    "class_bit": "model_ema1",
    "text_bit_image": "flat",
    "text_bit_video": "gpt_fsdp",
}
# What no tensor tells.
HINTS: dict[str, list[Any]] = {
    "class_index": ["--context_start", 2],
    "class_bit": ["--num_rounds", 3],
    "text_bit_video": ["--aspect_template", 0.562],
}


def assert_equal_to_scale(ours: Tensor, expected: Tensor) -> None:
    tolerance = RELATIVE_ERROR * expected.abs().max().item()
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.parity
@pytest.mark.parametrize("name", LAYOUTS)
def test_stored_weights_give_the_stored_numbers_and_come_back(name, golden, tmp_path):
    stored = read_golden(golden / f"{name}.safetensors")
    file = write_official_file(tmp_path / f"{name}.pth", stored.weights, LAYOUTS[name])
    report = call_grn("convert", file, "--out", tmp_path / "ours", *HINTS.get(name, []))
    assert (report.layout, report.num_tensors) == (LAYOUTS[name], len(stored.weights))

    loaded: Any = grn_lightning.load(tmp_path / "ours")
    assert loaded.config == read_pretrained(tmp_path / "ours").config()
    network = getattr(loaded, "generator", loaded)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    arrays = stored.arrays
    if isinstance(network, HBQTokenizer):
        for kind in ("image", "clip"):
            assert_equal_to_scale(network.encode(arrays[kind]), arrays[f"{kind}_latents"])
            shown = network.decode(arrays[f"{kind}_latents"])
            assert_equal_to_scale(shown, arrays[f"{kind}_reconstruction"])
    elif isinstance(network, GRNClass):
        logits = network(arrays["codes"], arrays["t"], arrays["class_labels"])
        assert_equal_to_scale(logits.movedim(-1, 1), arrays["logits_b_k_c_h_w"])
    else:
        assert isinstance(network, GRNText)
        for null in ("", "null_"):
            embeds = arrays[f"{null}text_embeds"]
            text = TextCondition(embeds, torch.ones(embeds.shape[:2], dtype=torch.bool))
            logits = network(arrays["codes"], arrays["t"], text)
            assert_equal_to_scale(logits, arrays[f"{null}logits_b_c_f_h_w_k"])

    back = tmp_path / "back.pth"
    call_grn("convert", tmp_path / "ours", "--out", back, "--to", "official")
    contents = torch.load(back, weights_only=True)
    if LAYOUTS[name] == "model_ema1":
        named = {f"net.{key}": tensor for key, tensor in stored.weights.items()}
        assert contents["epoch"] == 0
        assert tensors_equal(contents["model"], named)
        assert tensors_equal(contents["model_ema2"], named)
        assert tensors_equal(contents["model_ema1"], named)
    else:
        assert tensors_equal(contents.get("ema", contents), stored.weights)


@pytest.mark.parity
def test_a_tokenizer_tells_the_form_of_its_generators_codes(golden, tmp_path):
    """64 one-hot channels are 4 codes of 16 letters, or 32 bits; 4 channels of 4 rounds decide."""
    for name, out in (("tokenizer", "t"), ("class_index", "c"), ("text_bit_image", "x")):
        weights = read_golden(golden / f"{name}.safetensors").weights
        file = write_official_file(tmp_path / f"{out}.pth", weights, "flat")
        told = [] if out == "t" else ["--tokenizer", tmp_path / "tt"]
        report = call_grn("convert", file, "--out", tmp_path / f"{out}{out}", *told)
        assert "target" not in report.assumed
    info = {key: json.loads((tmp_path / f"{key}.json").read_text()) for key in ("tt", "cc", "xx")}
    assert info["cc"]["config"]["generator"]["num_elements"] == 4
    assert info["xx"]["config"]["generator"]["num_elements"] == 16
    expected = weights_hash(read_pretrained(tmp_path / "tt").tokenizer())
    assert {entry["tokenizer_hash"] for entry in info.values()} == {expected}


def refused(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        call_grn("convert", *args)
    assert stop.value.code == 2
    return capsys.readouterr().err.removeprefix("grn: ")


def test_refusals_are_sentences(capsys, tmp_path):
    out = tmp_path / "out"
    assert "no file" in refused(capsys, tmp_path / "none.pth", "--out", out)
    (tmp_path / "bad.pth").write_bytes(b"hello" * 50)
    assert "no file of torch.save" in refused(capsys, tmp_path / "bad.pth", "--out", out)
    (tmp_path / "bad.safetensors").write_bytes(b"hello" * 50)
    text = refused(capsys, tmp_path / "bad.safetensors", "--out", out)
    assert "is damaged or unfinished" in text
    save_file({"layer.weight": torch.zeros(2, 3)}, tmp_path / "other.safetensors")
    text = refused(capsys, tmp_path / "other.safetensors", "--out", out)
    assert "1 tensors are of no architecture known here" in text
    assert "layer.weight (2, 3)" in text
    text = refused(capsys, tmp_path / "other.safetensors", "--out", out, "--variant", "C")
    assert "unknown variant 'C'; known are 'auto', 'image-16d'" in text
    assert not list(tmp_path.glob("out*"))


def test_a_text_encoder_without_weights_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one with weights of its own, got 'tiny'"):
        convert(tmp_path / "f.pth", out=tmp_path / "out", text_encoder=TextEncoderConfig())
