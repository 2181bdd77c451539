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
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grn_lightning.functional.hbq import hbq_decode, hbq_encode
from grn_lightning.functional.patches import patchify, unpatchify
from grn_lightning.models.tokenizer_blocks import Decoder, Encoder
from grn_lightning.models.tokenizer_config import TokenizerConfig as TokenizerConfig
from grn_lightning.models.tokenizer_config import check_frames
from grn_lightning.nn.blocks3d import ChannelNorm, SpatialAttention
from grn_lightning.nn.conv3d import CausalConv3d, StreamCache, is_first_chunk
from grn_lightning.nn.mlp import full_precision
from grn_lightning.nn.quantizers import build_quantizer

COLOURS = 3


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
        check_frames(num_frames, self.config.temporal_stride, is_first=is_first)
        self.config.latent_shape(1, height, width)
