"""LlamaGen's files through the public path: stored numbers, what may be left out, and back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import grn_lightning
from grn_lightning.models.code_transformer import CodeTransformer, CodeTransformerConfig
from grn_lightning.models.hashes import weights_hash
from grn_lightning.models.vq_tokenizer import VQTokenizer, VQTokenizerConfig
from grn_lightning.pipelines.coarse_to_fine import CoarseToFinePipeline
from tests.official_files import random_state, read_golden
from tests.tiny_runs import call_grn, tensors_equal

VQ = VQTokenizerConfig(
    codebook_size=12, codebook_dim=3, width=32, width_multipliers=(1, 1), feature_width=4
)
GPT = CodeTransformerConfig(
    input_size=12, output_size=12, grid_size=(3, 3), depth=2, width=32, num_heads=2, num_classes=5
)


def assert_equal_to_scale(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def back_again(export: Path, folder: Path) -> dict[str, Any]:
    call_grn("convert", export, "--out", folder / "back.pt", "--to", "official")
    return torch.load(folder / "back.pt", weights_only=True)


@pytest.mark.parity
def test_the_stored_tokenizer_gives_its_codes_and_pictures_and_comes_back(golden, tmp_path):
    stored = read_golden(golden / "llamagen_vq.safetensors")
    others = {name: x + 1 for name, x in stored.weights.items()}
    extras = {"quantize.codebook_used": torch.zeros(65536)}
    torch.save({"model": others, "ema": stored.weights | extras}, tmp_path / "vq_ds16_c2i.pt")
    report = call_grn("convert", tmp_path / "vq_ds16_c2i.pt", "--out", tmp_path / "vq")
    assert report.layout == "ema"
    assert "left out, since they are no weights: quantize.codebook_used" in str(report)
    model = grn_lightning.load(tmp_path / "vq")
    assert isinstance(model, VQTokenizer)
    codes = model.tokenize(stored.arrays["images"][:, :, None])
    assert torch.equal(codes[:, 0, 0], stored.arrays["codes"])
    pictures = model.detokenize(stored.arrays["codes"][:, None, None])[:, :, 0]
    assert_equal_to_scale(pictures, stored.arrays["reconstruction"])
    back = back_again(tmp_path / "vq", tmp_path)
    assert [*back] == ["model"]
    assert tensors_equal(back["model"], stored.weights)


@pytest.mark.parity
def test_the_stored_generator_gives_its_logits_and_comes_back(golden, tmp_path):
    stored = read_golden(golden / "llamagen_gpt.safetensors")
    extras = {
        "freqs_cis": torch.zeros(1 + 16, 8, 2),
        "layers.1.attention.kv_cache.v_cache": torch.zeros(2, 4, 17, 16),
    }
    torch.save({"model": stored.weights | extras, "steps": 3}, tmp_path / "c2i_B_256.pt")
    report = call_grn("convert", tmp_path / "c2i_B_256.pt", "--out", tmp_path / "gpt")
    assert report.left_out == tuple(extras)
    assert not report.assumed  # the table of rotations told grid and heads
    model = grn_lightning.load(tmp_path / "gpt")
    assert isinstance(model, CodeTransformer)
    codes = stored.arrays["codes"].view(-1, 1, 4, 4)
    logits = model(codes, stored.arrays["class_labels"])
    assert_equal_to_scale(logits.flatten(1, 3), stored.arrays["logits_b_l_k"])
    back = back_again(tmp_path / "gpt", tmp_path)
    assert tensors_equal(back["model"], stored.weights)

    torch.save(stored.weights, tmp_path / "flat.pt")
    flat = call_grn(
        "convert", tmp_path / "flat.pt", "--out", tmp_path / "flat", "--grid_size", "[4, 4]"
    )
    assert flat.assumed == {"num_heads": 4}
    assert tensors_equal(grn_lightning.load(tmp_path / "flat").state_dict(), stored.weights)


@pytest.fixture
def exports(tmp_path: Path) -> Path:
    """A tokenizer, and a generator of its codes that knows it, as published and converted."""
    for name, network in (("vq", VQTokenizer(VQ)), ("gpt", CodeTransformer(GPT))):
        torch.save({"model": random_state(network)}, tmp_path / f"{name}.pt")
    call_grn("convert", tmp_path / "vq.pt", "--out", tmp_path / "vq")
    options = ["--tokenizer", tmp_path / "vq", "--grid_size", "[3, 3]", "--num_heads", "2"]
    call_grn("convert", tmp_path / "gpt.pt", "--out", tmp_path / "gpt", *options)
    return tmp_path


def test_a_converted_generator_draws_with_the_tokenizer_beside_it(exports):
    pipeline = grn_lightning.load(exports / "gpt")
    assert isinstance(pipeline, CoarseToFinePipeline)
    assert pipeline.coarse.config == GPT
    assert pipeline.hashes["tokenizer"] == weights_hash(pipeline.tokenizer)
    drawn = pipeline.draw(torch.tensor([1, 4]), torch.arange(2))
    assert drawn.clips.shape == (2, 3, 1, 6, 6)
    assert tensors_equal(pipeline.tokenizer.state_dict(), random_state(VQTokenizer(VQ)))


def test_codes_that_a_tokenizer_does_not_have_are_refused(exports, capsys):
    small = VQTokenizerConfig(**{**vars(VQ), "codebook_size": 9})
    torch.save(random_state(VQTokenizer(small)), exports / "small.pt")
    call_grn("convert", exports / "small.pt", "--out", exports / "small")
    with pytest.raises(SystemExit):
        call_grn(
            "convert", exports / "gpt.pt", "--out", exports / "x", "--tokenizer", exports / "small"
        )
    assert "one code of 12 values per position, but the tokenizer has 1 of 9" in (
        capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="but the given one is tokenizer"):
        grn_lightning.load(exports / "gpt", exports / "small")


def test_what_is_surplus_and_unknown_is_refused(exports, capsys):
    state = random_state(CodeTransformer(GPT)) | {"layers.0.attention.bias": torch.zeros(3)}
    torch.save(state, exports / "odd.pt")
    with pytest.raises(SystemExit):
        call_grn("convert", exports / "odd.pt", "--out", exports / "odd", "--num_heads", "2")
    text = capsys.readouterr().err
    assert "unexpected   layers.0.attention.bias (3)" in text
    assert "the nearest known variant is 'llamagen-B'" in text
