"""Sizes of an `HBQTokenizer`: levels, strides, bits per position, shapes of latents."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from grn_lightning.functional.hbq import MAX_ROUNDS, ElementSizes, element_sizes
from grn_lightning.models.tokenizer_blocks import LevelSizes
from grn_lightning.nn.quantizers import NO_CODES, CodeSizes, QuantizerConfig


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
            object.__setattr__(self, "quantizer", QuantizerConfig.from_plain(self.quantizer))
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
        check_frames(num_frames, self.temporal_stride, is_first=True)
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


def check_frames(num_frames: int, stride: int, *, is_first: bool) -> None:
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
