"""Published sizes by name: one row, one configuration. Sources stand above each table."""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from grn_lightning.models.code_transformer import BackboneConfig, CodeTransformerConfig
from grn_lightning.models.grn_class import GRNClassConfig
from grn_lightning.models.grn_text import GRNTextConfig
from grn_lightning.models.tokenizer import TokenizerConfig
from grn_lightning.models.vq_tokenizer import VQTokenizerConfig

ConfigT = TypeVar("ConfigT")


def get_variant(table: Mapping[str, ConfigT], name: str) -> ConfigT:
    """Look up a row of a table of this file.

    Raises:
        ValueError: If there is no such row; the message lists the rows.
    """
    if name not in table:
        raise ValueError(f"unknown variant {name!r}; known are {', '.join(map(repr, table))}.")
    return table[name]


def _tokenizer(
    latent_channels: int, encoder: int, decoder: int, multipliers: tuple[int, ...], **rest: Any
) -> TokenizerConfig:
    return TokenizerConfig(
        latent_channels=latent_channels,
        encoder_width=encoder,
        decoder_width=decoder,
        width_multipliers=multipliers,
        **rest,
    )


def _grn_class(
    elements: tuple[int, int],
    blocks: tuple[int, int, int],
    bottleneck: int,
    start: int,
    **rest: Any,
) -> GRNClassConfig:
    num_elements, alphabet_size = elements
    depth, width, num_heads = blocks
    return GRNClassConfig(
        num_elements=num_elements,
        alphabet_size=alphabet_size,
        depth=depth,
        width=width,
        num_heads=num_heads,
        bottleneck=bottleneck,
        context_start=start,
        **rest,
    )


def _grn_text(
    elements: tuple[int, int],
    blocks: tuple[int, int, int],
    mlp_width: int,
    blocks_per_chunk: int,
    attention: Literal["prefix", "full"],
    **rest: Any,
) -> GRNTextConfig:
    num_elements, alphabet_size = elements
    depth, width, num_heads = blocks
    return GRNTextConfig(
        num_elements=num_elements,
        alphabet_size=alphabet_size,
        depth=depth,
        width=width,
        num_heads=num_heads,
        mlp_width=mlp_width,
        blocks_per_chunk=blocks_per_chunk,
        attention=attention,
        **rest,
    )


def _llamagen(name: str) -> CodeTransformerConfig:
    row = BACKBONES[name]
    return CodeTransformerConfig(
        input_size=16384,
        output_size=16384,
        depth=row.depth,
        width=row.width,
        num_heads=row.num_heads,
    )


def _backbone(depth: int, width: int, num_heads: int, **rest: Any) -> BackboneConfig:
    return BackboneConfig(depth=depth, width=width, num_heads=num_heads, **rest)


# fmt: off

# The published tokenizers differ in latent width only: 16 for images, 64 for images and video
# (GRN, arXiv 2604.13030). "digits" is ours, for the embedded data set on a CPU.
_DIGITS = {"temporal_downsample": (True, True), "num_res_blocks": 1, "patch_size": 4}
TOKENIZERS: dict[str, TokenizerConfig] = {
    #                        channels  encoder  decoder  multipliers
    "image-16d": _tokenizer(       16,     160,     256, (1, 2, 4, 4)),
    "joint-64d": _tokenizer(       64,     160,     256, (1, 2, 4, 4)),
    "digits":    _tokenizer(       12,      32,      32, (1, 2, 2), **_DIGITS),
}

# 256 x 256 pixels, class-conditional, for the 16-channel tokenizer: "index" predicts one of 16
# codes per channel, "bit" one of 2 per channel and round. "digits-c2i": ten digits, 32 x 32 pixels.
_TEN = {"grid_size": (2, 2), "num_classes": 10, "num_context_tokens": 4}
GRN_CLASS: dict[str, GRNClassConfig] = {
    #                         elements  depth width heads  bottleneck  context start
    "B-index":    _grn_class((16, 16), (12,   768, 12),           128,             4),
    "L-index":    _grn_class((16, 16), (24,  1024, 16),           128,             8),
    "H-index":    _grn_class((16, 16), (32,  1280, 16),           256,            10),
    "G-index":    _grn_class((16, 16), (40,  1664, 16),           256,            10),
    "B-bit":      _grn_class((64,  2), (12,   768, 12),           128,             4),
    "L-bit":      _grn_class((64,  2), (24,  1024, 16),           128,             8),
    "H-bit":      _grn_class((64,  2), (32,  1280, 16),           256,            10),
    "G-bit":      _grn_class((64,  2), (40,  1664, 16),           256,            10),
    "digits-c2i": _grn_class((48,  2), ( 6,   128,  4),            64,             2, **_TEN),
}

# Text-conditional, for bits of the 64-channel tokenizer and UMT5-XXL features of 4096 channels.
# The largest was defined twice: "8b" is the definition that takes effect, and came with "full"
# attention; in "8b-grouped" four query heads share a key head. The rows of `k_proj` tell which of
# them a file is, 4096 or 1024. "digits-t2v": 48 bits, features of the "tiny" text encoder.
_GROUPED = {"num_kv_heads": 8}
_TINY_TEXT = {"text_channels": 64}
GRN_TEXT: dict[str, GRNTextConfig] = {
    #                       elements  depth width heads  mlp  per chunk  attention
    "0b":         _grn_text((256, 2), ( 4,   512,  4),  1792,         2, "prefix"),
    "2b":         _grn_text((256, 2), (28,  2304, 18),  8192,         4, "prefix"),
    "8b":         _grn_text((256, 2), (36,  4096, 32), 12288,         6, "full"),
    "8b-grouped": _grn_text((256, 2), (36,  4096, 32), 16384,         6, "full", **_GROUPED),
    "digits-t2v": _grn_text(( 48, 2), ( 6,   128,  4),   384,         2, "prefix", **_TINY_TEXT),
}

# Causal and bidirectional transformers of coarse-to-fine prediction, as in LlamaGen
# (arXiv 2406.06525); the paper's second stage is "L". "digits" is ours.
BACKBONES: dict[str, BackboneConfig] = {
    #                  depth width heads
    "B":      _backbone(12,  768, 12),
    "L":      _backbone(24, 1024, 16),
    "XL":     _backbone(36, 1280, 20),
    "XXL":    _backbone(48, 1536, 24),
    "3B":     _backbone(24, 3200, 32),
    "digits": _backbone( 6,  128,  4, dropout=0.0),
}

# What LlamaGen has published for ImageNet classes: these networks over 16,384 codes. Pictures of
# 384 pixels have a grid of 24 x 24, and networks of the same tensors.
LLAMAGEN: dict[str, CodeTransformerConfig] = {
    f"llamagen-{name}": _llamagen(name) for name in ("B", "L", "XL", "XXL", "3B")
}

# LlamaGen's image tokenizers with 16 and 8 pixels per position; "digits" is ours.
VQ_TOKENIZERS: dict[str, VQTokenizerConfig] = {
    "vq-16":     VQTokenizerConfig(),
    "vq-8":      VQTokenizerConfig(width_multipliers=(1, 2, 2, 4)),
    "vq-digits": VQTokenizerConfig(
        codebook_size=4096, width=32, width_multipliers=(1, 2, 2, 2), num_res_blocks=1,
        feature_width=64,
    ),
}
