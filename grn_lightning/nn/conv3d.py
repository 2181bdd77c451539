"""Causal 3-D convolution: a frame is computed from itself and from frames before it.

Source: GRN (arXiv 2604.13030), video tokenizer. Two paths give the same numbers. Without a cache a
layer sees the whole clip at once (training). With a `StreamCache` it sees the clip chunk by
chunk and remembers the last frames it was given (long clips, bounded memory). A whole clip is
therefore nothing but a first chunk that has no successor.

Layout: activations are `(b, c, f, h, w)`. They are kept in `torch.channels_last_3d` memory by the
networks that use these layers, which makes folding the frames into the batch free and was the
fastest of nine formulations on a CPU; every layer is correct for any layout.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(eq=False)
class StreamCache:
    """What the layers of one network remember between two chunks of one clip.

    The cache is the only state of a stream: the modules have none, so one network can serve
    several streams. Make a new one for every clip and every network.
    """

    frames: dict[nn.Module, Tensor] = field(default_factory=dict)
    """Per layer the last frames of its input, `(b, c, frames, h, w)`."""
    num_chunks: int = 0
    """Chunks that have passed through the whole network; the owner of the loop counts."""

    def remember(self, layer: nn.Module, x: Tensor, num_frames: int) -> None:
        """Keep a copy of the last `num_frames` frames of `x`, so that the chunk can be freed."""
        self.frames[layer] = x[:, :, -num_frames:].clone()


def is_first_chunk(cache: StreamCache | None) -> bool:
    """Tell whether frame 0 of this input is frame 0 of the clip; so it is without a cache."""
    return cache is None or cache.num_chunks == 0


def per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a 2-D layer to every frame.

    Args:
        layer: Maps `(n, c, h, w)` to `(n, c', h', w')`.
        x: `(b, c, f, h, w)`; folding its frames into the batch copies nothing if its memory is
            channels-last.

    Returns:
        `(b, c', f, h', w')`, channels-last in memory if `layer` keeps that.
    """
    b = x.shape[0]
    y = layer(x.transpose(1, 2).flatten(0, 1))  # (b f, c', h', w')
    return y.unflatten(0, (b, -1)).transpose(1, 2)


class TemporalModule(nn.Module):
    """A layer that reads earlier frames: its `forward` is `(x, cache=None)`.

    Args of `forward`:
        x: The whole clip, or one chunk, `(b, c, f, h, w)`.
        cache: Memory of the stream, read and updated; None for a whole clip.
    """


class TemporalSequential(nn.Sequential, TemporalModule):
    """A sequence of layers that hands the cache to those among them that read earlier frames."""

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Apply all layers in order."""
        for layer in self:
            x = layer(x, cache) if isinstance(layer, TemporalModule) else layer(x)
        return x


class CausalConv3d(nn.Conv3d, TemporalModule):
    """Stride-1 convolution, zero-padded to the same size: left only in time, both sides in space.

    A first chunk of one frame meets nothing but zeros in the past, so only the last temporal slice
    of the kernel contributes, and a 2-D convolution gives the result at a third of the work. Images
    never need anything else.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Extent `(time, height, width)`, or one number for all; odd in space.

    Raises:
        ValueError: If the kernel has one frame only: without a past it is an `nn.Conv3d`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int, int] = 3
    ) -> None:
        size = (kernel_size,) * 3 if isinstance(kernel_size, int) else kernel_size
        if size[0] < 2:
            raise ValueError(
                f"kernel_size must be at least 2 in time, got {size}; use nn.Conv3d for one frame."
            )
        padding = (0, size[1] // 2, size[2] // 2)
        super().__init__(in_channels, out_channels, size, padding=padding)
        self.num_past = size[0] - 1

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Convolve a clip or a chunk, `(b, c, f, h, w)` to `(b, c', f, h, w)`."""
        past = cache.frames.get(self) if cache is not None else None
        is_alone = past is None and x.shape[2] == 1
        if cache is None and is_alone:
            return per_frame(self._convolve_frame, x)
        # Joined with zeros, not padded: padding would fill the whole result with zeros first.
        parts = [torch.zeros_like(x[:, :, :1])] * self.num_past if past is None else [past]
        extended = torch.cat([*parts, x], dim=2)
        if cache is not None:
            cache.remember(self, extended, self.num_past)
        return per_frame(self._convolve_frame, x) if is_alone else super().forward(extended)

    def _convolve_frame(self, images: Tensor) -> Tensor:
        """Convolve `(n, c, h, w)` whose past is zero."""
        return F.conv2d(images, self.weight[:, :, -1], self.bias, padding=self.padding[1:])
