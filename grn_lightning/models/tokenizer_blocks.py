"""Encoder and decoder of the HBQ tokenizer: levels of residual blocks around halvings.

Source: GRN (arXiv 2604.13030), video tokenizer. The attributes carry the names of the published
weights; that is why the levels of `downsamples` hold `downsamples` again.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from grn_lightning.nn.blocks3d import ChannelNorm, ResidualBlock, SpatialAttention
from grn_lightning.nn.conv3d import (
    CausalConv3d,
    StreamCache,
    TemporalModule,
    TemporalSequential,
    is_first_chunk,
)
from grn_lightning.nn.resample3d import Downsample, Upsample, average_down, duplicate_up


class LevelSizes(NamedTuple):
    """Sizes of one level of the encoder or decoder."""

    in_channels: int
    out_channels: int
    time_factor: int
    """2 if the level halves or doubles time, else 1."""
    space_factor: int
    """2 if the level halves or doubles height and width, else 1."""

    @property
    def block_size(self) -> int:
        """Positions of the finer grid per position of the coarser one."""
        return self.time_factor * self.space_factor**2


class EncoderLevel(TemporalModule):
    """Residual blocks, then halving; beside them an averaging shortcut."""

    def __init__(self, sizes: LevelSizes, num_blocks: int) -> None:
        super().__init__()
        self.sizes = sizes
        c, c_out = sizes.in_channels, sizes.out_channels
        layers: list[nn.Module] = [
            ResidualBlock(c if i == 0 else c_out, c_out) for i in range(num_blocks)
        ]
        if sizes.space_factor == 2:
            layers.append(Downsample(c_out, is_temporal=sizes.time_factor == 2))
        self.downsamples = TemporalSequential(*layers)

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Map `(b, c, f, h, w)` to `(b, c', f', h', w')`, smaller by the factors of the level."""
        _, c_out, time_factor, space_factor = self.sizes
        shortcut = average_down(
            x, out_channels=c_out, time_factor=time_factor, space_factor=space_factor
        )
        return self.downsamples(x, cache) + shortcut


class DecoderLevel(TemporalModule):
    """Residual blocks, then doubling; beside them a repeating shortcut, not in the last level."""

    def __init__(self, sizes: LevelSizes, num_blocks: int) -> None:
        super().__init__()
        self.sizes = sizes
        c, c_out = sizes.in_channels, sizes.out_channels
        layers: list[nn.Module] = [
            ResidualBlock(c if i == 0 else c_out, c_out) for i in range(num_blocks)
        ]
        if sizes.space_factor == 2:
            layers.append(Upsample(c_out, is_temporal=sizes.time_factor == 2))
        self.upsamples = TemporalSequential(*layers)

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Map `(b, c, f, h, w)` to `(b, c', f', h', w')`, larger by the factors of the level."""
        _, c_out, time_factor, space_factor = self.sizes
        y = self.upsamples(x, cache)
        if space_factor == 1:
            return y
        shortcut = duplicate_up(
            x, out_channels=c_out, time_factor=time_factor, space_factor=space_factor
        )
        num_surplus = time_factor - 1 if is_first_chunk(cache) else 0
        return y + shortcut[:, :, num_surplus:]


def _middle(channels: int, *, use_attention: bool) -> TemporalSequential:
    return TemporalSequential(
        ResidualBlock(channels, channels),
        SpatialAttention(channels, is_active=use_attention),
        ResidualBlock(channels, channels),
    )


def _head(in_channels: int, out_channels: int) -> TemporalSequential:
    return TemporalSequential(
        ChannelNorm(in_channels, use_silu=True),
        nn.Identity(),  # place of the SiLU in the published names
        CausalConv3d(in_channels, out_channels),
    )


class Encoder(TemporalModule):
    """A first convolution, the levels from fine to coarse, a middle, a head.

    Args:
        in_channels: Channels of the patches.
        out_channels: Channels of the features, two per latent channel.
        levels: Sizes, finest first.
        num_res_blocks: Residual blocks per level.
        use_mid_attention: Whether the attention block of the middle acts or is bypassed.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        levels: Sequence[LevelSizes],
        num_res_blocks: int,
        use_mid_attention: bool,
    ) -> None:
        super().__init__()
        width = levels[-1].out_channels
        self.conv1 = CausalConv3d(in_channels, levels[0].in_channels)
        self.downsamples = TemporalSequential(
            *(EncoderLevel(level, num_res_blocks) for level in levels)
        )
        self.middle = _middle(width, use_attention=use_mid_attention)
        self.head = _head(width, out_channels)

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Map patches `(b, c, f, h, w)`, a clip or a chunk, to features `(b, c', f', h', w')`."""
        for stage in (self.conv1, self.downsamples, self.middle, self.head):
            x = stage(x, cache)
        return x


class Decoder(TemporalModule):
    """A first convolution, a middle, the levels from coarse to fine, a head.

    Args:
        in_channels: Channels of the latents.
        out_channels: Channels of the patches.
        levels: Sizes, coarsest first.
        num_res_blocks: Residual blocks per level.
        use_mid_attention: Whether the attention block of the middle acts or is bypassed.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        levels: Sequence[LevelSizes],
        num_res_blocks: int,
        use_mid_attention: bool,
    ) -> None:
        super().__init__()
        width = levels[0].in_channels
        self.conv1 = CausalConv3d(in_channels, width)
        self.middle = _middle(width, use_attention=use_mid_attention)
        self.upsamples = TemporalSequential(
            *(DecoderLevel(level, num_res_blocks) for level in levels)
        )
        self.head = _head(levels[-1].out_channels, out_channels)

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Map latents `(b, c, f, h, w)`, a clip or a chunk, to patches `(b, c', f', h', w')`."""
        for stage in (self.conv1, self.middle, self.upsamples, self.head):
            x = stage(x, cache)
        return x
