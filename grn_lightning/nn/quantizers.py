"""Quantizers between encoder and decoder, one switch: HBQ, none, FSQ, LFQ, BSQ, VQ.

All of them get the same budget, `num_rounds * latent_channels` bits per position, and spend it in
their own way, with `b = M d` bits:

| name | latent channels           | codes per position | values of a code | bits          |
|------|---------------------------|--------------------|------------------|---------------|
| hbq  | d                         | d                  | 2^M              | b             |
| none | d                         | -                  | -                | no codes      |
| fsq  | largest c with L^c <= 2^b | c                  | L                | c log2 L <= b |
| lfq  | b                         | b                  | 2                | b             |
| bsq  | b                         | b                  | 2                | b             |
| vq   | w b / B                   | b / B              | 2^B              | b             |

A single codebook of `2^b` words is out of reach beyond some 16 bits, so VQ divides the channels
into groups of width `w` with a codebook of `2^B` words each (product quantization).

Sources: GRN (HBQ), FSQ (arXiv 2309.15505), LFQ (arXiv 2310.05737), BSQ (arXiv 2406.07548),
ViT-VQGAN and LlamaGen for codebooks of short unit vectors (arXiv 2110.04627, 2406.06525).
The codebooks themselves, their moving averages and the revival of unused words are those of
`vector-quantize-pytorch`. The other arms are a formula each, and are ours because we ask for what
no library promises: codes that decode to exactly what the decoder was trained on.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grn_lightning.functional.hbq import hbq_decode, hbq_encode
from grn_lightning.functional.quantize import (
    fsq_decode,
    fsq_encode,
    fsq_squash,
    sign_decode,
    sign_encode,
    sign_entropies,
    straight_through,
)
from grn_lightning.nn.mlp import full_precision

QuantizerName = Literal["hbq", "none", "fsq", "lfq", "bsq", "vq"]

_SIGNS = ("lfq", "bsq")
_USERS = {  # settings that not every quantizer has
    "num_levels": ("fsq",),
    "codebook_bits": ("vq", *_SIGNS),
    "codeword_width": ("vq",),
    "codebook_decay": ("vq",),
    "revive_below": ("vq",),
    "commitment_weight": ("vq", *_SIGNS),
    "entropy_weight": _SIGNS,
    "temperature": _SIGNS,
}


NO_CODES = (
    "a tokenizer with quantizer 'none' has continuous latents and no codes; use encode and decode, "
    "but for codes train one with quantizer 'hbq'."
)
"""Why whatever needs codes is refused."""


class CodeSizes(NamedTuple):
    """What a quantizer makes of a budget of bits, per position."""

    latent_width: int
    """Channels of the latents that it takes and returns."""
    code_channels: int
    """Codes; 0 if there are none."""
    alphabet_size: int
    """Values of a code; 0 if there are none."""
    num_rounds: int
    """Bits of a code that mean something, most significant first; 0 where codes have no order, or
    their values are no power of two."""

    @property
    def num_bits(self) -> float:
        """Bits of all codes of a position; infinite without a quantizer."""
        if not self.code_channels:
            return math.inf
        return self.code_channels * math.log2(self.alphabet_size)


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Which quantizer, and the settings of its kind; those of another kind are refused."""

    name: QuantizerName = "hbq"
    """Kind: "hbq" or "none" (continuous latents); the baselines "fsq", "lfq", "bsq", "vq"."""
    num_levels: int = 8
    """FSQ: levels of a channel, at least 3; the published settings have 5 to 8."""
    codebook_bits: int = 8
    """VQ: bits of each codebook, 1 to 16. LFQ, BSQ: bits whose joint use the entropy term sees."""
    codeword_width: int = 8
    """VQ: channels of a codeword."""
    codebook_decay: float = 0.99
    """VQ: weight of the old codewords in their moving average, in [0, 1)."""
    revive_below: float = 0.05
    """VQ: a codeword that on average gets fewer latents per step is replaced by one of them."""
    commitment_weight: float = 0.0
    """VQ, LFQ, BSQ: weight of the mean squared distance of latents to their quantized values. 0.25
    is published for VQ; beside a small loss it collapses the codes (`docs/quantizers.md`)."""
    entropy_weight: float = 0.1
    """LFQ, BSQ: weight of the entropy per position less the entropy overall, per bit."""
    temperature: float = 0.25
    """LFQ, BSQ: softness of the bits of the entropy term; latents have a size of about 1."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant, all issues at once."""
        names, defaults = get_args(QuantizerName), {f.name: f.default for f in fields(self)}
        rules = {
            f"name must be one of {names}, got {self.name!r}": self.name in names,
            f"num_levels must be at least 3, got {self.num_levels}": self.num_levels >= 3,
            f"codebook_bits must be in 1..16, got {self.codebook_bits}": (
                1 <= self.codebook_bits <= 16
            ),
            f"codeword_width must be at least 1, got {self.codeword_width}": (
                self.codeword_width >= 1
            ),
            f"codebook_decay must be in [0, 1), got {self.codebook_decay}": (
                0 <= self.codebook_decay < 1
            ),
            f"temperature must be positive, got {self.temperature}": self.temperature > 0,
        }
        for key in ("revive_below", "commitment_weight", "entropy_weight"):
            rules[f"{key} must be at least 0, got {getattr(self, key)}"] = getattr(self, key) >= 0
        for key, users in _USERS.items():
            is_idle = self.name in names and self.name not in users
            text = f"{key} is a setting of {', '.join(users)} and means nothing for {self.name!r}"
            rules[text] = not is_idle or getattr(self, key) == defaults[key]
        issues = [text for text, is_right in rules.items() if not is_right]
        if issues:
            raise ValueError("QuantizerConfig: " + "; ".join(issues) + ".")

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> "QuantizerConfig":
        """Return the configuration that a checkpoint or export holds as plain data.

        Settings that mean nothing for the kind are passed over: they are the defaults of the
        version that wrote them, which need not be today's.
        """
        name = data.get("name", cls.name)
        return cls(**{key: data[key] for key in data if name in _USERS.get(key, (name,))})

    def sizes(self, *, latent_channels: int, num_rounds: int) -> CodeSizes:
        """Return what this quantizer makes of `num_rounds * latent_channels` bits per position.

        Raises:
            ValueError: If the bits do not fill whole codebooks, or not even one code.
        """
        num_bits = num_rounds * latent_channels
        if self.name == "none":
            return CodeSizes(latent_channels, 0, 0, 0)
        if self.name == "hbq":
            return CodeSizes(latent_channels, latent_channels, 2**num_rounds, num_rounds)
        if self.name in _SIGNS:
            return CodeSizes(num_bits, num_bits, 2, 1)
        if self.name == "fsq":
            channels = int(num_bits / math.log2(self.num_levels)) + 1
            while self.num_levels**channels > 2**num_bits:
                channels -= 1
            if channels < 1:
                raise ValueError(
                    f"num_levels={self.num_levels} do not fit into the {num_bits} bits of a "
                    f"position; take at most {2**num_bits} levels, or more latent_channels."
                )
            length = self.num_levels.bit_length() - 1
            num_rounds = length if self.num_levels == 2**length else 0
            return CodeSizes(channels, channels, self.num_levels, num_rounds)
        num_codebooks, rest = divmod(num_bits, self.codebook_bits)
        if rest:
            raise ValueError(
                f"the {num_bits} bits of a position do not divide into codebooks of "
                f"codebook_bits={self.codebook_bits}; take a divisor of {num_bits}."
            )
        width = num_codebooks * self.codeword_width
        return CodeSizes(width, num_codebooks, 2**self.codebook_bits, 0)


class Quantized(NamedTuple):
    """What a quantizer returns in training."""

    z_hat: Tensor
    """Quantized latents, with the gradient of the latents."""
    losses: dict[str, Tensor]
    """Weighted terms that the quantizer asks to be added to the loss, by name."""


class Quantizer(nn.Module, ABC):
    """Latents to codes and back. Latents are `(b, latent_width, *grid)`, codes `(b, c, *grid)`."""

    def init_weights(self) -> None:
        """Initialize all state; most quantizers have none."""

    def squash(self, x: Tensor) -> Tensor:
        """Bring the encoder's output, any real numbers, into the range that is quantized."""
        return x.tanh()

    @abstractmethod
    def encode(self, z: Tensor) -> Tensor:
        """Return the codes, long, of squashed latents."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Return the latents, at least float32, that codes stand for."""

    def forward(self, z: Tensor) -> Quantized:
        """Quantize with a straight-through gradient; in training mode codebooks learn."""
        z_hat = self.decode(self.encode(z.detach()))
        return Quantized(straight_through(z, z_hat), self._losses(z, z_hat))

    def _losses(self, z: Tensor, z_hat: Tensor) -> dict[str, Tensor]:
        """Weighted terms of the loss."""
        return {}


class BinaryRounds(Quantizer):
    """HBQ: every channel to one of `2**num_rounds` equal bins of [-1, 1]."""

    def __init__(self, num_rounds: int) -> None:
        super().__init__()
        self.num_rounds = num_rounds

    def encode(self, z: Tensor) -> Tensor:
        """Return codes `(b, d, *grid)` in `[0, 2**m)`."""
        return hbq_encode(z, num_rounds=self.num_rounds)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the bins' centres."""
        return hbq_decode(codes, num_rounds=self.num_rounds)


class Continuous(Quantizer):
    """No quantizer: what the others are measured against. There are no codes."""

    def encode(self, z: Tensor) -> Tensor:
        """Refuse."""
        raise ValueError(NO_CODES)

    def decode(self, codes: Tensor) -> Tensor:
        """Refuse."""
        raise ValueError(NO_CODES)

    def forward(self, z: Tensor) -> Quantized:
        """Pass latents through."""
        return Quantized(z, {})


class FiniteScalars(Quantizer):
    """FSQ: every channel rounded to one of `num_levels` levels."""

    def __init__(self, num_levels: int) -> None:
        super().__init__()
        self.num_levels = num_levels

    def squash(self, x: Tensor) -> Tensor:
        """Bound so that all levels, and no others, are reached."""
        return fsq_squash(x, num_levels=self.num_levels)

    def encode(self, z: Tensor) -> Tensor:
        """Return codes in `[0, num_levels)`, same shape."""
        return fsq_encode(z, num_levels=self.num_levels)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the levels."""
        return fsq_decode(codes, num_levels=self.num_levels)


class Signs(Quantizer):
    """LFQ and BSQ: the sign of every channel, kept in use by an entropy term.

    Args:
        config: Weights of the terms; `name` "bsq" puts latents on the unit sphere.
        num_bits: Channels, and bits.
    """

    def __init__(self, config: QuantizerConfig, *, num_bits: int) -> None:
        super().__init__()
        self.config = config
        self.is_spherical = config.name == "bsq"
        self.scale = num_bits**-0.5 if self.is_spherical else 1.0  # of a quantized latent

    def squash(self, x: Tensor) -> Tensor:
        """Bring the latents of each position to unit length (BSQ), or leave them (LFQ)."""
        return F.normalize(x, dim=1) if self.is_spherical else x

    def encode(self, z: Tensor) -> Tensor:
        """Return bits, same shape."""
        return sign_encode(z)

    def decode(self, codes: Tensor) -> Tensor:
        """Return a corner of the cube."""
        return sign_decode(codes) * self.scale

    def _losses(self, z: Tensor, z_hat: Tensor) -> dict[str, Tensor]:
        config = self.config
        unit = z / self.scale
        entropies = sign_entropies(
            unit, group_bits=config.codebook_bits, temperature=config.temperature
        )
        balance = entropies.per_position - entropies.overall
        distance = (unit.float() - z_hat / self.scale).square().mean()
        return {
            "entropy": config.entropy_weight * balance,
            "commitment": config.commitment_weight * distance,
        }


class Codebooks(Quantizer):
    """VQ: groups of channels of unit length, each to the nearest word of a codebook of its own.

    Codewords are moving averages of the latents that chose them.

    Args:
        config: Sizes and rates.
        num_codebooks: Groups.
    """

    def __init__(self, config: QuantizerConfig, *, num_codebooks: int) -> None:
        super().__init__()
        self.config = config
        self.num_codebooks = num_codebooks
        self.codebooks = self._build()

    def _build(self) -> nn.Module:
        from vector_quantize_pytorch import VectorQuantize  # takes a second to import

        config = self.config
        return VectorQuantize(
            dim=self.num_codebooks * config.codeword_width,
            codebook_dim=config.codeword_width,
            codebook_size=2**config.codebook_bits,
            heads=self.num_codebooks,
            separate_codebook_per_head=True,
            decay=config.codebook_decay,
            threshold_ema_dead_code=config.revive_below,
            use_cosine_sim=True,
            rotation_trick=False,
            commitment_weight=0.0,  # ours, so that it is named and weighted like the others
        )

    @property
    def codewords(self) -> Tensor:
        """Unit vectors `(num_codebooks, 2**codebook_bits, codeword_width)`."""
        return self.codebooks.codebook  # type: ignore[return-value]

    def init_weights(self) -> None:
        """Draw codewords anew, also for a module that was on the meta device."""
        self.codebooks.load_state_dict(self._build().state_dict())

    def squash(self, x: Tensor) -> Tensor:
        """Bring every group to unit length."""
        return F.normalize(x.unflatten(1, (self.num_codebooks, -1)), dim=2).flatten(1, 2)

    def encode(self, z: Tensor) -> Tensor:
        """Return the indices of codewords, `(b, num_codebooks, *grid)`."""
        with full_precision(z.device):
            _, codes, _ = self.codebooks(_positions_last(z), freeze_codebook=True)
        return codes.unflatten(1, z.shape[2:]).reshape(len(z), *z.shape[2:], -1).movedim(-1, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Return codewords, side by side."""
        group = torch.arange(self.num_codebooks, device=codes.device)
        return self.codewords[group, codes.movedim(1, -1)].flatten(-2).movedim(-1, 1)

    @torch.no_grad()
    def _learn(self, z: Tensor, codes: Tensor) -> None:
        """Move the codewords towards the latents that chose them; revive unused ones."""
        indices = codes.flatten(2).movedim(1, 2)
        with full_precision(z.device):
            self.codebooks.update_indices(_positions_last(z), indices)  # type: ignore[operator]

    def forward(self, z: Tensor) -> Quantized:
        """Quantize; in training mode the codebooks move after that."""
        codes = self.encode(z.detach())
        z_hat = self.decode(codes)
        if self.training:
            self._learn(z.detach(), codes)
        distance = (z - z_hat).square().mean()
        losses = {"commitment": self.config.commitment_weight * distance}
        return Quantized(straight_through(z, z_hat), losses)


def _positions_last(z: Tensor) -> Tensor:
    """Return latents `(b, c, *grid)` as `(b, n, c)` in full precision."""
    return z.flatten(2).movedim(1, 2).float()


def build_quantizer(config: QuantizerConfig, *, latent_channels: int, num_rounds: int) -> Quantizer:
    """Return the quantizer that a configuration names, for a budget of bits.

    Raises:
        ValueError: If it cannot spend them (`QuantizerConfig.sizes`).
    """
    sizes = config.sizes(latent_channels=latent_channels, num_rounds=num_rounds)
    if config.name == "hbq":
        return BinaryRounds(num_rounds)
    if config.name == "none":
        return Continuous()
    if config.name == "fsq":
        return FiniteScalars(config.num_levels)
    if config.name == "vq":
        return Codebooks(config, num_codebooks=sizes.code_channels)
    return Signs(config, num_bits=sizes.code_channels)
