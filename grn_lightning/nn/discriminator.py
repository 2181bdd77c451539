"""Discriminators of frames and of clips: patches, patches with spectral norms, StyleGAN-like.

Source: the published GRN tokenizer training (arXiv 2604.13030), layer tables included; the patch
discriminators go back to pix2pix (Isola et al. 2017). Each maps pixels in [-1, 1] to a map of
logits, one per patch, large for "real".

Different on purpose: batch statistics are those of all ranks on every device, not on CUDA only.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from grn_lightning.nn.batch_norm import BatchNorm

Axes = Literal[2, 3]
Kind = Literal["patch", "spectral", "stylegan"]

_SLOPE = 0.2  # of the leaky ReLU
_INIT_STD = 0.02
_STYLEGAN_WIDTHS = (2, 4, 8, 8, 8, 8)  # of the blocks, in multiples of `width`


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Sizes of a discriminator; the defaults are the published patch discriminator."""

    kind: Kind = "patch"
    """Batch norm ("patch"), spectral norms ("spectral") or residual blocks ("stylegan")."""
    width: int = 64
    """Channels of the first layer; they double up to eightfold."""
    num_layers: int = 3
    """Layers that halve height and width, of both patch kinds; a logit sees 16, 34, 70 or 142
    pixels for 1 to 4. Pictures of 32 pixels want 2."""
    num_blocks: int = 6
    """Residual blocks of "stylegan", each of which halves height and width."""
    temporal_compression: bool = False
    """Whether a patch discriminator of clips halves time with the inner layers too."""

    def __post_init__(self) -> None:
        """Refuse impossible sizes, all issues at once."""
        rules = {
            f"`kind` must be one of {get_args(Kind)}, got {self.kind!r}": self.kind
            in get_args(Kind),
            f"`width` must be at least 1, got {self.width}": self.width >= 1,
            f"`num_layers` must be at least 1, got {self.num_layers}": self.num_layers >= 1,
            f"`num_blocks` must be in 1..6, got {self.num_blocks}": 1 <= self.num_blocks <= 6,
        }
        issues = [text for text, is_right in rules.items() if not is_right]
        if issues:
            raise ValueError("DiscriminatorConfig: " + "; ".join(issues) + ".")


# --- patches --------------------------------------------------------------------------------------


def _conv(num_axes: Axes, *args: Any, **kwargs: Any) -> nn.Module:
    return nn.Conv3d(*args, **kwargs) if num_axes == 3 else nn.Conv2d(*args, **kwargs)


def _patch_conv(num_axes: Axes, before: int, after: int, **kwargs: Any) -> nn.Module:
    conv = _conv(num_axes, before, after, 4, padding=1, **kwargs)
    nn.init.normal_(conv.get_parameter("weight"), std=_INIT_STD)
    return conv


class PatchDiscriminator(nn.Module):
    """Convolutions of 4 pixels a side; a logit judges one patch.

    For three halving layers of width 64 on frames, from 256 x 256 pixels:

    | layer | channels   | stride | bias | norm ("patch" / "spectral") | result    |
    |-------|------------|--------|------|-----------------------------|-----------|
    | 1     | 3 -> 64    | 2      | yes  | none                        | 128 x 128 |
    | 2     | 64 -> 128  | 2      | no   | batch / spectral            | 64 x 64   |
    | 3     | 128 -> 256 | 2      | no   | batch / spectral            | 32 x 32   |
    | 4     | 256 -> 512 | 1      | no   | batch / none, of clips spectral | 31 x 31 |
    | 5     | 512 -> 1   | 1      | yes  | none                        | 30 x 30   |

    All layers of "spectral" have a bias. Kernels start from N(0, 0.02), biases as in torch, gains
    at 1. On clips kernels span 4 frames as well; the stride over
    time is 1, or with `temporal_compression` 2 in the halving layers after the first.

    Args:
        config: Sizes.
        num_axes: 2 for frames, 3 for clips.
    """

    def __init__(self, config: DiscriminatorConfig, *, num_axes: Axes) -> None:
        super().__init__()
        self.config, self.num_axes = config, num_axes
        widths = [config.width * min(2**i, 8) for i in range(config.num_layers + 1)]
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(zip([3, *widths[:-1]], widths, strict=True)):
            layers += self._layer(index, before, after)
        layers.append(_patch_conv(num_axes, widths[-1], 1))
        self.layers = nn.Sequential(*layers)

    def _stride(self, index: int) -> tuple[int, ...]:
        """Strides of the layer `index`, counted from 0."""
        in_space = 2 if index < self.config.num_layers else 1
        in_time = in_space if index > 0 and self.config.temporal_compression else 1
        return (in_time, in_space, in_space)[-self.num_axes :]

    def _layer(self, index: int, before: int, after: int) -> list[nn.Module]:
        is_spectral, is_first = self.config.kind == "spectral", index == 0
        is_last = index == self.config.num_layers
        conv = _patch_conv(
            self.num_axes,
            before,
            after,
            stride=self._stride(index),
            bias=is_first or is_spectral,
        )
        if is_spectral and not is_first and (self.num_axes == 3 or not is_last):
            conv = spectral_norm(conv)
        norm = [] if is_first or is_spectral else [BatchNorm(after)]
        return [conv, *norm, nn.LeakyReLU(_SLOPE)]

    def logits_shape(self, *size: int) -> tuple[int, ...]:
        """Return the shape of the logits of one clip or frame of `size`, which may hold zeros."""
        for index in range(self.config.num_layers + 2):
            last = index > self.config.num_layers
            strides = (1,) * self.num_axes if last else self._stride(index)
            size = tuple((n - 2) // s + 1 for n, s in zip(size, strides, strict=True))
        return size

    def forward(self, x: Tensor) -> Tensor:
        """Judge frames `(b, 3, h, w)` or clips `(b, 3, f, h, w)`; logits `(b, 1, ...)`.

        Raises:
            ValueError: If the pixels or frames are too few for a single patch.
        """
        if min(self.logits_shape(*x.shape[2:])) < 1:
            raise ValueError(
                f"a {self.config.kind!r} discriminator with num_layers={self.config.num_layers}"
                f"{' of clips' if self.num_axes == 3 else ''} finds no patch in "
                f"{' x '.join(map(str, x.shape[2:]))}: take fewer layers"
                f"{', no temporal_compression or longer clips' if self.num_axes == 3 else ''}."
            )
        return self.layers(x)


# --- residual blocks ------------------------------------------------------------------------------


class _Blur(nn.Module):
    """Smooth height and width by [1, 2, 1] / 4, as before every thinning out."""

    def __init__(self, num_channels: int, *, num_axes: Axes) -> None:
        super().__init__()
        self.num_channels, self.num_axes = num_channels, num_axes

    def forward(self, x: Tensor) -> Tensor:
        row = x.new_tensor([0.25, 0.5, 0.25])
        kernel = (row[:, None] * row).expand(self.num_channels, 1, 3, 3)
        if self.num_axes == 2:
            return F.conv2d(x, kernel, padding=1, groups=self.num_channels)
        return F.conv3d(x, kernel.unsqueeze(2), padding=(0, 1, 1), groups=self.num_channels)


class _ResidualBlock(nn.Module):
    """Two convolutions, a blur, a halving convolution; beside them a halving 1x1 convolution."""

    def __init__(self, before: int, after: int, *, num_axes: Axes) -> None:
        super().__init__()
        halving = (1, 2, 2)[-num_axes:]
        self.main = nn.Sequential(
            _conv(num_axes, before, after, 3, padding=1),
            nn.LeakyReLU(_SLOPE),
            _conv(num_axes, after, after, 3, padding=1),
            nn.LeakyReLU(_SLOPE),
            _Blur(after, num_axes=num_axes),
            _conv(num_axes, after, after, 3, stride=halving, padding=1),
        )
        self.skip = _conv(num_axes, before, after, 1, stride=halving)

    def forward(self, x: Tensor) -> Tensor:
        return (self.main(x) + self.skip(x)) * 0.5**0.5


class StyleDiscriminator(nn.Module):
    """A convolution, residual blocks that halve height and width, and a map of logits.

    With six blocks 256 x 256 pixels become 4 x 4 logits; time is never halved. Weights start as in
    torch: the published training does not say otherwise.

    Args:
        config: Sizes.
        num_axes: 2 for frames, 3 for clips.
    """

    def __init__(self, config: DiscriminatorConfig, *, num_axes: Axes) -> None:
        super().__init__()
        widths = [config.width * m for m in (1, *_STYLEGAN_WIDTHS[: config.num_blocks])]
        blocks = [
            _ResidualBlock(before, after, num_axes=num_axes)
            for before, after in zip(widths[:-1], widths[1:], strict=True)
        ]
        self.layers = nn.Sequential(
            _conv(num_axes, 3, widths[0], 3, padding=1),
            nn.LeakyReLU(_SLOPE),
            *blocks,
            _conv(num_axes, widths[-1], widths[-1], 3, padding=1),
            nn.LeakyReLU(_SLOPE),
            _conv(num_axes, widths[-1], 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Judge frames `(b, 3, h, w)` or clips `(b, 3, f, h, w)`; logits `(b, 1, ...)`."""
        return self.layers(x)


Discriminator = PatchDiscriminator | StyleDiscriminator


def build_discriminator(config: DiscriminatorConfig, *, num_axes: Axes) -> Discriminator:
    """Return a new discriminator of frames (2 axes) or of clips (3)."""
    kind = StyleDiscriminator if config.kind == "stylegan" else PatchDiscriminator
    return kind(config, num_axes=num_axes)
