"""Causal convolution: equal to its definition, blind to the future, equal in pieces."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grn_lightning.nn.conv3d import (
    CausalConv3d,
    StreamCache,
    TemporalModule,
    TemporalSequential,
    is_first_chunk,
    per_frame,
)

LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]
KERNELS = [3, (3, 1, 1)]


def definition(conv: CausalConv3d, x: Tensor) -> Tensor:
    """Pad with zeros: everything on the left in time, half on each side in space."""
    time, height, width = conv.kernel_size
    rows, columns = height // 2, width // 2
    padded = F.pad(x, (columns, columns, rows, rows, time - 1, 0))
    return F.conv3d(padded, conv.weight, conv.bias)


def stream(layer: TemporalModule, x: Tensor, sizes: list[int]) -> Tensor:
    """Feed `x` to `layer` in chunks of the given numbers of frames."""
    cache, outputs = StreamCache(), []
    for chunk in x.split(sizes, dim=2):
        outputs.append(layer(chunk, cache))
        cache.num_chunks += 1
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel_size", KERNELS)
@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_convolution_and_its_gradients_equal_the_definition(
    num_frames: int, kernel_size: int | tuple[int, int, int], layout: torch.memory_format
) -> None:
    conv = CausalConv3d(3, 5, kernel_size).double()
    x = torch.randn(2, 3, num_frames, 4, 6, dtype=torch.float64).contiguous(memory_format=layout)
    inputs = (x.requires_grad_(), conv.weight, conv.bias)
    ours, expected = conv(x), definition(conv, x)
    torch.testing.assert_close(ours, expected)
    direction = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, direction),
        torch.autograd.grad(expected, inputs, direction),
    )


@pytest.mark.parametrize("kernel_size", KERNELS)
@pytest.mark.parametrize("sizes", [[7], [1, 1, 1, 1, 1, 1, 1], [1, 2, 4], [3, 4], [2, 1, 4]])
def test_chunks_give_what_the_whole_clip_gives(
    sizes: list[int], kernel_size: int | tuple[int, int, int]
) -> None:
    conv = CausalConv3d(3, 5, kernel_size).double()
    x = torch.randn(2, 3, 7, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(stream(conv, x, sizes), conv(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("frame", range(4))
def test_a_frame_depends_on_itself_and_the_two_before_only(frame: int) -> None:
    x = torch.randn(1, 2, 4, 3, 3, requires_grad=True)
    CausalConv3d(2, 3)(x)[:, :, frame].sum().backward()
    seen = x.grad.abs().sum((0, 1, 3, 4)) > 0
    assert seen.tolist() == [frame - 2 <= i <= frame for i in range(4)]


def test_streams_through_one_layer_do_not_mix() -> None:
    conv = CausalConv3d(2, 3)
    a, b = torch.randn(2, 1, 2, 4, 3, 3)
    caches = StreamCache(), StreamCache()
    outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
    for chunk_a, chunk_b in zip(a.split(1, dim=2), b.split(1, dim=2), strict=True):
        outputs[0].append(conv(chunk_a, caches[0]))
        outputs[1].append(conv(chunk_b, caches[1]))
    torch.testing.assert_close(torch.cat(outputs[0], 2), conv(a))
    torch.testing.assert_close(torch.cat(outputs[1], 2), conv(b))


def test_cache_keeps_two_frames_and_not_the_chunk_they_came_from() -> None:
    conv, cache = CausalConv3d(2, 3), StreamCache()
    conv(torch.randn(1, 2, 50, 4, 4), cache)
    (kept,) = cache.frames.values()
    assert kept.shape == (1, 2, 2, 4, 4)
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


def test_only_a_chunk_behind_another_is_not_first() -> None:
    assert is_first_chunk(None)
    assert is_first_chunk(StreamCache())
    assert not is_first_chunk(StreamCache(num_chunks=1))


def test_channels_last_memory_survives_the_convolution() -> None:
    x = torch.randn(2, 4, 5, 6, 6).contiguous(memory_format=torch.channels_last_3d)
    assert CausalConv3d(4, 8)(x).is_contiguous(memory_format=torch.channels_last_3d)


def test_folding_frames_copies_nothing_in_channels_last_memory() -> None:
    x = torch.randn(2, 4, 5, 6, 6).contiguous(memory_format=torch.channels_last_3d)
    assert per_frame(lambda images: images, x).data_ptr() == x.data_ptr()


def test_per_frame_equals_a_loop_over_frames() -> None:
    x = torch.randn(2, 3, 4, 5, 6)
    expected = torch.stack([F.avg_pool2d(frame, 2) for frame in x.unbind(2)], dim=2)
    torch.testing.assert_close(per_frame(lambda images: F.avg_pool2d(images, 2), x), expected)


def test_sequence_hands_the_cache_down_through_nested_sequences() -> None:
    def block() -> TemporalSequential:
        return TemporalSequential(CausalConv3d(2, 2), torch.nn.Tanh(), CausalConv3d(2, 2))

    layers = TemporalSequential(block(), block()).double()
    x = torch.randn(1, 2, 6, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(stream(layers, x, [1, 2, 3]), layers(x), rtol=0, atol=1e-14)


def test_kernels_without_a_past_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 2 in time, got \(1, 3, 3\); use nn\.Conv3d"):
        CausalConv3d(2, 2, (1, 3, 3))
