"""Training on what `grn encode` has stored: what is checked first, and what takes its place."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grn_lightning.datasets.codes import check_hash
from grn_lightning.functional import codes_to_elements
from grn_lightning.models.grn_text import TextCondition
from grn_lightning.models.hashes import weights_hash
from grn_lightning.pipelines import GeneratorPipeline


def text_encoder_hash(encoder: nn.Module) -> str:
    """Return what tells a text encoder from others: its own word, or else its weights' hash."""
    return str(getattr(encoder, "encoder_hash", None) or weights_hash(encoder))


def is_trainable(module: nn.Module) -> bool:
    """Whether any of its weights is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def refuse_foreign_cache(data: Any, *, tokenizer_hash: str, text_encoder: nn.Module | None) -> None:
    """Refuse codes and text features that other networks have made, before any step.

    Args:
        data: The data module; one that knows no cache is let pass.
        tokenizer_hash: Of the tokenizer at hand.
        text_encoder: The one at hand, if there is one.

    Raises:
        ValueError: Naming the source and both hashes, or if features are cached of an encoder that
            is trained.
    """
    code_hashes = data.code_hashes() if hasattr(data, "code_hashes") else {}
    for source, found in code_hashes.items():
        _named(source, found, tokenizer_hash, "tokenizer")
    text_hashes = data.text_hashes() if hasattr(data, "text_hashes") else {}
    if not text_hashes or text_encoder is None:
        return
    if is_trainable(text_encoder):
        raise ValueError(
            "`data.with_text_features` must be false where the text encoder is trained: its "
            "features change with every step."
        )
    expected = text_encoder_hash(text_encoder)
    for source, found in text_hashes.items():
        _named(source, found, expected, "text encoder")


def is_cached_already(data: Any) -> bool:
    """Whether all training sources hold codes, in which case `cache_codes` has nothing to do."""
    hashes = data.code_hashes() if hasattr(data, "code_hashes") else {}
    found = [name for name in hashes if name.endswith("(train)")]
    if not found or len(found) < len(data.sources):
        return False
    warnings.warn(
        f"`cache_codes` is ignored: the source {', '.join(found)} holds codes already.",
        stacklevel=2,
    )
    return True


def _named(source: str, found: str, expected: str, what: str) -> None:
    try:
        check_hash(found, expected, what=what)
    except ValueError as error:
        raise ValueError(f"source {source}: {error}") from error


def cached_elements(batch: Any, pipeline: GeneratorPipeline, *, tokenizer_hash: str) -> Tensor:
    """Return the generator's elements of a batch of codes, as `GeneratorPipeline.tokenize` does.

    Raises:
        ValueError: If another tokenizer has made the codes.
    """
    check_hash(batch["tokenizer_hash"], tokenizer_hash)
    rounds = pipeline.tokenizer.config.num_rounds
    elements = codes_to_elements(batch["codes"], num_rounds=rounds, target=pipeline.target)
    return elements if pipeline.is_text else elements.squeeze(2)


def cached_condition(
    batch: Any, dropped: Tensor | None, make_null: Callable[[], Any]
) -> TextCondition:
    """Return the features of a batch's captions; where one is dropped, those of the empty text.

    Args:
        batch: With `text_embeds` `(b, l, c)` and `text_mask` `(b, l)`.
        dropped: `(b,)` bool; None drops nothing.
        make_null: Gives the features of the empty text, one row; called where they are needed.
    """
    kept = TextCondition(batch["text_embeds"], batch["text_mask"])
    if dropped is None or not dropped.any():
        return kept
    null = make_null()
    length = max(kept.mask.shape[1], null.mask.shape[1])
    embeds, null_embeds = (_padded(one.embeds, length) for one in (kept, null))
    mask, null_mask = (_padded(one.mask, length) for one in (kept, null))
    where = dropped[:, None]
    return TextCondition(
        torch.where(where[..., None], null_embeds.to(embeds.dtype), embeds),
        torch.where(where, null_mask, mask),
    )


def _padded(values: Tensor, length: int) -> Tensor:
    """Fill up axis 1 with zeros."""
    missing = length - values.shape[1]
    if missing == 0:
        return values
    return torch.cat([values, values.new_zeros(len(values), missing, *values.shape[2:])], dim=1)
