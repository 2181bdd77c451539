"""How much work a training batch is: what speeds and utilizations are computed from."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grn_lightning.models.costs import Flops, class_flops, text_flops, transformer_flops
from grn_lightning.models.grn_class import GRNClass
from grn_lightning.models.grn_text import GRNText
from grn_lightning.models.text_encoder import OpenClipTextEncoder


@dataclass(frozen=True)
class Work:
    """What one device does with one batch."""

    samples: int
    """Pictures and clips."""
    tokens: int = 0
    """Positions of code maps, tokens of captions and of time: what the network reads; 0 where that
    is unknown."""
    capacity: int = 0
    """The same with padding: `tokens / capacity` is the fill."""
    flops: float = 0.0
    """Matrix products of the network, forwards and backwards, without padding, frozen parts and
    whatever is computed twice; 0 where that is unknown."""

    def plus(self, other: "Work") -> "Work":
        """Add the work of another batch."""
        return Work(
            self.samples + other.samples,
            self.tokens + other.tokens,
            self.capacity + other.capacity,
            self.flops + other.flops,
        )


def text_lengths(batch: Any, text_encoder: Any) -> tuple[list[int], int]:
    """Return the tokens of each caption, and how many each takes with padding.

    Args:
        batch: With `text_mask` or `captions`.
        text_encoder: Reads captions.
    """
    if "text_mask" in batch:
        mask = batch["text_mask"]
        return mask.sum(1).tolist(), mask.shape[1]
    tokens: Tensor = text_encoder.tokenize(list(batch["captions"]))
    if isinstance(text_encoder, OpenClipTextEncoder):
        ends = text_encoder._end_index(tokens)
    else:
        ends = (torch.arange(tokens.shape[1]) * (tokens != 0)).amax(1)
    return (ends + 1).tolist(), tokens.shape[1]


def work_of_elements(network: Any, shape: tuple[int, ...], lengths: list[int], room: int) -> Work:
    """Return the work of a batch of code maps of one size.

    Args:
        network: A `GRNClass`, a `GRNText` or a `CodeTransformer`.
        shape: Batch, channels and grid of the map.
        lengths: Tokens of each caption; empty with classes.
        room: Tokens that a caption takes with padding.
    """
    number, positions = shape[0], torch.Size(shape[2:]).numel()
    if isinstance(network, GRNClass):
        length = positions + network.config.num_context_tokens
        flops = class_flops(network.config).times(number)
        return Work(number, number * length, number * length, flops.total)
    if isinstance(network, GRNText):
        parts = [text_flops(network.config, positions, length) for length in lengths]
        tokens = number * (positions + 1) + sum(lengths)
        return Work(number, tokens, number * (positions + 1 + room), _total(parts))
    lengths = lengths or [1] * number
    parts = [transformer_flops(network.config, length) for length in lengths]
    tokens = number * positions + sum(lengths)
    return Work(number, tokens, number * (positions + max(room, 1)), _total(parts))


def _total(parts: list[Flops]) -> float:
    return sum(part.total for part in parts)
