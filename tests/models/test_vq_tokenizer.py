"""VQTokenizer: the stored outputs of the published one, and what its codebook promises."""

import json

import pytest
import torch
from safetensors import safe_open

from grn_lightning.models.vq_tokenizer import VQTokenizer, VQTokenizerConfig

CONFIG = VQTokenizerConfig(
    codebook_size=16, codebook_dim=4, width=32, width_multipliers=(1, 1), feature_width=8
)


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return VQTokenizer(CONFIG).eval()


@pytest.mark.parity
def test_published_weights_give_the_stored_codes_and_pictures(golden):
    with safe_open(golden / "llamagen_vq.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 not a mapping
        meta = json.loads(file.metadata()["meta"])
    model = VQTokenizer(
        VQTokenizerConfig(
            codebook_size=meta["codebook_size"],
            codebook_dim=meta["codebook_dim"],
            width=meta["width"],
            width_multipliers=tuple(meta["width_multipliers"]),
            feature_width=meta["z_channels"],
        )
    ).eval()
    prefix = "weights."
    model.load_state_dict(
        {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    )
    with torch.no_grad():
        codes = model.tokenize(stored["images"][:, :, None])
        pictures = model.detokenize(stored["codes"][:, None, None])
    assert torch.equal(codes[:, 0, 0], stored["codes"])
    scale = stored["reconstruction"].abs().max()
    assert (pictures[:, :, 0] - stored["reconstruction"]).abs().max() < 1e-5 * scale


def test_the_published_size_has_72_million_parameters():
    with torch.device("meta"):
        model = VQTokenizer(VQTokenizerConfig())
    assert sum(p.numel() for p in model.parameters()) == 71_883_403


def test_the_nearest_codeword_is_found(tokenizer):
    z = torch.nn.functional.normalize(torch.randn(2, 4, 1, 3, 5), dim=1)
    codewords = tokenizer.quantize.codewords()
    codes = tokenizer.quantize(z)
    for b, y, x in ((0, 0, 0), (1, 2, 4), (0, 1, 3)):
        distances = [(z[b, :, 0, y, x] - codeword).norm() for codeword in codewords]
        assert codes[b, 0, 0, y, x] == min(range(16), key=lambda k: distances[k])


def test_every_code_survives_decoding_and_searching(tokenizer):
    codes = torch.arange(16).view(1, 1, 1, 4, 4)
    codewords = tokenizer.dequantize(codes)
    torch.testing.assert_close(codewords.norm(dim=1), torch.ones(1, 1, 4, 4))
    assert torch.equal(tokenizer.quantize(codewords), codes)


def test_training_sees_what_tokenizing_and_detokenizing_give(tokenizer):
    clips = torch.rand(2, 3, 1, 8, 12) * 2 - 1
    with torch.no_grad():
        output = tokenizer(clips)
        pictures = tokenizer.detokenize(tokenizer.tokenize(clips))
    torch.testing.assert_close(output.reconstruction, pictures, rtol=1e-4, atol=1e-5)
    assert tokenizer.tokenize(clips).shape == (2, *CONFIG.latent_shape(1, 8, 12))


def test_gradients_pass_the_codebook_straight_and_pull_both_sides_together():
    torch.manual_seed(0)
    model = VQTokenizer(CONFIG)
    output = model(torch.rand(2, 3, 1, 8, 8) * 2 - 1)
    weights = torch.randn_like(output.z_hat)
    (straight,) = torch.autograd.grad((output.z_hat * weights).sum(), output.z, retain_graph=True)
    assert torch.equal(straight, weights)
    table = model.quantize.embedding.weight
    (pull,) = torch.autograd.grad(output.auxiliary_loss, table, retain_graph=True)
    used = model.quantize(output.z.detach()).unique()
    assert set(pull.abs().sum(1).nonzero().flatten().tolist()) == set(used.tolist())
    distance = (output.z - output.z_hat).square().mean()
    torch.testing.assert_close(output.auxiliary_loss, 1.25 * distance)
    (output.reconstruction.square().mean() + output.auxiliary_loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((1, 3, 5, 8, 8), "knows pictures only, got 5 frames"),
        ((1, 3, 1, 8, 7), "multiples of 2, got 8 x 7"),
        ((3, 8, 8), r"must be \(b, 3, 1, h, w\)"),
    ],
)
def test_what_is_no_picture_is_refused(tokenizer, shape, match):
    with pytest.raises(ValueError, match=match):
        tokenizer.tokenize(torch.zeros(shape))


def test_sizes_that_cannot_be_normalized_are_refused():
    with pytest.raises(ValueError, match="multiples of 32, got \\[48\\]; codebook_size"):
        VQTokenizerConfig(width=48, width_multipliers=(1,), codebook_size=1)
