"""VQTokenizer: the convolutional image tokenizer with a learned codebook (LlamaGen's VQ-16).

The baseline that coarse-to-fine prediction was published on (arXiv 2503.16194): one code per
position, out of a codebook of unit vectors. It speaks the language of `HBQTokenizer`, so that both
train, are cached and are judged by the same code; pictures are clips of one frame.

`b` batch, `c` channels, `h w` pixels, `h' w'` grid, `d` width of a codeword, `k` codebook size.
Parameter names and shapes are those of the published checkpoints.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grn_lightning.functional.hbq import ElementSizes
from grn_lightning.models.tokenizer import TokenizerOutput
from grn_lightning.nn.quantizers import CodeSizes, QuantizerConfig

_NUM_GROUPS = 32  # of every group normalization, as published


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQTokenizerConfig:
    """Sizes of a `VQTokenizer` and weights of its codebook losses."""

    codebook_size: int = 16384
    """Number of codewords `k`."""
    codebook_dim: int = 8
    """Width `d` of a codeword; codewords and latents have unit length."""
    width: int = 128
    """Channels at full resolution, a multiple of 32."""
    width_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of every level, in units of `width`; each level but the last halves the picture."""
    num_res_blocks: int = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    feature_width: int = 256
    """Channels between encoder and codebook (`z_channels`)."""
    commitment_weight: float = 0.25
    """Weight of the distance of latents to their fixed codewords."""
    codebook_weight: float = 1.0
    """Weight of the distance of codewords to the fixed latents."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        issues = []
        widths = [self.width * multiplier for multiplier in self.width_multipliers]
        if not widths or any(width % _NUM_GROUPS or width < 1 for width in widths):
            issues.append(f"widths of all levels must be multiples of {_NUM_GROUPS}, got {widths}")
        if self.codebook_size < 2:
            issues.append(f"codebook_size must be at least 2, got {self.codebook_size}")
        if min(self.commitment_weight, self.codebook_weight) < 0:
            issues.append("commitment_weight and codebook_weight must be at least 0")
        if issues:
            raise ValueError("VQTokenizerConfig: " + "; ".join(issues) + ".")

    @property
    def spatial_stride(self) -> int:
        """Pixels per position along each side."""
        return 2 ** (len(self.width_multipliers) - 1)

    @property
    def temporal_stride(self) -> int:
        """Frames per latent frame; only pictures are accepted."""
        return 1

    @property
    def code_sizes(self) -> CodeSizes:
        """Channels of the latents, and codes per position with their number of values."""
        return CodeSizes(self.codebook_dim, 1, self.codebook_size, 0)

    @property
    def quantizer(self) -> QuantizerConfig:
        """What is between encoder and decoder, in the words of the switch."""
        bits = (self.codebook_size - 1).bit_length()
        return QuantizerConfig(name="vq", codebook_bits=bits, codeword_width=self.codebook_dim)

    @property
    def has_codes(self) -> bool:
        """Whether pictures become integers."""
        return True

    @property
    def has_rounds(self) -> bool:
        """Whether latents can be decoded from any number of binary rounds."""
        return False

    @property
    def num_rounds(self) -> int:
        """Binary rounds of a code: none."""
        return 0

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.codebook_dim

    @property
    def latent_width(self) -> int:
        """Channels of the latents between encoder and decoder."""
        return self.codebook_dim

    @property
    def code_channels(self) -> int:
        """Codes per position."""
        return 1

    @property
    def alphabet_size(self) -> int:
        """Values of a code."""
        return self.codebook_size

    @property
    def bits_per_position(self) -> float:
        """Bits of the code of a position."""
        return self.code_sizes.num_bits

    @property
    def targets(self) -> tuple[Literal["index"], ...]:
        """Forms in which a generator can predict the codes."""
        return ("index",)

    def element_sizes(self, target: str) -> ElementSizes:
        """Return what a generator predicts per position, and out of how many values.

        Raises:
            ValueError: If the target is none of `targets`.
        """
        if target != "index":
            raise ValueError(f"codes of a codebook are predicted as 'index', got {target!r}.")
        return ElementSizes(1, self.codebook_size)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the shape `(1, 1, h', w')` of the codes of one picture.

        Raises:
            ValueError: If it is a clip, or does not divide into positions.
        """
        if num_frames != 1:
            raise ValueError(
                f"VQTokenizer knows pictures only, got {num_frames} frames; use an HBQTokenizer "
                "for clips, or set `num_frames: 1`."
            )
        stride = self.spatial_stride
        if height % stride or width % stride:
            raise ValueError(
                f"height and width must be multiples of {stride}, got {height} x {width}."
            )
        return 1, 1, height // stride, width // stride


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_NUM_GROUPS, channels, eps=1e-6)


def _conv3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class ResidualBlock(nn.Module):
    """Two normalized convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = _conv3(in_channels, out_channels)
        self.norm2 = _norm(out_channels)
        self.conv2 = _conv3(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(b, in_channels, h, w)` to `(b, out_channels, h, w)`."""
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        x = self.conv1(F.silu(self.norm1(x)))
        return shortcut + self.conv2(F.silu(self.norm2(x)))


class SpatialAttention(nn.Module):
    """Self-attention of one head over all positions of a picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(b, c, h, w)` to the same shape."""
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.unflatten(2, x.shape[2:])
        return x + self.proj_out(attended)


class Downsample(nn.Module):
    """Halve height and width; zeros are put at the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(b, c, h, w)` to `(b, c, h/2, w/2)`."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width by repetition, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(b, c, h, w)` to `(b, c, 2h, 2w)`."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, with attention at the lowest, and a change of size."""

    def __init__(
        self,
        channels: tuple[int, int],
        num_blocks: int,
        *,
        has_attention: bool,
        resample: Literal["downsample", "upsample"] | None,
    ) -> None:
        super().__init__()
        widths = [channels[0]] + [channels[1]] * num_blocks
        self.res = nn.ModuleList(ResidualBlock(*pair) for pair in pairwise(widths))
        self.attn = nn.ModuleList(
            SpatialAttention(channels[1]) for _ in range(num_blocks if has_attention else 0)
        )
        if resample == "downsample":
            self.downsample = Downsample(channels[1])
        elif resample == "upsample":
            self.upsample = Upsample(channels[1])

    def forward(self, x: Tensor) -> Tensor:
        """Map `(b, c, h, w)` to the channels and the size of the next level."""
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [
            ResidualBlock(channels, channels),
            SpatialAttention(channels),
            ResidualBlock(channels, channels),
        ]
    )


class Encoder(nn.Module):
    """Pictures to features of the lowest resolution."""

    def __init__(self, config: VQTokenizerConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in (1, *config.width_multipliers)]
        last = len(config.width_multipliers) - 1
        self.conv_in = _conv3(3, config.width)
        self.conv_blocks = nn.ModuleList(
            Level(
                (widths[i], widths[i + 1]),
                config.num_res_blocks,
                has_attention=i == last,
                resample=None if i == last else "downsample",
            )
            for i in range(last + 1)
        )
        self.mid = _middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv3(widths[-1], config.feature_width)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(b, 3, h, w)` to `(b, feature_width, h', w')`."""
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Features of the lowest resolution to pictures; levels are numbered from the lowest."""

    def __init__(self, config: VQTokenizerConfig) -> None:
        super().__init__()
        multipliers = config.width_multipliers[::-1]
        widths = [config.width * m for m in (multipliers[0], *multipliers)]
        last = len(multipliers) - 1
        self.conv_in = _conv3(config.feature_width, widths[0])
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            Level(
                (widths[i], widths[i + 1]),
                config.num_res_blocks + 1,
                has_attention=i == 0,
                resample=None if i == last else "upsample",
            )
            for i in range(last + 1)
        )
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv3(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(b, feature_width, h', w')` to `(b, 3, h, w)`."""
        x = self.conv_in(x)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    """Codewords of unit length; called, it looks for the nearest."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        with torch.no_grad():
            self.embedding.weight.uniform_(-1 / size, 1 / size)
            self.embedding.weight.copy_(self.codewords())

    def codewords(self) -> Tensor:
        """Return all codewords `(k, d)`, float32, of unit length."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def forward(self, z: Tensor) -> Tensor:
        """Map unit vectors `z` `(b, d, 1, h', w')` to codes `(b, 1, 1, h', w')` in [0, k)."""
        # Among unit vectors the nearest is the one with the largest inner product.
        return (z.float().movedim(1, -1) @ self.codewords().T).argmax(-1)[:, None]

    def look_up(self, codes: Tensor) -> Tensor:
        """Map codes `(b, 1, 1, h', w')` to codewords `(b, d, 1, h', w')`."""
        return F.embedding(codes.squeeze(1), self.codewords()).movedim(-1, 1)


class VQTokenizer(nn.Module):
    """Pictures in [-1, 1] to one code per position and back.

    Args:
        config: Sizes.
    """

    def __init__(self, config: VQTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.codebook_size, config.codebook_dim)
        self.quant_conv = nn.Conv2d(config.feature_width, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.feature_width, 1)

    def forward(self, clips: Tensor) -> TokenizerOutput:
        """Reconstruct pictures `(b, 3, 1, h, w)` through the codebook.

        Raises:
            ValueError: If they are clips, or their sides do not divide into positions.
        """
        z = self.encode(clips)
        codewords = self.dequantize(self.quantize(z.detach()))
        losses = {
            "codebook_commitment": self.config.commitment_weight
            * F.mse_loss(z, codewords.detach()),
            "codebook": self.config.codebook_weight * F.mse_loss(codewords, z.detach()),
        }
        z_hat = z + (codewords - z).detach()
        auxiliary = torch.stack([*losses.values()]).sum()
        return TokenizerOutput(self.decode(z_hat), z, z_hat, auxiliary, losses)

    @property
    def encoder_parts(self) -> tuple[nn.Module, ...]:
        """What makes codes of pictures; the rest makes pictures of codes."""
        return self.encoder, self.quant_conv, self.quantize

    @property
    def last_layer(self) -> nn.Module:
        """The layer that makes pixels."""
        return self.decoder.conv_out

    def encode(self, clips: Tensor) -> Tensor:
        """Map pictures `(b, 3, 1, h, w)` to unit vectors `(b, d, 1, h', w')`."""
        if clips.ndim != 5 or clips.shape[1] != 3:
            raise ValueError(f"pictures must be (b, 3, 1, h, w), got {tuple(clips.shape)}.")
        self.config.latent_shape(*clips.shape[2:])
        z = self.quant_conv(self.encoder(clips.squeeze(2)))
        return F.normalize(z.float(), dim=1)[:, :, None]

    def decode(self, z_hat: Tensor) -> Tensor:
        """Map codewords `(b, d, 1, h', w')` to pictures `(b, 3, 1, h, w)`, not clamped."""
        weight = self.post_quant_conv.weight
        return self.decoder(self.post_quant_conv(z_hat.squeeze(2).to(weight.dtype)))[:, :, None]

    def dequantize(self, codes: Tensor) -> Tensor:
        """Map codes `(b, 1, 1, h', w')` to their codewords `(b, d, 1, h', w')`."""
        return self.quantize.look_up(codes)

    def tokenize(self, clips: Tensor) -> Tensor:
        """Map pictures `(b, 3, 1, h, w)` to codes `(b, 1, 1, h', w')` in [0, k)."""
        with torch.autocast(clips.device.type, enabled=False):
            return self.quantize(self.encode(clips.float()))

    def detokenize(self, codes: Tensor) -> Tensor:
        """Map codes `(b, 1, 1, h', w')` to pictures `(b, 3, 1, h, w)`, not clamped."""
        return self.decode(self.dequantize(codes))

    def encode_chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Encode a film `(b, 3, f, h, w)` at a time, every frame as a picture of its own.

        Yields:
            Unit vectors `(b, d, f, h', w')` of each part.
        """
        for chunk in chunks:
            yield torch.cat([self.encode(frame) for frame in chunk.split(1, dim=2)], dim=2)

    def decode_chunks(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode parts `(b, d, f, h', w')` of a film to frames `(b, 3, f, h, w)`, not clamped."""
        for z_hat in latents:
            yield torch.cat([self.decode(frame) for frame in z_hat.split(1, dim=2)], dim=2)
