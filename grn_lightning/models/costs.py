"""What networks cost: matrix products of a pass forwards and backwards, and parameters.

One multiplication with its addition counts as two operations. Everything that is no matrix product
(normalization, softmax, rotation) is left out, as everywhere in the literature, and so is what a
kernel or activation checkpointing computes a second time: these are operations of the model, not of
a machine. Transformers are counted in closed form, because a packed batch has other lengths every
time; convolutional networks by running them without data. Tests hold the former to the latter.

`n` visual tokens, `l` text tokens, `d` width.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from grn_lightning.models.code_transformer import CodeTransformerConfig
from grn_lightning.models.grn_class import GRNClassConfig
from grn_lightning.models.grn_text import GRNTextConfig
from grn_lightning.models.tokenizers import AnyTokenizerConfig, build_tokenizer
from grn_lightning.nn.embed import NUM_SINUSOIDS


class Flops(NamedTuple):
    """Operations of the two halves of a training step."""

    forward: float = 0.0
    """Of the prediction."""
    backward: float = 0.0
    """Of the gradients; about twice as many."""

    @property
    def total(self) -> float:
        """Of a training step."""
        return self.forward + self.backward

    def plus(self, other: "Flops") -> "Flops":
        """Add the operations of another part."""
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def times(self, factor: float) -> "Flops":
        """Multiply by the number of samples or blocks."""
        return Flops(self.forward * factor, self.backward * factor)


def linear_flops(rows: float, inputs: int, outputs: int, *, is_first: bool = False) -> Flops:
    """Return the operations of a linear layer on `rows` vectors.

    Args:
        rows: Vectors that pass it.
        inputs: Width before it.
        outputs: Width behind it.
        is_first: Whether what it reads is data, which need no gradient.
    """
    forward = 2.0 * rows * inputs * outputs
    return Flops(forward, forward if is_first else 2 * forward)


def attention_flops(queries: float, keys: float, width: int) -> Flops:
    """Return the operations of scores and averages of all heads, together `width` wide."""
    forward = 4.0 * queries * keys * width
    return Flops(forward, 2 * forward)


def _sum(*parts: Flops) -> Flops:
    return Flops(*(sum(values) for values in zip(*parts, strict=True)))


def _time_embedding(width: int) -> Flops:
    first = linear_flops(1, 2 * NUM_SINUSOIDS, width, is_first=True)
    return first.plus(linear_flops(1, width, width))


def _code_width(num_elements: int, alphabet_size: int) -> int:
    """Columns that the code embedding multiplies; two letters need one."""
    return num_elements * (1 if alphabet_size == 2 else alphabet_size)


def class_flops(config: GRNClassConfig) -> Flops:
    """Return the operations of a `GRNClass` for one sample; all samples have one size."""
    d, m = config.width, config.mlp_width
    n = config.grid_size[0] * config.grid_size[1]
    codes = _code_width(config.num_elements, config.alphabet_size)
    parts = [
        linear_flops(n, codes, config.bottleneck, is_first=True),
        linear_flops(n, config.bottleneck, d),
        _time_embedding(d),
        linear_flops(1, d, 2 * d),
        linear_flops(n, d, config.num_elements * config.alphabet_size),
    ]
    for block in range(config.depth):
        length = n + (config.num_context_tokens if block >= config.context_start else 0)
        parts += [
            linear_flops(1, d, 6 * d),
            linear_flops(length, d, 4 * d),  # queries, keys, values, result
            attention_flops(length, length, d),
            linear_flops(length, d, 3 * m),  # two ways in, one out
        ]
    return _sum(*parts)


def text_flops(
    config: GRNTextConfig,
    num_visual: int,
    num_text: float,
    *,
    num_given: int = 0,
    is_text_trained: bool = False,
) -> Flops:
    """Return the operations of a `GRNText` for one sample.

    Args:
        config: Sizes and kind of attention.
        num_visual: Positions of the code map, those of a first frame included.
        num_text: Tokens of the caption.
        num_given: Positions of the first frame, for which there are no logits.
        is_text_trained: Whether the text features need gradients.
    """
    d, n, text = config.width, num_visual + 1, num_text  # one token is the time
    keys = config.key_heads * config.head_dim
    codes = _code_width(config.num_elements, config.alphabet_size)
    if config.attention == "prefix":
        attention = attention_flops(n, n + text, d).plus(attention_flops(text, text, d))
    else:
        attention = attention_flops(n + text, n + text, d)
    block = _sum(
        linear_flops(n + text, d, 2 * d + 2 * keys),
        attention,
        linear_flops(n + text, d, 3 * config.mlp_width),
    )
    logits = config.num_elements * config.alphabet_size
    return _sum(
        linear_flops(text, config.text_channels, d, is_first=not is_text_trained),
        linear_flops(num_visual, codes, d, is_first=True),
        _time_embedding(d),
        block.times(config.depth),
        linear_flops(num_visual - num_given, d, logits),
    )


def transformer_flops(config: CodeTransformerConfig, num_text: float = 1) -> Flops:
    """Return the operations of a `CodeTransformer` for one sample.

    Args:
        config: Sizes.
        num_text: Tokens of the condition; a class is one.
    """
    d, n, channels = config.width, config.num_positions, config.output_channels

    def block(sequences: float, length: float) -> Flops:
        per_token = linear_flops(length, d, 4 * d + 3 * config.hidden)
        return per_token.plus(attention_flops(length, length, d)).times(sequences)

    length = num_text + n - (1 if config.is_causal else 0)
    parts = [block(1, length).times(config.depth)]
    if config.text_channels:
        parts.append(linear_flops(num_text, config.text_channels, d, is_first=True))
    if config.channel_depth:
        parts.append(block(n, channels).times(config.channel_depth))
    parts.append(linear_flops(n, d, channels * config.output_size))
    return _sum(*parts)


@lru_cache(maxsize=64)
def tokenizer_flops(config: AnyTokenizerConfig, size: tuple[int, int, int]) -> Flops:
    """Return the operations of a tokenizer for one clip, encoded and decoded.

    Args:
        config: Sizes.
        size: Frames, height and width in pixels.
    """
    return _counted(config, size, lambda network, clips: network(clips).reconstruction)


@lru_cache(maxsize=64)
def encoder_flops(config: AnyTokenizerConfig, size: tuple[int, int, int]) -> Flops:
    """Return the operations of a tokenizer's encoder for one clip, see `tokenizer_flops`.

    A generator that learns from pixels pays the forward half for every sample.
    """
    return _counted(config, size, lambda network, clips: network.encode(clips))


def _counted(
    config: AnyTokenizerConfig,
    size: tuple[int, int, int],
    run: Callable[[Any, Tensor], Tensor],
) -> Flops:
    """Run a network without data or memory, and count its products."""
    with torch.device("meta"):
        network = build_tokenizer(config)
        clips = torch.empty(1, 3, *size)
    return count_flops(lambda: run(network, clips))


def count_flops(run: Callable[[], Tensor], *, backward: bool = True) -> Flops:
    """Count the matrix products of a computation and of its gradients.

    Attention is taken apart into its products, because fused kernels are counted with what they
    compute a second time.

    Args:
        run: Returns what is differentiated; its networks and data may be on the meta device.
        backward: Whether to count the gradients too.
    """
    gradients = nullcontext() if backward else torch.no_grad()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, gradients:
        result = run()
        forward = counter.get_total_flops()
        if backward:
            result.sum().backward()
        total = counter.get_total_flops()
    return Flops(float(forward), float(total - forward))


def num_parameters(network: nn.Module, *, trained_only: bool = False) -> int:
    """Count the parameters of a network, each once; buffers do not count."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad or not trained_only)
