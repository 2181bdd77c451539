"""The tokenizer's laws: sizes, causality, streaming, quantization, gradients, refusals."""

from collections.abc import Iterator
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from grn_lightning.models.tokenizer import HBQTokenizer, TokenizerConfig

TINY = TokenizerConfig(
    latent_channels=4,
    num_rounds=3,
    encoder_width=4,
    decoder_width=4,
    width_multipliers=(1, 2, 2),
    num_res_blocks=1,
    temporal_downsample=(True, True),
)
FRAMES = [1, 5, 9, 13]
EXACT = {"rtol": 0.0, "atol": 1e-12}


def make_tokenizer(config: TokenizerConfig = TINY) -> HBQTokenizer:
    """Build a tokenizer in float64 whose attention is not switched off by its zero weights."""
    tokenizer = HBQTokenizer(config).double()
    for side in (tokenizer.encoder, tokenizer.decoder):
        torch.nn.init.normal_(side.middle[1].proj.weight, std=0.3)
    return tokenizer


def make_clips(num_frames: int, batch_size: int = 1) -> Tensor:
    return torch.rand(batch_size, 3, num_frames, 16, 8, dtype=torch.float64) * 2 - 1


@pytest.fixture
def tokenizer() -> HBQTokenizer:
    return make_tokenizer().requires_grad_(False)


# ------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("latent_channels", "num_parameters"),
    [(16, 702_687_612), (64, 705_693_036), (256, 717_945_132)],
)
def test_published_sizes_have_the_published_number_of_parameters(
    latent_channels: int, num_parameters: int
) -> None:
    with torch.device("meta"):
        tokenizer = HBQTokenizer(TokenizerConfig(latent_channels=latent_channels))
    assert sum(p.numel() for p in tokenizer.parameters()) == num_parameters
    assert len(tokenizer.state_dict()) == 196


def test_published_sizes_have_the_published_strides() -> None:
    config = TokenizerConfig()
    assert (config.spatial_stride, config.temporal_stride) == (16, 4)
    assert config.latent_shape(81, 480, 848) == (16, 21, 30, 53)


@pytest.mark.parametrize("num_frames", FRAMES)
def test_latents_have_the_announced_shape_and_decode_to_the_shape_of_the_clips(
    tokenizer: HBQTokenizer, num_frames: int
) -> None:
    clips = make_clips(num_frames, batch_size=2)
    z = tokenizer.encode(clips)
    assert z.shape[1:] == TINY.latent_shape(num_frames, 16, 8)
    assert z.abs().max() < 1
    assert tokenizer.decode(z).shape == clips.shape


@pytest.mark.parametrize("temporal_downsample", [(False, False), (True, False), (False, True)])
def test_any_choice_of_halved_levels_fits_together(temporal_downsample: tuple[bool, bool]) -> None:
    config = TokenizerConfig(
        **{**asdict(TINY), "temporal_downsample": temporal_downsample, "patch_size": 1}
    )
    tokenizer = make_tokenizer(config)
    clips = make_clips(1 + 2 * config.temporal_stride)
    z = tokenizer.encode(clips)
    assert z.shape[1:] == config.latent_shape(*clips.shape[2:])
    assert tokenizer.decode(z).shape == clips.shape
    torch.testing.assert_close(tokenizer.encode_streaming(clips), z, **EXACT)


# ------------------------------------------------------------------ causality and streaming


@pytest.mark.parametrize("num_frames", FRAMES)
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 100])
def test_streaming_gives_what_the_whole_clip_gives(
    tokenizer: HBQTokenizer, num_frames: int, chunk_size: int
) -> None:
    clips = make_clips(num_frames, batch_size=2)
    z = tokenizer.encode(clips)
    torch.testing.assert_close(tokenizer.encode_streaming(clips, chunk_size=chunk_size), z, **EXACT)
    torch.testing.assert_close(
        tokenizer.decode_streaming(z, chunk_size=chunk_size), tokenizer.decode(z), **EXACT
    )


def test_gradients_through_chunks_equal_those_through_the_clip() -> None:
    tokenizer, clips = make_tokenizer(), make_clips(9)
    parameters = [*tokenizer.encoder.parameters()]
    direction = torch.randn(1, 4, 3, 2, 1, dtype=torch.float64)
    whole = torch.autograd.grad(tokenizer.encode(clips), parameters, direction)
    chunks = torch.autograd.grad(tokenizer.encode_streaming(clips), parameters, direction)
    torch.testing.assert_close(chunks, whole, **EXACT)


@pytest.mark.parametrize("num_frames", [1, 5, 9])
def test_latents_of_a_prefix_are_the_prefix_of_the_latents(
    tokenizer: HBQTokenizer, num_frames: int
) -> None:
    clips = make_clips(13)
    z = tokenizer.encode(clips[:, :, :num_frames])
    torch.testing.assert_close(z, tokenizer.encode(clips)[:, :, : z.shape[2]], **EXACT)


@pytest.mark.parametrize("num_latents", [1, 2, 3])
def test_frames_of_a_prefix_of_latents_are_the_prefix_of_the_frames(
    tokenizer: HBQTokenizer, num_latents: int
) -> None:
    z = torch.rand(1, 4, 4, 2, 1, dtype=torch.float64) * 2 - 1
    clips = tokenizer.decode(z[:, :, :num_latents])
    torch.testing.assert_close(clips, tokenizer.decode(z)[:, :, : clips.shape[2]], **EXACT)


@pytest.mark.parametrize(("frame", "first_latent"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_a_changed_frame_changes_its_own_latent_and_none_before(
    tokenizer: HBQTokenizer, frame: int, first_latent: int
) -> None:
    clips = make_clips(9)
    changed = clips.clone()
    changed[:, :, frame] = -clips[:, :, frame]
    difference = (tokenizer.encode(changed) - tokenizer.encode(clips)).abs().amax((0, 1, 3, 4))
    assert (difference[:first_latent] < 1e-12).all()
    assert difference[first_latent] > 1e-6


def test_one_network_serves_two_streams_at_a_time(tokenizer: HBQTokenizer) -> None:
    latents = torch.rand(2, 1, 4, 3, 2, 1, dtype=torch.float64) * 2 - 1
    streams = [tokenizer.decode_chunks(z.split(1, dim=2)) for z in latents]
    pairs = [*zip(*streams, strict=True)]
    for index, z in enumerate(latents):
        clip = torch.cat([pair[index] for pair in pairs], dim=2)
        torch.testing.assert_close(clip, tokenizer.decode(z), **EXACT)


def test_chunks_are_decoded_when_asked_for_and_not_before(tokenizer: HBQTokenizer) -> None:
    taken = []

    def latents() -> Iterator[Tensor]:
        for index in range(1000):
            taken.append(index)
            yield torch.zeros(1, 4, 1, 2, 1, dtype=torch.float64)

    frames = tokenizer.decode_chunks(latents())
    assert [next(frames).shape[2] for _ in range(3)] == [1, 4, 4]
    assert taken == [0, 1, 2]


def test_samples_of_a_batch_do_not_see_each_other(tokenizer: HBQTokenizer) -> None:
    clips = make_clips(5, batch_size=3)
    alone = [tokenizer.decode(tokenizer.encode(clip)) for clip in clips.split(1)]
    torch.testing.assert_close(tokenizer.decode(tokenizer.encode(clips)), torch.cat(alone), **EXACT)


# ------------------------------------------------------------------ codes


def test_forward_is_encode_quantize_decode(tokenizer: HBQTokenizer) -> None:
    clips = make_clips(5)
    output = tokenizer(clips)
    codes = tokenizer.quantize(output.z)
    assert torch.equal(output.z, tokenizer.encode(clips))
    assert torch.equal(output.z_hat, tokenizer.dequantize(codes))
    assert torch.equal(output.reconstruction, tokenizer.detokenize(codes))
    assert torch.equal(codes, tokenizer.tokenize(clips))


def test_quantization_is_within_half_a_bin_and_idempotent(tokenizer: HBQTokenizer) -> None:
    output = tokenizer(make_clips(5))
    assert (output.z - output.z_hat).abs().max() <= 2.0**-TINY.num_rounds
    codes = tokenizer.quantize(output.z_hat)
    assert torch.equal(tokenizer.dequantize(codes), output.z_hat)


def test_codes_of_chunks_are_the_codes_of_the_clip(tokenizer: HBQTokenizer) -> None:
    clips = make_clips(9)
    codes = tokenizer.tokenize(clips)
    assert torch.equal(tokenizer.tokenize(clips, chunk_size=1), codes)
    torch.testing.assert_close(
        tokenizer.detokenize(codes, chunk_size=1), tokenizer.detokenize(codes), **EXACT
    )


def test_autocast_reaches_encode_but_not_tokenize() -> None:
    tokenizer, clips = make_tokenizer().float(), make_clips(5).float()
    z, codes = tokenizer.encode(clips), tokenizer.tokenize(clips)
    with torch.autocast("cpu", torch.bfloat16):
        assert tokenizer.encode(clips).dtype == torch.bfloat16
        assert torch.equal(tokenizer.tokenize(clips), codes)
    # 20 layers of values with 8 bits each
    torch.testing.assert_close(
        tokenizer.bfloat16().encode(clips.bfloat16()).float(), z, rtol=0, atol=0.05
    )


def test_a_model_cast_to_bfloat16_makes_codes_and_pictures() -> None:
    tokenizer, clips = make_tokenizer().bfloat16(), make_clips(5).float()
    codes = tokenizer.tokenize(clips)
    assert codes.dtype == torch.long
    assert tokenizer.detokenize(codes).dtype == torch.bfloat16


# ------------------------------------------------------------------ parameters


def gradients(tokenizer: HBQTokenizer, clips: Tensor) -> dict[str, Tensor | None]:
    tokenizer(clips).reconstruction.square().sum().backward()
    return {name: p.grad for name, p in tokenizer.named_parameters()}


def has_none(gradient: Tensor | None) -> bool:
    return gradient is None or not gradient.any()


def test_a_clip_gives_every_parameter_a_gradient_but_the_unused_half_of_conv1() -> None:
    grads = gradients(make_tokenizer(), make_clips(9))
    assert [name for name, gradient in grads.items() if has_none(gradient)] == []
    for name in ("conv1.weight", "conv1.bias"):
        used, unused = grads[name].split(TINY.latent_channels)
        assert used.flatten(1).any(1).all() if used.ndim > 1 else used.all()
        assert not unused.any()


def test_an_image_leaves_the_temporal_convolutions_alone() -> None:
    grads = gradients(make_tokenizer(), make_clips(1))
    without = {name for name, gradient in grads.items() if has_none(gradient)}
    assert without == {name for name in grads if ".time_conv." in name}
    assert len(without) == 8


def test_bypassed_attention_changes_the_result_and_gets_no_gradient() -> None:
    tokenizer = make_tokenizer()
    bypassed = make_tokenizer(TokenizerConfig(**{**asdict(TINY), "use_mid_attention": False}))
    bypassed.load_state_dict(tokenizer.state_dict())
    clips = make_clips(5)
    assert (tokenizer.encode(clips) - bypassed.encode(clips)).abs().max() > 1e-3
    without = {name for name, g in gradients(bypassed, clips).items() if has_none(g)}
    assert without == {name for name in tokenizer.state_dict() if ".middle.1." in name}


def test_gradient_of_the_latents_passes_the_quantizer_unchanged() -> None:
    tokenizer = make_tokenizer()
    output = tokenizer(make_clips(5))
    of_z, of_z_hat = torch.autograd.grad(
        output.reconstruction.square().sum(), (output.z, output.z_hat)
    )
    assert of_z_hat.any()
    assert torch.equal(of_z, of_z_hat)


def test_initialization_is_complete_and_starts_without_attention() -> None:
    tokenizer = HBQTokenizer(TINY)
    for parameter in tokenizer.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    tokenizer.init_weights()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.any() or name.endswith("middle.1.proj.weight"), name
    assert not tokenizer.encoder.middle[1].proj.weight.any()
    assert (tokenizer.encoder.middle[1].norm.gamma == 1).all()


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 16, 16), r"1 \+ 4 k frames, got 4; take 1 of them"),
        ((1, 3, 7, 16, 16), r"1 \+ 4 k frames, got 7; take 5 of them"),
        ((1, 3, 0, 16, 16), r"1 \+ 4 k frames, got 0\."),
        ((1, 3, 1, 16, 12), r"multiples of 8, got 16 x 12; resize or crop"),
        ((1, 3, 16, 16), r"\(b, 3, f, h, w\).*images\.unsqueeze\(2\)"),
        ((1, 1, 1, 16, 16), r"\(b, 3, f, h, w\), got \(1, 1, 1, 16, 16\)"),
    ],
)
def test_clips_that_do_not_fit_are_refused(
    tokenizer: HBQTokenizer, shape: tuple[int, ...], message: str
) -> None:
    clips = torch.zeros(shape, dtype=torch.float64)
    for encode in (tokenizer.encode, tokenizer.encode_streaming):
        with pytest.raises(ValueError, match=message):
            encode(clips)


def test_later_chunks_of_a_wrong_length_are_refused(tokenizer: HBQTokenizer) -> None:
    latents = tokenizer.encode_chunks([make_clips(5), make_clips(6)])
    next(latents)
    with pytest.raises(ValueError, match=r"a multiple of 4 frames, got 6; take 4 of them"):
        next(latents)


def test_latents_of_another_tokenizer_are_refused(tokenizer: HBQTokenizer) -> None:
    with pytest.raises(ValueError, match=r"\(b, 4, f, h, w\), got \(1, 5, 1, 2, 2\).*same latent"):
        tokenizer.decode(torch.zeros(1, 5, 1, 2, 2))


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_empty_chunks_are_refused(tokenizer: HBQTokenizer, chunk_size: int) -> None:
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got {chunk_size}"):
        tokenizer.encode_streaming(make_clips(5), chunk_size=chunk_size)
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got {chunk_size}"):
        tokenizer.decode_streaming(torch.zeros(1, 4, 2, 2, 1), chunk_size=chunk_size)


def test_config_names_all_its_issues_at_once() -> None:
    with pytest.raises(ValueError, match=r"latent_channels.*num_rounds.*got 17.*temporal_down"):
        TokenizerConfig(latent_channels=0, num_rounds=17, temporal_downsample=(True,))


@pytest.mark.parametrize("multipliers", [(1, 2), (2, 3)])
def test_levels_that_a_shortcut_cannot_connect_are_refused(multipliers: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"encoder level 1 cannot connect .* channels"):
        TokenizerConfig(width_multipliers=multipliers, temporal_downsample=(True,))


def test_config_survives_a_trip_through_lists() -> None:
    data = {**asdict(TINY), "width_multipliers": [1, 2, 2], "temporal_downsample": [True, True]}
    assert TokenizerConfig(**data) == TINY
    assert hash(TokenizerConfig(**data)) == hash(TINY)
