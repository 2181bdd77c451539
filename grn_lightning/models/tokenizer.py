"""HBQTokenizer: clips to codes and back; a causal 3-D autoencoder around a binary quantizer.

Source: GRN (arXiv 2604.13030), layers and sizes of the published image and video tokenizers. The
tensor names are the published ones, so official weights load strictly and without a map.

An image is a clip of one frame. `1 + 4k` frames become `1 + k` latent frames, and a latent frame
knows nothing of later frames. Encoder and decoder run over the whole clip at once (training), or
over chunks of it with an explicit `StreamCache` (long clips, bounded memory): same result.

The quantizer is a switch (`nn/quantizers.py`): HBQ, or a baseline with the same bits per position.

Different on purpose: mid-block attention is a switch, because published weights exist that were
trained with it and others that were trained with it bypassed; frames that do not fit the temporal
stride are refused instead of dropped; a chunk may hold more than one latent frame.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from grn_lightning.functional.hbq import (
    MAX_ROUNDS,
    ElementSizes,
    element_sizes,
    hbq_decode,
    hbq_encode,
)
from grn_lightning.functional.patches import patchify, unpatchify
from grn_lightning.models.tokenizer_blocks import Decoder, Encoder, LevelSizes
from grn_lightning.nn.blocks3d import ChannelNorm, SpatialAttention
from grn_lightning.nn.conv3d import CausalConv3d, StreamCache, is_first_chunk
from grn_lightning.nn.mlp import full_precision
from grn_lightning.nn.quantizers import NO_CODES, CodeSizes, QuantizerConfig, build_quantizer

COLOURS = 3


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Sizes of an `HBQTokenizer`; the defaults are the published image tokenizer."""

    latent_channels: int = 16
    """Channels `d` of the latents."""
    num_rounds: int = 4
    """Binary rounds `M`; a latent channel has `2**M` levels."""
    quantizer: QuantizerConfig = QuantizerConfig()
    """Kind of quantizer; every kind gets the `M d` bits per position that HBQ has."""
    encoder_width: int = 160
    """Channels in the encoder per unit of `width_multipliers`."""
    decoder_width: int = 256
    """Channels in the decoder per unit of `width_multipliers`."""
    width_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """Width of each level, finest first. Every level but the last halves height and width."""
    num_res_blocks: int = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    """Whether a level halves time as well; one entry per level but the last, finest first."""
    patch_size: int = 2
    """Side of the squares of pixels that are folded into channels at the outset."""
    use_mid_attention: bool = True
    """Whether the attention blocks in the middle of encoder and decoder act or are bypassed."""

    def __post_init__(self) -> None:
        """Refuse impossible sizes, all issues at once."""
        for name in ("width_multipliers", "temporal_downsample"):  # lists, where read from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.quantizer, Mapping):  # likewise
            object.__setattr__(self, "quantizer", QuantizerConfig(**self.quantizer))
        issues = self._count_issues() or self._shortcut_issues() or self._quantizer_issues()
        if issues:
            raise ValueError("TokenizerConfig: " + "; ".join(issues) + ".")

    def _count_issues(self) -> list[str]:
        counts = ("latent_channels", "encoder_width", "decoder_width", "num_res_blocks")
        issues = [
            f"{name} must be at least 1, got {getattr(self, name)}"
            for name in (*counts, "patch_size")
            if getattr(self, name) < 1
        ]
        if not 1 <= self.num_rounds <= MAX_ROUNDS:
            issues.append(f"num_rounds must be in 1..{MAX_ROUNDS}, got {self.num_rounds}")
        if min(self.width_multipliers, default=0) < 1:
            issues.append(f"width_multipliers must be positive, got {self.width_multipliers}")
        if len(self.temporal_downsample) != len(self.width_multipliers) - 1:
            issues.append(
                f"temporal_downsample must be one shorter than width_multipliers "
                f"{self.width_multipliers}, got {self.temporal_downsample}"
            )
        return issues

    def _shortcut_issues(self) -> list[str]:
        """Find levels whose parameter-free shortcut cannot share out its channels evenly."""
        return [
            f"{side} level {index} cannot connect {level.in_channels} channels to "
            f"{level.out_channels} by a shortcut over blocks of {level.block_size}; "
            "change width_multipliers (the last two are usually equal)"
            for side, levels in (("encoder", self.encoder_levels), ("decoder", self.decoder_levels))
            for index, level in enumerate(levels)
            if (side == "encoder" and level.in_channels * level.block_size % level.out_channels)
            or (
                side == "decoder"
                and level.block_size > 1
                and level.out_channels * level.block_size % level.in_channels
            )
        ]

    def _quantizer_issues(self) -> list[str]:
        try:
            self.quantizer.sizes(latent_channels=self.latent_channels, num_rounds=self.num_rounds)
        except ValueError as error:
            return [str(error).rstrip(".")]
        return []

    @property
    def code_sizes(self) -> CodeSizes:
        """Channels of the latents, and codes per position with their number of values."""
        return self.quantizer.sizes(
            latent_channels=self.latent_channels, num_rounds=self.num_rounds
        )

    @property
    def latent_width(self) -> int:
        """Channels of the latents between encoder and decoder; `d` with HBQ."""
        return self.code_sizes.latent_width

    @property
    def has_rounds(self) -> bool:
        """Whether latents lie in (-1, 1) and can be decoded from any number of binary rounds."""
        return self.quantizer.name in ("hbq", "none")

    @property
    def has_codes(self) -> bool:
        """Whether there are codes; not without a quantizer."""
        return self.code_channels > 0

    @property
    def code_channels(self) -> int:
        """Codes per position; `d` with HBQ, 0 without a quantizer."""
        return self.code_sizes.code_channels

    @property
    def alphabet_size(self) -> int:
        """Values of a code; `2**M` with HBQ, 0 without a quantizer."""
        return self.code_sizes.alphabet_size

    @property
    def bits_per_position(self) -> float:
        """Bits of the codes of a position; `M d` with HBQ, infinite without a quantizer."""
        return self.code_sizes.num_bits

    @property
    def targets(self) -> tuple[Literal["index", "bit"], ...]:
        """Forms in which a generator can predict the codes; bits are those of HBQ.

        Raises:
            ValueError: If there are no codes.
        """
        if not self.has_codes:
            raise ValueError(NO_CODES)
        return ("index", "bit") if self.quantizer.name == "hbq" else ("index",)

    def element_sizes(self, target: str) -> ElementSizes:
        """Return what a generator predicts per position, and out of how many values each.

        Raises:
            ValueError: If the target is none of `targets`.
        """
        if target not in self.targets:
            raise ValueError(
                f"codes of quantizer {self.quantizer.name!r} are predicted as "
                f"{' or '.join(map(repr, self.targets))}, got {target!r}."
            )
        if target == "index":
            return ElementSizes(self.code_channels, self.alphabet_size)
        return element_sizes(self.latent_channels, num_rounds=self.num_rounds, target=target)

    @property
    def encoder_levels(self) -> list[LevelSizes]:
        """Sizes of the encoder's levels, finest first."""
        widths = [self.encoder_width * m for m in (1, *self.width_multipliers)]
        return _level_sizes(widths, self.temporal_downsample)

    @property
    def decoder_levels(self) -> list[LevelSizes]:
        """Sizes of the decoder's levels, coarsest first."""
        multipliers = self.width_multipliers[::-1]
        widths = [self.decoder_width * m for m in (multipliers[0], *multipliers)]
        return _level_sizes(widths, self.temporal_downsample[::-1])

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent position, down and across."""
        return self.patch_size * 2 ** len(self.temporal_downsample)

    @property
    def temporal_stride(self) -> int:
        """Frames per latent frame; the first latent frame stands for one frame."""
        return 2 ** sum(self.temporal_downsample)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the shape `(d, f', h', w')` of the latents, and HBQ codes, of one clip.

        With another quantizer the first number is `latent_width`; codes have `code_channels`.

        Args:
            num_frames: Frames, `1 + temporal_stride * k`; 1 for an image.
            height: Rows of pixels, a multiple of `spatial_stride`.
            width: Columns of pixels, a multiple of `spatial_stride`.

        Raises:
            ValueError: If a number does not fit its stride.
        """
        _check_frames(num_frames, self.temporal_stride, is_first=True)
        stride = self.spatial_stride
        if height < 1 or width < 1 or height % stride or width % stride:
            raise ValueError(
                f"height and width must be positive multiples of {stride}, got {height} x {width}; "
                "resize or crop the frames first."
            )
        num_latents = 1 + (num_frames - 1) // self.temporal_stride
        return self.latent_width, num_latents, height // stride, width // stride


def _level_sizes(widths: list[int], is_temporal: tuple[bool, ...]) -> list[LevelSizes]:
    factors = [(2 if flag else 1, 2) for flag in is_temporal] + [(1, 1)]
    pairs = zip(widths[:-1], widths[1:], factors, strict=True)
    return [LevelSizes(before, after, *factor) for before, after, factor in pairs]


def _check_frames(num_frames: int, stride: int, *, is_first: bool) -> None:
    """Refuse a number of frames that is not `1 + stride k`, in later chunks `stride (1 + k)`."""
    offset = 1 if is_first else 0
    if num_frames >= 1 and (num_frames - offset) % stride == 0:
        return
    what = f"a clip, or the first chunk of one, must have 1 + {stride} k frames"
    if not is_first:
        what = f"every chunk but the first must have a multiple of {stride} frames"
    fitting = (num_frames - offset) // stride * stride + offset
    advice = f"; take {fitting} of them" if fitting > 0 else ""
    raise ValueError(f"{what}, got {num_frames}{advice}.")


def _check_chunk_size(chunk_size: int) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")


class TokenizerOutput(NamedTuple):
    """What training looks at."""

    reconstruction: Tensor
    """Decoded clips `(b, 3, f, h, w)`, about [-1, 1], not clamped."""
    z: Tensor
    """Latents `(b, d, f', h', w')`, with HBQ in (-1, 1)."""
    z_hat: Tensor
    """Quantized latents, with the gradient of `z`."""
    auxiliary_loss: Tensor | None = None
    """Weighted terms that the quantizer asks to be added to the loss, a scalar; none with HBQ."""
    auxiliary_terms: Mapping[str, Tensor] = {}
    """The same by name, to be logged."""


class HBQTokenizer(nn.Module):
    """Clips in [-1, 1] to integer codes and back.

    Whether anything is computed with gradients, or under autocast, is decided by the caller, except
    in `tokenize`, whose codes always come from full precision.

    Args:
        config: Sizes.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        d, pixels = config.latent_width, COLOURS * config.patch_size**2
        use_attention = config.use_mid_attention
        self.encoder = Encoder(
            pixels,
            2 * d,
            levels=config.encoder_levels,
            num_res_blocks=config.num_res_blocks,
            use_mid_attention=use_attention,
        )
        self.conv1 = nn.Conv3d(2 * d, 2 * d, 1)
        self.quantizer = build_quantizer(
            config.quantizer,
            latent_channels=config.latent_channels,
            num_rounds=config.num_rounds,
        )
        self.conv2 = nn.Conv3d(d, d, 1)
        self.decoder = Decoder(
            d,
            pixels,
            levels=config.decoder_levels,
            num_res_blocks=config.num_res_blocks + 1,
            use_mid_attention=use_attention,
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Initialize all parameters; complete also for a module that was on the meta device.

        | parameters                    | values                                    |
        |-------------------------------|-------------------------------------------|
        | convolutions, weight and bias | uniform in +-1 / sqrt(fan_in) (torch)     |
        | past taps of 3x3x3 kernels    | 0                                         |
        | attention projection, weight  | 0 (its bias is as above)                  |
        | norms                         | 1                                         |
        | codebooks (VQ only)           | random unit vectors                       |

        A new network thus reads every frame by itself, and one trained on images continues on
        clips from what it knows: past taps that were never trained would be noise.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                module.reset_parameters()
                if isinstance(module, CausalConv3d) and module.kernel_size == (3, 3, 3):
                    nn.init.zeros_(module.weight[:, :, :-1])
            elif isinstance(module, ChannelNorm):
                nn.init.ones_(module.gamma)
        for module in self.modules():
            if isinstance(module, SpatialAttention):
                nn.init.zeros_(module.proj.weight)
        self.quantizer.init_weights()

    def forward(self, clips: Tensor) -> TokenizerOutput:
        """Encode, quantize with a straight-through gradient, decode.

        Args:
            clips: `(b, 3, f, h, w)` in [-1, 1]; see `TokenizerConfig.latent_shape` for the sizes.
        """
        z = self.encode(clips)
        z_hat, losses = self.quantizer(z)
        auxiliary = torch.stack([*losses.values()]).sum() if losses else None
        return TokenizerOutput(self.decode(z_hat), z, z_hat, auxiliary, losses)

    # ------------------------------------------------------------------ whole clips

    @property
    def encoder_parts(self) -> tuple[nn.Module, ...]:
        """What makes codes of clips; the rest makes clips of codes."""
        return self.encoder, self.conv1, self.quantizer

    @property
    def last_layer(self) -> nn.Module:
        """The layer that makes pixels."""
        return self.decoder.head[-1]

    def encode(self, clips: Tensor) -> Tensor:
        """Return the latents `(b, d, f', h', w')` of `clips` `(b, 3, f, h, w)`; HBQ's in (-1, 1).

        Raises:
            ValueError: If the shape does not fit (`TokenizerConfig.latent_shape`).
        """
        return self._encode(clips, None)

    def decode(self, z_hat: Tensor) -> Tensor:
        """Return clips `(b, 3, f, h, w)`, not clamped, from latents `(b, d, f', h', w')`.

        Raises:
            ValueError: If the latents do not have `d` channels.
        """
        return self._decode(z_hat, None)

    def quantize(self, z: Tensor) -> Tensor:
        """Return the codes, long, of latents; with HBQ in `[0, 2**M)` and of the same shape.

        Raises:
            ValueError: If the tokenizer has no quantizer.
        """
        return self.quantizer.encode(z)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Return the latents, in the type of the weights, that `codes` stand for.

        Raises:
            ValueError: If the codes are not those of this tokenizer, or it has no quantizer.
        """
        channels = self.config.code_channels
        if channels and codes.shape[1] != channels:
            raise ValueError(
                f"latents and codes must be of shape (b, {channels}, f, h, w), got "
                f"{tuple(codes.shape)}; they must come from a tokenizer with as many codes."
            )
        return self.quantizer.decode(codes).to(self.conv2.weight.dtype)

    def quantize_rounds(self, z: Tensor, *, num_rounds: int) -> Tensor:
        """Return latents as they are after `num_rounds` binary rounds, to be decoded.

        With fewer rounds than the tokenizer was trained with this is a coarse preview; with more
        the rounds go on halving, and show what the decoder would do with more bits.

        Args:
            z: Latents `(b, d, f', h', w')` in (-1, 1).
            num_rounds: Rounds, 1 to 16.

        Raises:
            ValueError: If the quantizer has no rounds, or `num_rounds` is out of range.
        """
        if not self.config.has_rounds:
            raise ValueError(
                f"quantizer {self.config.quantizer.name!r} has no binary rounds to be decoded one "
                "by one; only 'hbq' and 'none' do."
            )
        return hbq_decode(hbq_encode(z, num_rounds=num_rounds), num_rounds=num_rounds).to(z.dtype)

    @torch.no_grad()
    def tokenize(self, clips: Tensor, *, chunk_size: int | None = None) -> Tensor:
        """Return the codes of `clips`; autocast is switched off, as in the published inference.

        Args:
            clips: `(b, 3, f, h, w)` in [-1, 1].
            chunk_size: Latent frames per chunk; None encodes the whole clip at once.

        Returns:
            Codes `(b, c, f', h', w')`, long; with HBQ `c = d` and in `[0, 2**M)`.

        Raises:
            ValueError: If the shape does not fit, or the tokenizer has no quantizer.
        """
        with full_precision(clips.device):
            clips = clips.to(self.conv1.weight.dtype)
            if chunk_size is None:
                return self.quantize(self.encode(clips))
            return self.quantize(self.encode_streaming(clips, chunk_size=chunk_size))

    def detokenize(self, codes: Tensor, *, chunk_size: int | None = None) -> Tensor:
        """Return the clips that `codes` stand for, not clamped.

        Args:
            codes: `(b, c, f', h', w')`, as `tokenize` returns them.
            chunk_size: Latent frames per chunk; None decodes the whole clip at once.

        Returns:
            Clips `(b, 3, f, h, w)`.
        """
        z_hat = self.dequantize(codes)
        if chunk_size is None:
            return self.decode(z_hat)
        return self.decode_streaming(z_hat, chunk_size=chunk_size)

    # ------------------------------------------------------------------ chunk by chunk

    def encode_chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Encode one clip that arrives in pieces, keeping two frames per layer in memory.

        Memory stays bounded only where no gradients are recorded.

        Args:
            chunks: Consecutive frames `(b, 3, f, h, w)`: `1 + temporal_stride * k` in the first
                chunk, a multiple of `temporal_stride` in each later one.

        Yields:
            The latents of each chunk; joined along the frames they equal `encode` of the clip.

        Raises:
            ValueError: If a chunk has another number of frames or a size that does not fit.
        """
        cache = StreamCache()
        for chunk in chunks:
            z = self._encode(chunk, cache)
            cache.num_chunks += 1
            yield z

    def decode_chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode one clip whose latents arrive in pieces, keeping two frames per layer in memory.

        Memory stays bounded only where no gradients are recorded.

        Args:
            chunks: Consecutive latent frames `(b, d, f', h', w')`, any number per chunk.

        Yields:
            The frames `(b, 3, f, h, w)` of each chunk; joined they equal `decode` of the clip.
        """
        cache = StreamCache()
        for chunk in chunks:
            clip = self._decode(chunk, cache)
            cache.num_chunks += 1
            yield clip

    def encode_streaming(self, clips: Tensor, *, chunk_size: int = 1) -> Tensor:
        """Return what `encode` does, with the activations of `chunk_size` latent frames at a time.

        Raises:
            ValueError: If the shape does not fit (`TokenizerConfig.latent_shape`).
        """
        _check_chunk_size(chunk_size)
        self._check_clips(clips, is_first=True)
        stride = self.config.temporal_stride
        later = clips[:, :, 1 + stride * (chunk_size - 1) :]
        chunks = [clips[:, :, : 1 + stride * (chunk_size - 1)]]
        if later.shape[2] > 0:
            chunks += later.split(stride * chunk_size, dim=2)
        return torch.cat([*self.encode_chunks(chunks)], dim=2)

    def decode_streaming(self, z_hat: Tensor, *, chunk_size: int = 1) -> Tensor:
        """Return what `decode` does, with the activations of `chunk_size` latent frames at a time.

        The decoded clip itself is held as a whole; `decode_chunks` does not need that.
        """
        _check_chunk_size(chunk_size)
        return torch.cat([*self.decode_chunks(z_hat.split(chunk_size, dim=2))], dim=2)

    # ------------------------------------------------------------------ both

    def _encode(self, clips: Tensor, cache: StreamCache | None) -> Tensor:
        self._check_clips(clips, is_first=is_first_chunk(cache))
        patches = patchify(clips, patch_size=self.config.patch_size)
        x = self.encoder(patches.contiguous(memory_format=torch.channels_last_3d), cache)
        mean, _unused = self.conv1(x).chunk(2, dim=1)  # the published weights have both halves
        return self.quantizer.squash(mean.contiguous())

    def _decode(self, z_hat: Tensor, cache: StreamCache | None) -> Tensor:
        d = self.config.latent_width
        if z_hat.ndim != 5 or z_hat.shape[1] != d:
            raise ValueError(
                f"latents and codes must be of shape (b, {d}, f, h, w), got {tuple(z_hat.shape)}; "
                "they must come from a tokenizer with the same latent_channels."
            )
        x = self.conv2(z_hat.contiguous(memory_format=torch.channels_last_3d))
        return unpatchify(self.decoder(x, cache), patch_size=self.config.patch_size)

    def _check_clips(self, clips: Tensor, *, is_first: bool) -> None:
        if clips.ndim != 5 or clips.shape[1] != COLOURS:
            raise ValueError(
                f"clips must be of shape (b, {COLOURS}, f, h, w), got {tuple(clips.shape)}; an "
                "image is a clip of one frame, images.unsqueeze(2)."
            )
        num_frames, height, width = clips.shape[2:]
        _check_frames(num_frames, self.config.temporal_stride, is_first=is_first)
        self.config.latent_shape(1, height, width)
