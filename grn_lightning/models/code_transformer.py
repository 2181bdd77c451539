"""CodeTransformer: one network for the three roles of coarse-to-fine prediction.

Causal, it predicts the codes of a picture in raster order: all of them (the plain autoregressive
baseline, LlamaGen, arXiv 2406.06525) or coarse labels only (stage 1 of coarse-to-fine prediction,
arXiv 2503.16194). Bidirectional, it sees the whole coarse map and predicts all fine codes in one
pass (stage 2). A condition, one class token or the features of a caption, stands in front.

`b` batch, `c` channels of a position, `h w` grid, `n = h w` positions, `p` prefix tokens,
`d` width, `k` alphabet. Parameter names and shapes are those of LlamaGen's checkpoints.
"""

import dataclasses
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grn_lightning.functional.rope import Rotary, apply_rotary, rope_2d_class
from grn_lightning.models.grn_text import TextCondition
from grn_lightning.nn.attention import TableCache, attend, join_rotary
from grn_lightning.nn.embed import LabelEmbedding
from grn_lightning.nn.mlp import LinearFP32
from grn_lightning.nn.norm import RMSNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeTransformerConfig:
    """Sizes of a `CodeTransformer`."""

    input_channels: int = 1
    """Codes per position that the network reads."""
    input_size: int
    """Values of a code that it reads."""
    output_channels: int = 1
    """Codes per position that it predicts; in a causal network, `input_channels`."""
    output_size: int
    """Values of a code that it predicts; in a causal network, `input_size`."""
    is_causal: bool = True
    """Position i sees what stands before it (stage 1, baseline); or all see all (stage 2)."""
    sees_earlier: bool = False
    """Position i of a bidirectional network sees what is to be predicted before it as well: a
    control that tells what the independence of stage 2 costs, at twice the tokens."""
    grid_size: tuple[int, int] = (16, 16)
    """Height and width of the code map."""
    depth: int
    """Number of blocks."""
    width: int
    """Width of the tokens; a multiple of 4 `num_heads`."""
    num_heads: int
    """Attention heads."""
    mlp_width: int | None = None
    """Width of the gated product; None is two thirds of 4 `width`, up to a multiple of 256."""
    num_classes: int = 1000
    """Classes without the null class, which is the row behind the last; 0 for captions."""
    text_channels: int = 0
    """Width of text features; 0 for classes."""
    prefix_rotation: Literal["zero", "identity"] = "zero"
    """How tokens of the condition are rotated. "zero", as published, multiplies their queries and
    keys by 0, so that they act by their values alone; "identity" leaves them as they are."""
    channel_depth: int = 0
    """Blocks of a small causal network over the channels of a position; 0 predicts the channels
    independently of one another."""
    dropout: float = 0.0
    """Dropout rate on embeddings, attention results and feed-forward results (published: 0.1)."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built, all at once."""
        issues = [text for is_wrong, text in self._rules() if is_wrong]
        if issues:
            raise ValueError("CodeTransformerConfig: " + "; ".join(issues) + ".")

    def _rules(self) -> list[tuple[bool, str]]:
        inputs = (self.input_channels, self.input_size)
        outputs = (self.output_channels, self.output_size)
        heads = 4 * self.num_heads
        return [
            (min(*inputs, *outputs) < 1, f"channels and sizes must be positive, got {inputs}"),
            (
                self.is_causal and inputs != outputs,
                "a causal network predicts what it reads: (input_channels, input_size) must be "
                f"(output_channels, output_size) = {outputs}, got {inputs}",
            ),
            (self.width % heads > 0, f"width must be a multiple of {heads}, got {self.width}"),
            (
                (self.num_classes > 0) == (self.text_channels > 0),
                "one of num_classes and text_channels must be 0, got "
                f"{self.num_classes} and {self.text_channels}",
            ),
            (
                self.prefix_rotation not in ("zero", "identity"),
                f"prefix_rotation must be 'zero' or 'identity', got {self.prefix_rotation!r}",
            ),
            (
                self.is_causal and self.sees_earlier,
                "sees_earlier is for bidirectional networks; a causal one sees all that is earlier",
            ),
            (self.channel_depth < 0, f"channel_depth must be at least 0, got {self.channel_depth}"),
            (not 0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}"),
        ]

    @property
    def hidden(self) -> int:
        """Width of the gated product."""
        return self.mlp_width or -(-(8 * self.width // 3) // 256) * 256

    @property
    def num_positions(self) -> int:
        """Positions of the grid."""
        return self.grid_size[0] * self.grid_size[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What is chosen freely of a `CodeTransformer`; the rest follows from codes and conditions."""

    depth: int
    """See `CodeTransformerConfig`, here and below."""
    width: int
    """Width of the tokens."""
    num_heads: int
    """Attention heads."""
    mlp_width: int | None = None
    """Width of the gated product."""
    prefix_rotation: Literal["zero", "identity"] = "zero"
    """How tokens of the condition are rotated."""
    channel_depth: int = 0
    """Blocks over the channels of a position."""
    dropout: float = 0.1
    """Dropout rate."""


class KVCache(NamedTuple):
    """Keys and values of all tokens so far; room for a whole sequence is taken at once."""

    keys: Tensor
    """`(b, depth, heads, p + n, e)`, rotated."""
    values: Tensor
    """Same shape."""
    mask: Tensor
    """`(b, p)` bool: tokens of the condition that count."""


class Attention(nn.Module):
    """Self-attention with one fused matrix, no biases, no normalization of heads."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        mask: Tensor | None,
        room: tuple[Tensor, Tensor, int] | None = None,
    ) -> Tensor:
        """Attend from `x` to itself, or to all tokens so far.

        Args:
            x: Tokens `(b, l, d)`.
            rotary: Positions of the tokens; None rotates nothing.
            mask: Boolean, broadcastable to `(b, heads, l, keys)`; True = attend.
            room: Keys and values `(b, heads, capacity, e)` to write to and to read from, and how
                many tokens they hold already.
        """
        qkv = self.wqkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (b, heads, l, e)
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        if room is not None:
            keys, values, start = room
            stop = start + x.shape[1]
            keys[:, :, start:stop], values[:, :, start:stop] = k.to(keys.dtype), v
            k, v = keys[:, :, :stop], values[:, :, :stop]
        out = attend(q, k, v, mask).transpose(1, 2).flatten(2)
        return self.resid_dropout(self.wo(out))


class FeedForward(nn.Module):
    """`w2(silu(w1 x) * w3 x)`, no biases."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.ffn_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `(..., d)` to the same shape."""
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """Normalized attention and feed-forward branches."""

    def __init__(self, width: int, num_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width, eps=1e-5)
        self.attention = Attention(width, num_heads, dropout)
        self.ffn_norm = RMSNorm(width, eps=1e-5)
        self.feed_forward = FeedForward(width, hidden, dropout)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        mask: Tensor | None,
        room: tuple[Tensor, Tensor, int] | None = None,
    ) -> Tensor:
        """Refine tokens `x` `(b, l, d)`; see `Attention.forward`."""
        x = x + self.attention(self.attention_norm(x), rotary, mask, room)
        return x + self.feed_forward(self.ffn_norm(x))


class ChannelHead(nn.Module):
    """Predict the channels of a position one after the other (a chain, no independence).

    Token 0 is what the transformer knows of the position; token j adds the code of channel j - 1.

    Args:
        config: Sizes; `channel_depth` blocks of the transformer's width and heads.
    """

    def __init__(self, config: CodeTransformerConfig) -> None:
        super().__init__()
        self.embedding = ChannelEmbedding(
            config.output_channels - 1, config.output_size, config.width
        )
        self.position = nn.Parameter(torch.empty(config.output_channels, config.width))
        self.layers = nn.ModuleList(
            Block(config.width, config.num_heads, config.hidden, config.dropout)
            for _ in range(config.channel_depth)
        )
        self.norm = RMSNorm(config.width, eps=1e-5)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """Return what the head knows before each of the first `j + 1` channels.

        Args:
            x: Positions `(..., d)`.
            codes: Codes `(..., j)` of their first channels, `j` below the number of channels.

        Returns:
            `(..., j + 1, d)`.
        """
        tokens = torch.cat([x[..., None, :], self.embedding(codes)], dim=-2)
        tokens = tokens + self.position[: tokens.shape[-2]]
        shape = tokens.shape
        tokens = tokens.flatten(0, -3)
        mask = torch.ones(shape[-2], shape[-2], dtype=torch.bool, device=x.device).tril()
        for layer in self.layers:
            tokens = layer(tokens, None, mask)
        return self.norm(tokens).unflatten(0, shape[:-2])


class ChannelEmbedding(nn.Embedding):
    """A table for each channel, one below the other; one channel is a plain embedding.

    Args:
        num_channels: Channels that have a table.
        size: Values of a code.
        width: Width of the embedding.
    """

    def __init__(self, num_channels: int, size: int, width: int) -> None:
        super().__init__(num_channels * size, width)
        self.size = size

    def forward(self, codes: Tensor) -> Tensor:
        """Map codes `(..., c)`, the first channels, to `(..., c, d)`."""
        offsets = self.size * torch.arange(codes.shape[-1], device=codes.device)
        return F.embedding(codes + offsets, self.weight)


class CodeTransformer(nn.Module):
    """Codes and a condition in, logits of codes out; see the head of this file.

    Args:
        config: Sizes.
    """

    def __init__(self, config: CodeTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = ChannelEmbedding(
            config.input_channels, config.input_size, config.width
        )
        if config.sees_earlier:
            self.earlier_embeddings = ChannelEmbedding(
                config.output_channels, config.output_size, config.width
            )
        if config.text_channels:
            self.text_proj = LinearFP32(config.text_channels, config.width)
        else:
            self.cls_embedding = LabelEmbedding(config.num_classes, config.width)
        self.tok_dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            Block(config.width, config.num_heads, config.hidden, config.dropout)
            for _ in range(config.depth)
        )
        self.norm = RMSNorm(config.width, eps=1e-5)
        if config.channel_depth:
            self.channel_head = ChannelHead(config)
        self.output = LinearFP32(
            config.width, config.output_channels * config.output_size, bias=False
        )
        self._tables = TableCache()
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize every parameter as published.

        | parameter | start |
        |---|---|
        | linear layers and embeddings | normal, std 0.02; bias 0 |
        | `output` | 0: the first loss is the log of the alphabet |
        | normalization weights | 1 |
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, ChannelHead):
                nn.init.normal_(module.position, std=0.02)
        nn.init.zeros_(self.output.weight)

    def forward(
        self, codes: Tensor, condition: Tensor | TextCondition, fine: Tensor | None = None
    ) -> Tensor:
        """Predict all positions at once.

        Args:
            codes: `(b, c, h, w)` in [0, input_size): in a causal network the targets themselves,
                of which position i sees those before it; else the coarse map.
            condition: Class labels `(b,)` in [0, num_classes], or caption features.
            fine: Targets `(b, output_channels, h, w)` of a network that `sees_earlier`, of which
                position i sees those before it; None for all others.

        Returns:
            Logits `(b, output_channels, h, w, output_size)`, float32.
        """
        self._check(codes)
        if (fine is not None) != self.config.sees_earlier:
            raise ValueError(
                "`fine` must be given to networks that see earlier codes, and no other."
            )
        prefix, prefix_mask = self._embed_condition(condition)
        tokens = self.tok_embeddings(codes.flatten(2).mT).sum(-2).float()  # (b, n, d)
        if self.config.is_causal:
            tokens = tokens[:, :-1]
        if fine is not None:
            earlier = self.earlier_embeddings(fine.flatten(2).mT).sum(-2)[:, :-1].float()
            tokens = torch.cat([tokens, tokens + F.pad(earlier, (0, 0, 1, 0))], dim=1)
        x = self.tok_dropout(torch.cat([prefix, tokens], dim=1))
        rotary = Rotary(*(table[: x.shape[1]] for table in self._rotary(prefix.shape[1], x.device)))
        mask = self._mask(prefix_mask, x.shape[1])
        for layer in self.layers:
            x = layer(x, rotary, mask)
        x = self.norm(x)[:, -self.config.num_positions :]
        own = codes if fine is None else fine
        return self._logits(x, own.flatten(2).mT).movedim(1, 2).unflatten(2, codes.shape[2:])

    def _logits(self, x: Tensor, codes: Tensor) -> Tensor:
        """Map positions `(b, n, d)`, with their own codes for a chain, to `(b, n, c, k)`."""
        if not self.config.channel_depth:
            return self.output(x).unflatten(-1, (self.config.output_channels, -1))
        known = self.channel_head(x, codes[..., : self.config.output_channels - 1])
        return self._channel_logits(known)

    def _channel_logits(self, known: Tensor) -> Tensor:
        """Map what is known before each channel `(..., c, d)` to its logits `(..., c, k)`."""
        weight = self.output.weight.float().unflatten(0, (self.config.output_channels, -1))
        return torch.einsum("...cd,ckd->...ck", known.float(), weight[: known.shape[-2]])

    # -- one position after the other -------------------------------------------------------------

    def prefill(self, condition: Tensor | TextCondition) -> tuple[Tensor, KVCache]:
        """Read the condition (causal networks only).

        Returns:
            What is known before the first position, `(b, d)`, for `channel_logits`, and a cache.

        Raises:
            ValueError: If the network is not causal.
        """
        if not self.config.is_causal:
            raise ValueError("a bidirectional network predicts all positions at once; call it.")
        prefix, prefix_mask = self._embed_condition(condition)
        config, p = self.config, prefix.shape[1]
        shape = (
            len(prefix),
            config.depth,
            config.num_heads,
            p + config.num_positions,
            config.width // config.num_heads,
        )
        weight = self.norm.weight
        cache = KVCache(weight.new_zeros(shape), weight.new_zeros(shape), prefix_mask)
        return self._read(prefix, cache, start=0)[:, -1], cache

    def advance(self, codes: Tensor, position: int, cache: KVCache) -> Tensor:
        """Read the codes `(b, c)` of a position.

        Args:
            codes: What stands at `position`.
            position: Number of the position in raster order.
            cache: From `prefill`; it is written to.

        Returns:
            What is known before the next position, `(b, d)`, for `channel_logits`.
        """
        token = self.tok_embeddings(codes).sum(-2)[:, None].float()
        return self._read(token, cache, start=cache.mask.shape[1] + position)[:, 0]

    def channel_logits(self, known: Tensor, codes: Tensor) -> Tensor:
        """Return the logits of the next channels of a position.

        Args:
            known: `(b, d)` from `prefill` or `advance`.
            codes: `(b, j)` codes of the position's channels that are drawn already.

        Returns:
            `(b, c, k)` for all channels if they are independent, else `(b, 1, k)` for channel `j`.
        """
        if not self.config.channel_depth:
            return self.output(known).unflatten(-1, (self.config.output_channels, -1))
        return self._channel_logits(self.channel_head(known, codes))[:, -1:]

    def _read(self, x: Tensor, cache: KVCache, *, start: int) -> Tensor:
        """Run tokens `(b, l, d)` that begin at `start`, with all before them in the cache."""
        length, p = x.shape[1], cache.mask.shape[1]
        rotary = Rotary(*(t[start : start + length] for t in self._rotary(p, x.device)))
        mask = self._mask(cache.mask, start + length)
        mask = None if mask is None else mask[:, :, start:]
        if length == 1 and cache.mask.all():
            mask = None  # the newest token sees everything
        for i, layer in enumerate(self.layers):
            x = layer(x, rotary, mask, (cache.keys[:, i], cache.values[:, i], start))
        return self.norm(x)

    # -- conditions, positions, masks -------------------------------------------------------------

    def _embed_condition(self, condition: Tensor | TextCondition) -> tuple[Tensor, Tensor]:
        """Return the prefix `(b, p, d)` and which of its tokens count `(b, p)`."""
        if isinstance(condition, Tensor):
            token = self.cls_embedding(condition)[:, None]  # the null class is the last row
            return token, torch.ones(token.shape[:2], dtype=torch.bool, device=token.device)
        embeds, mask = condition
        order = mask.long().argsort(dim=1, stable=True)  # padding first: position 0 is predicted
        mask = mask.gather(1, order)  # from the last token of the condition, which must count
        embeds = embeds.gather(1, order[..., None].expand_as(embeds))
        return self.text_proj(embeds.masked_fill(~mask[..., None], 0)), mask

    def _mask(self, prefix_mask: Tensor, length: int) -> Tensor | None:
        """Masks `(b | 1, 1, length, length)`; None if everything is seen."""
        p = prefix_mask.shape[1]
        is_seen = None
        if self.config.is_causal:
            is_seen = torch.ones(length, length, dtype=torch.bool, device=prefix_mask.device).tril()
            is_seen = is_seen[None, None]
        if self.config.sees_earlier:
            is_seen = torch.ones(length, length, dtype=torch.bool, device=prefix_mask.device)
            first = length - self.config.num_positions  # what is known whole stands before
            is_seen[:first, first:] = False
            is_seen[first:, first:] = is_seen[first:, first:].tril()
            is_seen = is_seen[None, None]
        if p > 1:  # captions of unequal length; a hidden token sees itself, so that no row is empty
            counts = F.pad(prefix_mask, (0, length - p), value=True)[:, None, None]
            itself = torch.eye(length, dtype=torch.bool, device=prefix_mask.device)
            is_seen = (counts if is_seen is None else is_seen & counts) | itself
        return is_seen

    def _rotary(self, num_prefix: int, device: torch.device) -> Rotary:
        """Tables of the condition's tokens and of all positions."""
        return self._tables.get((num_prefix, device), lambda: self._make_rotary(num_prefix, device))

    def _make_rotary(self, num_prefix: int, device: torch.device) -> Rotary:
        head_dim = self.config.width // self.config.num_heads
        zeros = torch.zeros(num_prefix, head_dim // 2)
        prefix = Rotary(zeros + (self.config.prefix_rotation == "identity"), zeros)
        grid = rope_2d_class(*self.config.grid_size, head_dim=head_dim)
        maps = [grid] * (2 if self.config.sees_earlier else 1)
        rotary = join_rotary(prefix, *maps)
        return Rotary(*(table.to(device) for table in rotary))

    def _check(self, codes: Tensor) -> None:
        expected = (self.config.input_channels, *self.config.grid_size)
        if tuple(codes.shape[1:]) != expected:
            raise ValueError(
                f"codes must be (b, {', '.join(map(str, expected))}), got {tuple(codes.shape)}; "
                "the network must fit the tokenizer and the size of the pictures."
            )
