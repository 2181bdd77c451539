"""Attention of the generators: one call to the kernel, two layers around it.

`b` batch, `n` heads, `l` tokens, `e` head width. Masks are boolean, True = attend.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grn_lightning.functional.rope import Rotary, apply_rotary
from grn_lightning.nn.norm import RMSNorm

KeyValue = tuple[Tensor, Tensor]  # both (b, n, l, e), keys normalized and rotated


def join_rotary(*tables: Rotary) -> Rotary:
    """Put rotary tables one behind the other."""
    return Rotary(*(torch.cat(group) for group in zip(*tables, strict=True)))


class TableCache:
    """The most recently used fixed tables, by key.

    Rotary tables are neither parameters nor buffers: a buffer would be rounded when a model is
    cast to bfloat16, and left empty when it is materialized from the meta device.

    Args:
        size: Number of entries kept; training on many resolutions asks for many tables.
    """

    def __init__(self, size: int = 16) -> None:
        self.size = size
        self._tables: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what `make` made for `key`, calling it only if nothing is stored."""
        if torch.compiler.is_compiling():
            return make()
        if key not in self._tables:
            with torch.inference_mode(False):  # the next user of the table may need gradients
                self._tables[key] = make()
        self._tables.move_to_end(key)
        if len(self._tables) > self.size:
            self._tables.popitem(last=False)
        return self._tables[key]


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, dropout: float = 0.0
) -> Tensor:
    """Softmax attention, scaled by `1 / sqrt(e)`.

    Args:
        q: Queries `(b, n, lq, e)`. Queries and keys are cast to the dtype of `v`.
        k: Keys `(b, m, lk, e)` where `m` divides `n`; consecutive query heads share a key head.
        v: Values, shaped like `k`.
        mask: Boolean, broadcastable to `(b, n, lq, lk)`; True = attend.
        dropout: Dropout rate on the attention weights.

    Returns:
        `(b, n, lq, e)`.
    """
    if k.shape[1] != q.shape[1]:  # repeated heads, unlike `enable_gqa`, keep all fused kernels
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask, dropout_p=dropout
    )


class FusedAttention(nn.Module):
    """Bidirectional self-attention with one fused `qkv` matrix and biases (class-conditional GRN).

    Queries and keys are normalized per head, then rotated.

    Args:
        width: Width of the tokens.
        num_heads: Number of heads; divides `width`.
        attention_dropout: Dropout rate on the attention weights.
        projection_dropout: Dropout rate on the result.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.attention_dropout = num_heads, attention_dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // num_heads)
        self.k_norm = RMSNorm(width // num_heads)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(projection_dropout)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Map `x` `(b, l, d)` to the same shape."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (b, l, 3, n, e)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = apply_rotary(self.q_norm(q), *rotary), apply_rotary(self.k_norm(k), *rotary)
        x = attend(q, k, v, dropout=self.attention_dropout if self.training else 0.0)
        return self.dropout(self.proj(x.transpose(1, 2).flatten(2)))


class AttentionLayout(NamedTuple):
    """What all blocks share in one pass: positions, and who attends to whom.

    The first `num_prefix` tokens attend to each other only; the rest attends to everything.
    """

    rotary: Rotary
    num_prefix: int = 0
    prefix_mask: Tensor | None = None  # (b, 1, num_prefix, num_prefix)
    mask: Tensor | None = None  # broadcastable to (b, 1, queries behind the prefix, keys)
    packed: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # in place of all the above


class PrefixAttention(nn.Module):
    """Self-attention with an optional prefix that sees only itself (text-conditional GRN).

    Separate matrices without biases; fewer key than query heads are possible. Queries and keys
    are normalized per head, then rotated.

    Args:
        width: Width of the tokens.
        num_heads: Number of query heads; divides `width`.
        num_kv_heads: Number of key heads; divides `num_heads`.
    """

    def __init__(self, width: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.head_dim = width // num_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.q_norm = RMSNorm(self.head_dim)
        self.k_norm = RMSNorm(self.head_dim)

    def forward(
        self, x: Tensor, layout: AttentionLayout, cached: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Attend within `x`, and from `x` to cached tokens.

        Args:
            x: Tokens `(b, l, d)`, the prefix first.
            layout: Positions of the tokens of `x`, and masks.
            cached: Keys and values of a prefix that `x` does not hold.

        Returns:
            The result `(b, l, d)`, and the keys and values of the tokens of `x`.
        """
        q, k, v = (self._heads(linear(x)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q = apply_rotary(self.q_norm(q), *layout.rotary)
        k = apply_rotary(self.k_norm(k), *layout.rotary).to(v.dtype)
        keys, values = k, v
        if cached is not None:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(cached, (k, v), strict=True))
        if layout.packed is not None:
            out = layout.packed(q, k, v)
            return self.o_proj(out.transpose(1, 2).flatten(2)), (k, v)
        p = layout.num_prefix
        out = attend(q[:, :, p:], keys, values, layout.mask)
        if p > 0:
            prefix = attend(q[:, :, :p], k[:, :, :p], v[:, :, :p], layout.prefix_mask)
            out = torch.cat([prefix, out], dim=2)
        return self.o_proj(out.transpose(1, 2).flatten(2)), (k, v)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (b, n, l, e)
