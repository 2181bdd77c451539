"""Tokenizers of all families, told apart by their sizes."""

from collections.abc import Mapping
from typing import Any

from grn_lightning.models.tokenizer import HBQTokenizer, TokenizerConfig
from grn_lightning.models.variants import TOKENIZERS, VQ_TOKENIZERS, get_variant
from grn_lightning.models.vq_tokenizer import VQTokenizer, VQTokenizerConfig

Tokenizer = HBQTokenizer | VQTokenizer
AnyTokenizerConfig = TokenizerConfig | VQTokenizerConfig


def as_tokenizer_config(value: AnyTokenizerConfig | Mapping[str, Any] | str) -> AnyTokenizerConfig:
    """Return the sizes that a row's name, or the plain data of a checkpoint, stands for.

    Raises:
        ValueError: If no table has a row of that name.
    """
    if isinstance(value, str):
        table: dict[str, AnyTokenizerConfig] = {**TOKENIZERS, **VQ_TOKENIZERS}
        return get_variant(table, value)
    if isinstance(value, Mapping):
        return (VQTokenizerConfig if "codebook_size" in value else TokenizerConfig)(**value)
    return value


def build_tokenizer(config: AnyTokenizerConfig) -> Tokenizer:
    """Return the network of these sizes, with random weights."""
    if isinstance(config, VQTokenizerConfig):
        return VQTokenizer(config)
    return HBQTokenizer(config)
