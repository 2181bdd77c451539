"""The tokenizer with every quantizer: codes, streaming, configurations, refusals."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from grn_lightning.models.grn_class import GRNClassConfig
from grn_lightning.models.tokenizer import HBQTokenizer, TokenizerConfig
from grn_lightning.models.variants import GRN_CLASS, TOKENIZERS
from grn_lightning.nn.quantizers import QuantizerConfig
from grn_lightning.pipelines.fit import target_of
from tests.models.test_tokenizer import TINY, make_clips

CODED = ["hbq", "fsq", "lfq", "bsq", "vq"]
SMALL = replace(TINY, num_rounds=4)  # 16 bits per position


def make(name: str, **settings: float) -> HBQTokenizer:
    torch.manual_seed(0)
    config = replace(SMALL, quantizer=QuantizerConfig(name=name, **settings))
    return HBQTokenizer(config).double().requires_grad_(False).eval()


@pytest.mark.parametrize("name", CODED)
def test_codes_decode_to_the_reconstruction(name: str) -> None:
    tokenizer, clips = make(name), make_clips(5, batch_size=2)
    codes, output = tokenizer.tokenize(clips), tokenizer(clips)
    config = tokenizer.config
    assert codes.shape == (2, config.code_channels, *config.latent_shape(5, 16, 8)[1:])
    assert output.z.shape[1:] == config.latent_shape(5, 16, 8)
    torch.testing.assert_close(tokenizer.dequantize(codes), output.z_hat)
    torch.testing.assert_close(tokenizer.detokenize(codes), output.reconstruction)


@pytest.mark.parametrize("name", CODED)
def test_streaming_gives_the_codes_of_the_whole_clip(name: str) -> None:
    tokenizer, clips = make(name), make_clips(9)
    codes = tokenizer.tokenize(clips)
    assert torch.equal(tokenizer.tokenize(clips, chunk_size=1), codes)
    whole, streamed = tokenizer.detokenize(codes), tokenizer.detokenize(codes, chunk_size=2)
    torch.testing.assert_close(streamed, whole)


@pytest.mark.parametrize("name", [*CODED, "none"])
def test_the_auxiliary_loss_is_the_sum_of_its_terms_and_reaches_the_encoder(name: str) -> None:
    settings = {"commitment_weight": 0.25} if name in ("lfq", "bsq", "vq") else {}
    tokenizer = make(name, **settings).requires_grad_().train()
    output = tokenizer(make_clips(1))
    asks = {"lfq": {"entropy", "commitment"}, "bsq": {"entropy", "commitment"}}
    assert set(output.auxiliary_terms) == asks.get(name, {"commitment"} if name == "vq" else set())
    if output.auxiliary_loss is None:
        assert not output.auxiliary_terms
        return
    torch.testing.assert_close(output.auxiliary_loss, sum(output.auxiliary_terms.values()))
    output.auxiliary_loss.backward()
    assert tokenizer.conv1.weight.grad.abs().max() > 0
    assert tokenizer.conv2.weight.grad is None


def test_without_a_quantizer_the_decoder_sees_the_latents_and_codes_are_refused() -> None:
    tokenizer, clips = make("none"), make_clips(1)
    output = tokenizer(clips)
    assert output.z_hat is output.z
    for refused in (lambda: tokenizer.tokenize(clips), lambda: tokenizer.detokenize(output.z)):
        with pytest.raises(ValueError, match="continuous latents and no codes"):
            refused()


@pytest.mark.parametrize("name", ["hbq", "none"])
def test_latents_are_decoded_from_any_number_of_rounds(name: str) -> None:
    tokenizer = make(name)
    z = tokenizer.encode(make_clips(1))
    for num_rounds in range(1, 9):
        z_hat = tokenizer.quantize_rounds(z, num_rounds=num_rounds)
        assert (z_hat - z).abs().max() <= 2.0**-num_rounds
    trained = tokenizer.quantize_rounds(z, num_rounds=4)
    if name == "hbq":
        assert torch.equal(trained, tokenizer.dequantize(tokenizer.quantize(z)))


@pytest.mark.parametrize("name", ["fsq", "lfq", "bsq", "vq"])
def test_rounds_of_a_quantizer_without_rounds_are_refused(name: str) -> None:
    tokenizer = make(name)
    z = tokenizer.encode(make_clips(1))
    with pytest.raises(ValueError, match=f"quantizer '{name}' has no binary rounds"):
        tokenizer.quantize_rounds(z, num_rounds=2)


def test_codes_of_another_quantizer_are_refused() -> None:
    codes = make("lfq").tokenize(make_clips(1))
    for name in ("hbq", "fsq", "vq"):
        with pytest.raises(ValueError, match=r"must be of shape \(b, \d, f, h, w\), got \(1, 16, "):
            make(name).detokenize(codes)


# ------------------------------------------------------------------ configurations


@pytest.mark.parametrize("name", [*CODED, "none"])
def test_a_configuration_survives_plain_data(name: str) -> None:
    config = replace(SMALL, quantizer=QuantizerConfig(name=name))
    assert TokenizerConfig(**json.loads(json.dumps(asdict(config)))) == config


def test_configurations_from_before_the_switch_are_hbq() -> None:
    plain = asdict(SMALL)
    del plain["quantizer"]
    assert TokenizerConfig(**plain) == SMALL
    assert SMALL.quantizer.name == "hbq"
    assert all(config.quantizer.name == "hbq" for config in TOKENIZERS.values())


def test_hbq_adds_no_tensor_to_the_published_ones() -> None:
    assert not [name for name in make("hbq").state_dict() if "quantizer" in name]


def test_bits_that_do_not_divide_into_codebooks_are_an_issue_of_the_configuration() -> None:
    with pytest.raises(ValueError, match=r"TokenizerConfig: the 12 bits .* divisor of 12\.$"):
        replace(TINY, quantizer=QuantizerConfig(name="vq"))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("hbq", {"index": (4, 16), "bit": (16, 2)}),
        ("fsq", {"index": (5, 8)}),
        ("lfq", {"index": (16, 2)}),
        ("vq", {"index": (2, 256)}),
    ],
)
def test_generators_are_told_what_to_predict(name: str, sizes: dict) -> None:
    config = replace(SMALL, quantizer=QuantizerConfig(name=name))
    assert {target: config.element_sizes(target) for target in config.targets} == sizes
    for target in {"index", "bit"} - set(sizes):
        with pytest.raises(ValueError, match=f"'{name}' are predicted as 'index', got '{target}'"):
            config.element_sizes(target)


def test_generators_fit_the_codes_of_a_baseline_or_are_refused() -> None:
    def generator(num_elements: int, alphabet_size: int) -> GRNClassConfig:
        return replace(
            GRN_CLASS["digits-c2i"], num_elements=num_elements, alphabet_size=alphabet_size
        )

    vq = replace(SMALL, quantizer=QuantizerConfig(name="vq"))
    assert target_of(generator(2, 256), vq) == "index"
    with pytest.raises(ValueError, match=r"must be \(2, 256\) for a tokenizer .* 'vq', got \(16, "):
        target_of(generator(16, 2), vq)
    with pytest.raises(ValueError, match="no codes"):
        target_of(generator(16, 2), replace(SMALL, quantizer=QuantizerConfig(name="none")))
