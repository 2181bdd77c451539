"""Discriminators have the published sizes, see the published patches and know only their batch."""

import pytest
import torch
from torch import nn

from grn_lightning.nn.batch_norm import BatchNorm
from grn_lightning.nn.discriminator import (
    DiscriminatorConfig,
    PatchDiscriminator,
    build_discriminator,
)


def small(num_axes=2, **rest):
    return build_discriminator(DiscriminatorConfig(width=4, **rest), num_axes=num_axes)


# --- published sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "num_axes", "num_parameters", "size", "logits"),
    [
        ("patch", 2, 2_765_633, (256, 256), (30, 30)),
        ("patch", 3, 11_056_961, (33, 64, 64), (28, 6, 6)),
        ("spectral", 2, 2_764_737, (256, 256), (30, 30)),
        ("spectral", 3, 11_056_065, (33, 64, 64), (28, 6, 6)),
        ("stylegan", 2, 32_305_409, (256, 256), (4, 4)),
        ("stylegan", 3, 94_977_665, (5, 256, 256), (5, 4, 4)),
    ],
)
def test_published_sizes(kind, num_axes, num_parameters, size, logits):
    with torch.device("meta"):
        judge = build_discriminator(DiscriminatorConfig(kind=kind), num_axes=num_axes)
        assert judge(torch.empty(1, 3, *size)).shape == (1, 1, *logits)
    assert sum(parameter.numel() for parameter in judge.parameters()) == num_parameters


def test_temporal_compression_has_the_same_weights_and_fewer_logits():
    config = DiscriminatorConfig(temporal_compression=True)
    with torch.device("meta"):
        judge = build_discriminator(config, num_axes=3)
        assert judge(torch.empty(1, 3, 33, 64, 64)).shape == (1, 1, 6, 6, 6)
    assert sum(parameter.numel() for parameter in judge.parameters()) == 11_056_961


def test_the_layer_table_is_the_published_one():
    with torch.device("meta"):
        judge = build_discriminator(DiscriminatorConfig(), num_axes=2)
    convs = [layer for layer in judge.layers if isinstance(layer, nn.Conv2d)]
    rows = [(c.in_channels, c.out_channels, c.stride[0], c.bias is not None) for c in convs]
    assert rows == [
        (3, 64, 2, True), (64, 128, 2, False), (128, 256, 2, False), (256, 512, 1, False),
        (512, 1, 1, True),
    ]  # fmt: skip
    assert [type(layer).__name__ for layer in judge.layers] == [
        "Conv2d", "LeakyReLU", *["Conv2d", "BatchNorm", "LeakyReLU"] * 3, "Conv2d",
    ]  # fmt: skip


@pytest.mark.parametrize(("num_axes", "expected"), [(2, [1, 2]), (3, [1, 2, 3])])
def test_spectral_norms_stand_where_the_published_ones_do(num_axes, expected):
    judge = small(num_axes, kind="spectral")
    convs = [layer for layer in judge.layers if isinstance(layer, nn.Conv2d | nn.Conv3d)]
    assert [i for i, conv in enumerate(convs) if hasattr(conv, "parametrizations")] == expected
    assert all(conv.bias is not None for conv in convs)


def test_kernels_start_at_the_published_spread():
    judge = build_discriminator(DiscriminatorConfig(width=16), num_axes=2)
    kernels = [p for name, p in judge.named_parameters() if p.ndim == 4]
    for kernel in kernels[1:-1]:
        assert float(kernel.detach().std()) == pytest.approx(0.02, rel=0.05)
        assert abs(float(kernel.detach().mean())) < 0.002
    norms = [layer for layer in judge.layers if isinstance(layer, BatchNorm)]
    assert all(norm.weight.eq(1).all() and norm.bias.eq(0).all() for norm in norms)


# --- what a logit sees ----------------------------------------------------------------------------


@pytest.mark.parametrize(("num_layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_as_many_pixels_as_is_said(num_layers, field):
    """Spectral norms, unlike batch norms, do not spread a pixel over the whole picture."""
    judge = small(kind="spectral", num_layers=num_layers).eval()
    picture = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = judge(picture)
    middle = logits.shape[-1] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], picture)
    assert (gradient != 0).any(1)[0].any(1).sum() == field
    assert (gradient != 0).any(1)[0].any(0).sum() == field


@pytest.mark.parametrize("num_axes", [2, 3])
@pytest.mark.parametrize("compression", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_shape_of_logits_is_known_beforehand(num_axes, compression, num_layers):
    size = (14, 33, 47)[-num_axes:]
    judge = small(num_axes, num_layers=num_layers, temporal_compression=compression)
    assert judge(torch.rand(2, 3, *size)).shape == (2, 1, *judge.logits_shape(*size))


def test_too_small_clips_are_refused():
    with pytest.raises(ValueError, match="num_layers=3 finds no patch in 16 x 16: take fewer"):
        small()(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="no patch in 5 x 64 x 64: .* or longer clips"):
        small(3)(torch.rand(1, 3, 5, 64, 64))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"kind": "resnet"}, "`kind` must be one of .*'stylegan'.*, got 'resnet'"),
        ({"width": 0}, "`width` must be at least 1"),
        ({"num_layers": 0}, "`num_layers` must be at least 1"),
        ({"num_blocks": 7}, "`num_blocks` must be in 1..6, got 7"),
    ],
)
def test_impossible_sizes_are_refused(wrong, text):
    with pytest.raises(ValueError, match=text):
        DiscriminatorConfig(**wrong)


def test_a_style_discriminator_is_its_formula():
    """One block, written out: the blur is [1, 2, 1] / 4 twice, the sum is divided by root 2."""
    judge = small(kind="stylegan", num_blocks=1)
    first, act, block, *rest = judge.layers
    x = act(first(torch.rand(2, 3, 8, 8)))
    conv_1, _, conv_2, _, _, conv_3 = block.main
    y = act(conv_2(act(conv_1(x))))
    padded = nn.functional.pad(y, (1, 1, 1, 1))
    smooth = sum(
        a * b * padded[..., i : i + 8, j : j + 8]
        for i, a in enumerate((0.25, 0.5, 0.25))
        for j, b in enumerate((0.25, 0.5, 0.25))
    )
    torch.testing.assert_close(block(x), (conv_3(smooth) + block.skip(x)) / 2**0.5)


# --- batch statistics -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 4), (3, 4, 4)])
@pytest.mark.parametrize("is_training", [True, False])
def test_batch_norm_is_that_of_the_batch_in_both_modes(size, is_training):
    norm = BatchNorm(5).train(is_training)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = 3 * torch.randn(6, 5, *size) + 1
    flat = x.transpose(0, 1).flatten(1)
    mean, var = flat.mean(1), flat.var(1, correction=0)
    shape = (1, 5, *[1] * len(size))
    scaled = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
    expected = scaled * norm.weight.view(shape) + norm.bias.view(shape)
    torch.testing.assert_close(norm(x), expected)
    assert not list(norm.buffers())


def test_a_patch_discriminator_of_clips_is_one_of_frames_where_time_stands_still():
    """Kernels that look at one frame only: the layers of frames and clips are the same layers."""
    frames, clips = small(2, num_layers=1), small(3, num_layers=1)
    assert isinstance(clips, PatchDiscriminator)
    with torch.no_grad():
        for flat, deep in zip(frames.parameters(), clips.parameters(), strict=True):
            if flat.ndim == 4:
                deep.zero_()
                deep[:, :, 1] = flat
            else:
                deep.copy_(flat)
    clip = torch.rand(2, 3, 1, 16, 16).expand(-1, -1, 9, -1, -1)
    expected = frames(clip[:, :, 0])
    for frame in clips(clip).unbind(2):
        torch.testing.assert_close(frame, expected, rtol=1e-4, atol=1e-5)
