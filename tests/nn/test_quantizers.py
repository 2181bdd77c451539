"""Laws that every arm of the quantizer switch keeps, the bits each gets, and refusals."""

import math
from dataclasses import asdict

import pytest
import torch

from grn_lightning.functional import hbq_straight_through
from grn_lightning.nn.quantizers import (
    Codebooks,
    Quantizer,
    QuantizerConfig,
    build_quantizer,
)

CODED = ["hbq", "fsq", "lfq", "bsq", "vq"]
BUDGET = {"latent_channels": 4, "num_rounds": 4}  # 16 bits


def make(name: str, **settings) -> Quantizer:
    quantizer = build_quantizer(QuantizerConfig(name=name, **settings), **BUDGET)
    quantizer.init_weights()
    return quantizer


def latents(quantizer_name: str, quantizer: Quantizer, grid: tuple = (2, 3, 3)) -> torch.Tensor:
    width = QuantizerConfig(name=quantizer_name).sizes(**BUDGET).latent_width
    return quantizer.squash(torch.randn(3, width, *grid))


# ------------------------------------------------------------------ bits


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize(("channels", "rounds"), [(12, 4), (16, 4), (64, 4), (8, 1), (4, 2)])
def test_no_arm_gets_more_bits_than_hbq_and_none_wastes_a_code(
    name: str, channels: int, rounds: int
) -> None:
    sizes = QuantizerConfig(name=name).sizes(latent_channels=channels, num_rounds=rounds)
    budget = channels * rounds
    assert sizes.alphabet_size**sizes.code_channels <= 2**budget  # whole numbers: exact
    assert sizes.alphabet_size ** (sizes.code_channels + 1) > 2**budget
    assert sizes.num_bits == pytest.approx(sizes.code_channels * math.log2(sizes.alphabet_size))
    assert sizes.num_bits == budget or name == "fsq"


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"name": "hbq"}, (12, 12, 16, 4)),
        ({"name": "none"}, (12, 0, 0, 0)),
        ({"name": "fsq"}, (16, 16, 8, 3)),
        ({"name": "fsq", "num_levels": 5}, (20, 20, 5, 0)),
        ({"name": "lfq"}, (48, 48, 2, 1)),
        ({"name": "bsq"}, (48, 48, 2, 1)),
        ({"name": "vq"}, (48, 6, 256, 0)),
        ({"name": "vq", "codebook_bits": 12, "codeword_width": 4}, (16, 4, 4096, 0)),
    ],
)
def test_forty_eight_bits_are_spent_as_documented(settings: dict, sizes: tuple) -> None:
    assert QuantizerConfig(**settings).sizes(latent_channels=12, num_rounds=4) == sizes


def test_continuous_latents_have_infinite_bits() -> None:
    assert QuantizerConfig(name="none").sizes(**BUDGET).num_bits == math.inf


# ------------------------------------------------------------------ laws of all arms


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("name", CODED)
def test_codes_decode_to_exactly_what_the_decoder_sees(name: str, is_training: bool) -> None:
    quantizer = make(name).train(is_training)
    z = latents(name, quantizer)
    codes = quantizer.encode(z)
    expected = quantizer.decode(codes)
    z_hat, _ = quantizer(z)  # codebooks move only after this
    assert torch.equal(z_hat, expected)
    sizes = QuantizerConfig(name=name).sizes(**BUDGET)
    assert codes.shape == (3, sizes.code_channels, 2, 3, 3)
    assert codes.dtype == torch.long
    assert 0 <= codes.min() <= codes.max() < sizes.alphabet_size


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("grid", [(5,), (4, 2), (1, 2, 2)])
def test_every_code_survives_decode_then_encode_on_any_grid(name: str, grid: tuple) -> None:
    quantizer = make(name).eval()
    sizes = QuantizerConfig(name=name).sizes(**BUDGET)
    codes = torch.randint(sizes.alphabet_size, (2, sizes.code_channels, *grid))
    z_hat = quantizer.decode(codes)
    assert z_hat.shape == (2, sizes.latent_width, *grid)
    assert torch.equal(quantizer.encode(z_hat), codes)


@pytest.mark.parametrize("name", [*CODED, "none"])
def test_the_gradient_passes_straight_through(name: str) -> None:
    quantizer = make(name)
    z = latents(name, quantizer).requires_grad_()
    z_hat, _ = quantizer(z)
    weights = torch.randn_like(z)
    (z_hat * weights).sum().backward()
    assert torch.equal(z.grad, weights)


@pytest.mark.parametrize("name", CODED)
def test_a_position_is_quantized_by_itself(name: str) -> None:
    quantizer = make(name).eval()
    z = latents(name, quantizer)
    codes = quantizer.encode(z)
    assert torch.equal(quantizer.encode(z[1:2, :, 1:, 2:]), codes[1:2, :, 1:, 2:])


def test_hbq_is_what_it_was_bit_for_bit() -> None:
    quantizer, x = make("hbq"), torch.randn(2, 4, 3, 3)
    z = quantizer.squash(x)
    assert torch.equal(z, x.tanh())
    z_hat, losses = quantizer(z)
    assert torch.equal(z_hat, hbq_straight_through(z, num_rounds=4))
    assert losses == {}
    assert list(quantizer.state_dict()) == []


def test_without_a_quantizer_latents_pass_and_codes_are_refused() -> None:
    quantizer = make("none")
    z = torch.rand(2, 4, 3)
    assert quantizer(z).z_hat is z
    for refused in (quantizer.encode, quantizer.decode):
        with pytest.raises(ValueError, match="continuous latents and no codes"):
            refused(z)


# ------------------------------------------------------------------ signs


def test_binary_spherical_latents_have_unit_length_before_and_after() -> None:
    quantizer = make("bsq")
    z = latents("bsq", quantizer)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(3, 2, 3, 3))
    torch.testing.assert_close(quantizer(z).z_hat.norm(dim=1), torch.ones(3, 2, 3, 3))


@pytest.mark.parametrize("name", ["lfq", "bsq"])
def test_the_entropy_term_pulls_a_collapsed_sign_apart(name: str) -> None:
    quantizer = make(name, commitment_weight=0.0, temperature=1.0)
    x = (torch.rand(64, 16, 1) * 0.5 + 0.2).requires_grad_()  # every sign is positive
    before = sign_share(quantizer, x)
    for _ in range(200):
        _, losses = quantizer(quantizer.squash(x))
        (gradient,) = torch.autograd.grad(losses["entropy"], x)
        x = (x - 2000 * gradient).detach().requires_grad_()
    assert before == 1
    assert 0.3 < sign_share(quantizer, x) < 0.7


def sign_share(quantizer: Quantizer, x: torch.Tensor) -> float:
    return float(quantizer.encode(quantizer.squash(x.detach())).double().mean())


@pytest.mark.parametrize("name", ["lfq", "bsq", "vq"])
def test_the_commitment_term_is_the_distance_to_what_is_decoded(name: str) -> None:
    quantizer = make(name, commitment_weight=0.5).eval()
    z = latents(name, quantizer).requires_grad_()
    z_hat, losses = quantizer(z)
    (gradient,) = torch.autograd.grad(losses["commitment"], z)
    cosine = torch.cosine_similarity(gradient.flatten(), (z - z_hat).detach().flatten(), dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-5)
    doubled = make(name, commitment_weight=1.0).eval()
    doubled.load_state_dict(quantizer.state_dict())
    torch.testing.assert_close(doubled(z).losses["commitment"], 2 * losses["commitment"])


# ------------------------------------------------------------------ codebooks


def nearest(codebooks: Codebooks, z: torch.Tensor) -> torch.Tensor:
    """Codes by a loop over groups and positions."""
    groups = z.flatten(2).unflatten(1, (codebooks.num_codebooks, -1))
    codes = torch.zeros(len(z), codebooks.num_codebooks, groups.shape[-1], dtype=torch.long)
    for b, c, n in torch.cartesian_prod(*map(torch.arange, codes.shape)).tolist():
        distances = (codebooks.codewords[c] - groups[b, c, :, n]).norm(dim=1)
        codes[b, c, n] = distances.argmin()
    return codes.unflatten(2, z.shape[2:])


def test_each_group_gets_the_nearest_word_of_its_own_codebook() -> None:
    quantizer = make("vq").eval()
    assert isinstance(quantizer, Codebooks)
    z = latents("vq", quantizer, grid=(2, 2))
    assert torch.equal(quantizer.encode(z), nearest(quantizer, z))


def test_codebooks_learn_in_training_mode_only_and_looking_up_teaches_nothing() -> None:
    quantizer = make("vq")
    assert isinstance(quantizer, Codebooks)
    before, z = quantizer.codewords.clone(), latents("vq", quantizer)
    quantizer.encode(z)
    quantizer.eval()(z)
    assert torch.equal(quantizer.codewords, before)
    quantizer.train()(z)
    assert not torch.equal(quantizer.codewords, before)
    norms = quantizer.codewords.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize(("revive_below", "least", "most"), [(0.0, 1, 8), (1.0, 12, 16)])
def test_a_collapsed_codebook_is_revived(revive_below: float, least: int, most: int) -> None:
    quantizer = make("vq", codebook_bits=4, codeword_width=2, revive_below=revive_below)
    assert isinstance(quantizer, Codebooks)
    for name, words in quantizer.state_dict().items():
        if "embed" in name:  # codewords and their averages
            words.copy_(torch.tensor([1.0, 0.0]).expand(4, 16, 2))  # one word, 16 times
    angles = torch.arange(16) * (2 * math.pi / 16)
    centres = torch.stack([angles.cos(), angles.sin()])  # (2, 16)
    for _ in range(100):
        chosen = centres[:, torch.randint(16, (8, 4, 32))]  # (2, b, codebooks, n)
        quantizer(
            quantizer.squash(chosen.movedim(0, 2).flatten(1, 2) + 0.01 * torch.randn(8, 8, 32))
        )
    codes = quantizer.encode(centres.repeat(4, 1)[None])  # all directions in every codebook
    used = [len(row.unique()) for row in codes[0]]
    assert least <= min(used) <= max(used) <= most


def test_codewords_are_drawn_also_for_a_module_from_the_meta_device() -> None:
    with torch.device("meta"):
        quantizer = build_quantizer(QuantizerConfig(name="vq"), **BUDGET)
    quantizer.to_empty(device="cpu")
    quantizer.init_weights()
    assert isinstance(quantizer, Codebooks)
    norms = quantizer.codewords.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "rvq"}, r"name must be one of \('hbq', .*\), got 'rvq'"),
        ({"num_levels": 5}, "num_levels is a setting of fsq and means nothing for 'hbq'"),
        ({"name": "fsq", "entropy_weight": 1.0}, "entropy_weight is a setting of lfq, bsq"),
        ({"name": "fsq", "num_levels": 2}, "num_levels must be at least 3, got 2"),
        ({"name": "vq", "codebook_bits": 17}, r"codebook_bits must be in 1..16, got 17"),
        ({"name": "vq", "codebook_decay": 1.0}, r"codebook_decay must be in \[0, 1\), got 1.0"),
        ({"name": "lfq", "temperature": 0.0}, "temperature must be positive, got 0.0"),
        (
            {"name": "vq", "commitment_weight": -1.0, "codeword_width": 0},
            "codeword_width must be at least 1, got 0; .*commitment_weight must be at least 0",
        ),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizerConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "vq", "codebook_bits": 5}, "16 bits of a position do not divide .*divisor of 16"),
        ({"name": "fsq", "num_levels": 70000}, "do not fit into the 16 bits of a position"),
    ],
)
def test_bits_that_a_quantizer_cannot_spend_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_quantizer(QuantizerConfig(**settings), **BUDGET)


def test_stored_settings_of_other_kinds_are_passed_over_and_own_ones_kept() -> None:
    stored = asdict(QuantizerConfig()) | {"commitment_weight": 9.0, "num_levels": 11}
    assert QuantizerConfig.from_plain(stored) == QuantizerConfig()
    own = QuantizerConfig(name="fsq", num_levels=11)
    assert QuantizerConfig.from_plain(asdict(own) | {"temperature": 9.0}) == own
    with pytest.raises(TypeError, match="unexpected keyword argument 'zzz'"):
        QuantizerConfig.from_plain({"zzz": 1})
