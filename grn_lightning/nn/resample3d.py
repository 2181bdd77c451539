"""Halving and doubling of clips in space and time, and the shortcuts that do it without weights.

Source: GRN (arXiv 2604.13030), video tokenizer. `1 + 2k` frames become `1 + k` and back: frame 0
stands alone, so that an image is a clip of one frame. The attributes carry the names of the
published weights.

The rearrangements run with the channels last, so that channels-last memory stays what it is.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from grn_lightning.nn.conv3d import (
    CausalConv3d,
    StreamCache,
    TemporalModule,
    is_first_chunk,
    per_frame,
)


def average_down(x: Tensor, *, out_channels: int, time_factor: int, space_factor: int) -> Tensor:
    """Fold blocks of neighbours into channels and average groups of the channels so made.

    Args:
        x: `(b, c, f, h, w)`; `h` and `w` are multiples of `space_factor`. If `f` is odd while
            time is halved (a first chunk), one zero frame is put before it.
        out_channels: Divides `c * time_factor * space_factor**2`.
        time_factor: Frames per block, 1 or 2.
        space_factor: Rows and columns per block.

    Returns:
        `(b, out_channels, ceil(f / time_factor), h / space_factor, w / space_factor)`.
    """
    block_size = time_factor * space_factor**2
    if block_size == 1 and out_channels == x.shape[1]:
        return x
    if x.shape[1] * block_size // out_channels % space_factor**2 == 0:
        # Whole squares fall into one group, as in every published level: pooling is faster.
        pool = nn.AvgPool2d(space_factor)
        x, space_factor = per_frame(pool, x), 1
    if x.shape[2] % time_factor:
        x = F.pad(x, (0, 0, 0, 0, 1, 0))
    y = rearrange(
        x.movedim(1, -1),
        "b (f ft) (h fh) (w fw) c -> b f h w (c ft fh fw)",
        ft=time_factor,
        fh=space_factor,
        fw=space_factor,
    )
    return y.unflatten(-1, (out_channels, -1)).mean(-1).movedim(-1, 1)


def duplicate_up(x: Tensor, *, out_channels: int, time_factor: int, space_factor: int) -> Tensor:
    """Repeat channels and unfold them into blocks of neighbours: the counterpart of averaging down.

    Args:
        x: `(b, c, f, h, w)`.
        out_channels: `out_channels * time_factor * space_factor**2` is a multiple of `c`.
        time_factor: Frames per block, 1 or 2.
        space_factor: Rows and columns per block.

    Returns:
        `(b, out_channels, f * time_factor, h * space_factor, w * space_factor)`. Of a first chunk
        the caller drops the first `time_factor - 1` frames.
    """
    sizes = {"ft": time_factor, "fh": space_factor, "fw": space_factor}
    x = x.movedim(1, -1)
    if x.shape[-1] == out_channels:  # every block is one value: saves the copy made by repeating
        y = repeat(x, "b f h w c -> b (f ft) (h fh) (w fw) c", **sizes)
    else:
        x = x.repeat_interleave(out_channels * time_factor * space_factor**2 // x.shape[-1], dim=-1)
        y = rearrange(x, "b f h w (c ft fh fw) -> b (f ft) (h fh) (w fw) c", **sizes)
    return y.movedim(-1, 1)


class Downsample(TemporalModule):
    """Halve height and width by a convolution of stride 2, then time if asked to.

    Args:
        num_channels: Channels of input and output.
        is_temporal: Whether frames are halved too. Frame 0 of the clip passes unchanged and every
            later output frame is computed from three frames.
    """

    def __init__(self, num_channels: int, *, is_temporal: bool) -> None:
        super().__init__()
        conv = nn.Conv2d(num_channels, num_channels, 3, stride=2)
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv)
        self.time_conv: nn.Conv3d | None = None
        if is_temporal:
            self.time_conv = nn.Conv3d(num_channels, num_channels, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Map `(b, c, f, h, w)` to `(b, c, f', h / 2, w / 2)`.

        If temporal, `1 + 2k` frames of a first chunk become `1 + k`, `2k` of a later one `k`.
        """
        x = per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        past = cache.frames.get(self) if cache is not None else None
        if cache is not None:
            cache.remember(self, x, 1)
        if past is not None:
            return self.time_conv(torch.cat([past, x], dim=2))
        if x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)


class Upsample(TemporalModule):
    """Double time if asked to, then height and width by repetition and a convolution.

    Args:
        num_channels: Channels of input and output.
        is_temporal: Whether frames are doubled too. Frame 0 of the clip passes unchanged and is
            invisible to the temporal convolution; each later frame becomes two.
    """

    def __init__(self, num_channels: int, *, is_temporal: bool) -> None:
        super().__init__()
        conv = nn.Conv2d(num_channels, num_channels, 3, padding=1)
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest-exact"), conv)
        self.time_conv: CausalConv3d | None = None
        if is_temporal:
            self.time_conv = CausalConv3d(num_channels, 2 * num_channels, (3, 1, 1))

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Map `(b, c, f, h, w)` to `(b, c, f', 2 h, 2 w)`.

        If temporal, `1 + k` frames of a first chunk become `1 + 2k`, `k` of a later one `2k`.
        """
        if self.time_conv is not None:
            num_alone = 1 if is_first_chunk(cache) else 0
            alone, rest = x[:, :, :num_alone], x[:, :, num_alone:]
            if rest.shape[2] > 0:
                y = self.time_conv(rest, cache).movedim(1, -1)
                y = rearrange(y, "b f h w (two c) -> b (f two) h w c", two=2).movedim(-1, 1)
                x = torch.cat([alone, y], dim=2)
        return per_frame(self.resample, x)
