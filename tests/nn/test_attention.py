"""Attention against explicit softmax, and the prefix layout against a dense mask."""

import math

import pytest
import torch
from torch import Tensor

from grn_lightning.functional.rope import Rotary, rope_1d
from grn_lightning.nn.attention import (
    AttentionLayout,
    FusedAttention,
    PrefixAttention,
    TableCache,
    attend,
    join_rotary,
)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].mT / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        out[:, head] = scores.softmax(-1) @ v[:, head // group]
    return out


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("is_masked", [False, True])
def test_attend_is_softmax_attention_with_shared_key_heads(num_kv_heads, is_masked):
    q = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, num_kv_heads, 7, 8, dtype=torch.float64)
    mask = torch.rand(5, 7) < 0.7 if is_masked else None
    if mask is not None:
        mask[:, 0] = True
    expected = softmax_attention(q, k, v, mask)
    torch.testing.assert_close(attend(q, k, v, mask), expected)


def turn(x: Tensor, weight: Tensor, rotary: Rotary) -> Tensor:
    """Normalize every head and rotate its pairs as complex numbers."""
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(*rotary)).flatten(-2)


def attend_slowly(layer, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary) -> Tensor:
    q, k, v = (x.unflatten(-1, (-1, 12)).transpose(1, 2) for x in (q, k, v))
    q, k = turn(q, layer.q_norm.weight, rotary), turn(k, layer.k_norm.weight, rotary)
    return softmax_attention(q, k, v).transpose(1, 2).flatten(2)


def awaken_norms(layer):
    torch.nn.init.uniform_(layer.q_norm.weight)
    torch.nn.init.uniform_(layer.k_norm.weight)
    return layer.double()


def test_fused_attention_normalizes_rotates_and_attends_per_head():
    layer = awaken_norms(FusedAttention(24, 2))
    x, rotary = torch.randn(2, 5, 24, dtype=torch.float64), rope_1d(torch.arange(5), dim=12)
    expected = layer.proj(attend_slowly(layer, *layer.qkv(x).split(24, -1), rotary))
    # The norm is float32 inside, by intention.
    torch.testing.assert_close(layer(x, rotary), expected, rtol=1e-5, atol=1e-6)


def test_prefix_attention_normalizes_rotates_and_attends_with_shared_key_heads():
    layer = awaken_norms(PrefixAttention(48, 4, 2))
    x, rotary = torch.randn(2, 5, 48, dtype=torch.float64), rope_1d(torch.arange(5), dim=12)
    qkv = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    expected = layer.o_proj(attend_slowly(layer, *qkv, rotary))
    result = layer(x, AttentionLayout(rotary))[0]
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_dropout_of_attention_weights_acts_in_training_only():
    layer = FusedAttention(8, 1, attention_dropout=0.9)
    x, rotary = torch.randn(1, 6, 8), rope_1d(torch.arange(6), dim=8)
    assert not torch.equal(layer(x, rotary), layer(x, rotary))
    layer.eval()
    assert torch.equal(layer(x, rotary), layer(x, rotary))


@pytest.fixture
def prefix_layer():
    layer = PrefixAttention(24, 4, 2)
    torch.nn.init.uniform_(layer.q_norm.weight)
    return layer


def test_a_prefix_sees_itself_only_and_the_rest_sees_everything(prefix_layer):
    x, rotary = torch.randn(2, 7, 24), rope_1d(torch.arange(7), dim=6)
    dense = torch.ones(7, 7, dtype=torch.bool)
    dense[:3, 3:] = False
    expected = prefix_layer(x, AttentionLayout(rotary, mask=dense))[0]
    torch.testing.assert_close(prefix_layer(x, AttentionLayout(rotary, 3))[0], expected)


def test_a_cached_prefix_gives_what_the_whole_sequence_gives(prefix_layer):
    x, rotary = torch.randn(2, 7, 24), rope_1d(torch.arange(7), dim=6)
    expected, key_value = prefix_layer(x, AttentionLayout(rotary, 3))
    first, rest = (Rotary(*(table[part] for table in rotary)) for part in (slice(3), slice(3, 7)))
    prefix, cached = prefix_layer(x[:, :3], AttentionLayout(first))
    result = prefix_layer(x[:, 3:], AttentionLayout(rest), cached)[0]
    torch.testing.assert_close(torch.cat([prefix, result], dim=1), expected)
    torch.testing.assert_close(cached[0], key_value[0][:, :, :3])


def test_joined_tables_follow_each_other():
    whole = rope_1d(torch.arange(5), dim=4)
    parts = [Rotary(*(table[part] for table in whole)) for part in (slice(2), slice(2, 5))]
    torch.testing.assert_close(join_rotary(*parts), whole)


def test_tables_made_without_gradients_serve_training_and_the_oldest_leaves():
    tables, calls = TableCache(size=2), []

    def make() -> Tensor:
        calls.append(None)
        return torch.ones(2)

    with torch.inference_mode():
        tables.get("a", make)
    weight = torch.ones(2, requires_grad=True)
    (weight * tables.get("a", make)).sum().backward()
    assert len(calls) == 1
    for key in ("b", "a", "c", "a"):
        tables.get(key, make)
    assert len(calls) == 3
    tables.get("b", make)
    assert len(calls) == 4
