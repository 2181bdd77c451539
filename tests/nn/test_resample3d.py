"""Halving and doubling: shortcuts against loops over single values, frames against chunks."""

from itertools import product

import pytest
import torch
from torch import Tensor

from grn_lightning.nn.conv3d import StreamCache, TemporalModule
from grn_lightning.nn.resample3d import Downsample, Upsample, average_down, duplicate_up

# in_channels, out_channels, time_factor, space_factor: those of the published networks, and others
DOWN = [(4, 4, 1, 2), (4, 8, 2, 2), (4, 4, 1, 1), (4, 2, 2, 2), (2, 16, 2, 2)]
UP = [(4, 4, 2, 2), (8, 4, 1, 2), (8, 4, 2, 2), (4, 8, 2, 2), (16, 2, 2, 2), (4, 3, 2, 2)]


def average_loop(x: Tensor, out_channels: int, ft: int, fs: int) -> Tensor:
    """Number the values of a block channel, frame, row, column; average runs of the numbers."""
    b, c, f, h, w = x.shape
    if f % ft:
        x = torch.cat([torch.zeros(b, c, 1, h, w), x], dim=2)
        f += 1
    y = torch.zeros(b, out_channels, f // ft, h // fs, w // fs)
    group = c * ft * fs * fs // out_channels
    for number, (channel, dt, dy, dx) in enumerate(product(range(c), range(ft), *[range(fs)] * 2)):
        y[:, number // group] += x[:, channel, dt::ft, dy::fs, dx::fs] / group
    return y


def duplicate_loop(x: Tensor, out_channels: int, ft: int, fs: int) -> Tensor:
    """Number the values of an output block likewise; runs of the numbers share a channel."""
    b, c, f, h, w = x.shape
    y = torch.zeros(b, out_channels, f * ft, h * fs, w * fs)
    repeats = out_channels * ft * fs * fs // c
    places = product(range(out_channels), range(ft), *[range(fs)] * 2)
    for number, (channel, dt, dy, dx) in enumerate(places):
        y[:, channel, dt::ft, dy::fs, dx::fs] = x[:, number // repeats]
    return y


@pytest.mark.parametrize("num_frames", [1, 2, 5])
@pytest.mark.parametrize(("c", "c_out", "ft", "fs"), DOWN)
def test_average_down_equals_a_loop(c: int, c_out: int, ft: int, fs: int, num_frames: int) -> None:
    x = torch.randn(2, c, num_frames, 4, 6)
    ours = average_down(x, out_channels=c_out, time_factor=ft, space_factor=fs)
    torch.testing.assert_close(ours, average_loop(x, c_out, ft, fs))


@pytest.mark.parametrize(("c", "c_out", "ft", "fs"), UP)
def test_duplicate_up_equals_a_loop(c: int, c_out: int, ft: int, fs: int) -> None:
    x = torch.randn(2, c, 3, 2, 3)
    ours = duplicate_up(x, out_channels=c_out, time_factor=ft, space_factor=fs)
    assert torch.equal(ours, duplicate_loop(x, c_out, ft, fs))


@pytest.mark.parametrize(("c", "c_out", "ft", "fs"), DOWN)
def test_averaging_undoes_duplication(c: int, c_out: int, ft: int, fs: int) -> None:
    x = torch.randn(2, c_out, 2, 3, 3)
    wide = duplicate_up(x, out_channels=c, time_factor=ft, space_factor=fs)
    back = average_down(wide, out_channels=c_out, time_factor=ft, space_factor=fs)
    torch.testing.assert_close(back, x)


def stream(layer: TemporalModule, x: Tensor, sizes: list[int]) -> Tensor:
    cache, outputs = StreamCache(), []
    for chunk in x.split(sizes, dim=2):
        outputs.append(layer(chunk, cache))
        cache.num_chunks += 1
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("sizes", [[1, 2, 2, 2], [3, 4], [1, 6], [7]])
@pytest.mark.parametrize("is_temporal", [False, True])
def test_downsampling_in_chunks_equals_downsampling_the_clip(
    is_temporal: bool, sizes: list[int]
) -> None:
    layer = Downsample(3, is_temporal=is_temporal).double()
    x = torch.randn(2, 3, 7, 4, 4, dtype=torch.float64)
    whole = layer(x)
    assert whole.shape == (2, 3, 4 if is_temporal else 7, 2, 2)
    torch.testing.assert_close(stream(layer, x, sizes), whole, rtol=0, atol=1e-14)


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [2, 2], [1, 3], [4]])
@pytest.mark.parametrize("is_temporal", [False, True])
def test_upsampling_in_chunks_equals_upsampling_the_clip(
    is_temporal: bool, sizes: list[int]
) -> None:
    layer = Upsample(3, is_temporal=is_temporal).double()
    x = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    whole = layer(x)
    assert whole.shape == (2, 3, 7 if is_temporal else 4, 4, 4)
    torch.testing.assert_close(stream(layer, x, sizes), whole, rtol=0, atol=1e-14)


def test_spatial_halving_pads_on_the_right_and_below_only() -> None:
    layer = Downsample(1, is_temporal=False)
    conv = layer.resample[1]
    torch.nn.init.ones_(conv.weight)
    torch.nn.init.zeros_(conv.bias)
    sums = layer(torch.ones(1, 1, 1, 4, 4))[0, 0, 0]
    assert sums.tolist() == [[9, 6], [6, 4]]  # ones under the kernel


def test_frame_zero_bypasses_the_temporal_convolutions() -> None:
    x = torch.randn(1, 2, 3, 4, 4)
    for layer in (Downsample(2, is_temporal=True), Upsample(2, is_temporal=True)):
        expected = layer.resample(x[:, :, 0])
        torch.testing.assert_close(layer(x)[:, :, 0], expected)
        torch.testing.assert_close(layer(x[:, :, :1])[:, :, 0], expected)


def test_temporal_doubling_does_not_see_frame_zero() -> None:
    layer = Upsample(2, is_temporal=True)
    x = torch.randn(1, 2, 3, 2, 2)
    other = torch.cat([torch.randn(1, 2, 1, 2, 2), x[:, :, 1:]], dim=2)
    assert torch.equal(layer(x)[:, :, 1:], layer(other)[:, :, 1:])


def test_doubled_frames_come_from_the_two_halves_of_the_channels_in_turn() -> None:
    layer = Upsample(2, is_temporal=True)
    layer.resample = torch.nn.Sequential()
    x = torch.randn(1, 2, 3, 2, 2)
    even, odd = layer.time_conv(x[:, :, 1:]).chunk(2, dim=1)
    frames = [x[:, :, 0], even[:, :, 0], odd[:, :, 0], even[:, :, 1], odd[:, :, 1]]
    torch.testing.assert_close(layer(x), torch.stack(frames, dim=2))
