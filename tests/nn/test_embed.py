"""Embeddings against their definitions; the code embedding against an explicit one-hot."""

import math

import pytest
import torch
import torch.nn.functional as F

from grn_lightning.nn.embed import CodeEmbedding, TimeEmbedding, sincos_2d, time_sinusoid


def one_hot_product(layer, codes):
    one_hot = F.one_hot(codes.movedim(1, -1), layer.alphabet_size).double()  # (b, *grid, c, k)
    if layer.order == "class":
        one_hot = one_hot.mT
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(one_hot.flatten(-2), layer.weight.double().flatten(1), bias)


@pytest.mark.parametrize("order", ["element", "class"])
@pytest.mark.parametrize("alphabet_size", [2, 3, 16])
@pytest.mark.parametrize("grid", [(3, 2), (2, 3, 2)])
def test_codes_are_embedded_as_a_linear_layer_embeds_their_one_hot(order, alphabet_size, grid):
    layer = CodeEmbedding(5, alphabet_size, 7, order=order)
    if layer.bias is not None:
        torch.nn.init.uniform_(layer.bias)
    codes = torch.randint(alphabet_size, (2, 5, *grid))
    result, expected = layer(codes), one_hot_product(layer, codes)
    assert result.shape == (2, *grid, 7)
    torch.testing.assert_close(result, expected.float())

    upstream = torch.randn_like(result)
    parameters = list(layer.parameters())
    gradients = torch.autograd.grad(result, parameters, upstream)
    torch.testing.assert_close(
        gradients, torch.autograd.grad(expected, parameters, upstream.double())
    )


@pytest.mark.parametrize("alphabet_size", [2, 4])
def test_code_embeddings_stay_float32_under_autocast(alphabet_size):
    layer = CodeEmbedding(6, alphabet_size, 8)
    codes = torch.randint(alphabet_size, (2, 6, 3))
    expected = layer(codes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(codes), expected)


def test_the_time_sinusoid_has_cosines_first_and_does_not_scale_time():
    t = torch.tensor([0.0, 0.3, 1.0])
    result = time_sinusoid(t)
    for row, time in zip(result, t.tolist(), strict=True):
        for i in (0, 1, 77, 127):
            angle = time * 10_000 ** (-i / 128)
            assert row[i].item() == pytest.approx(math.cos(angle), abs=1e-6)
            assert row[128 + i].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_time_embeddings_stay_float32_under_autocast():
    layer, t = TimeEmbedding(8), torch.rand(3)
    expected = layer(t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(t), expected)


def test_the_position_table_has_the_column_half_first():
    table = sincos_2d(3, 5, 16).unflatten(0, (3, 5))
    assert torch.equal(table[0, :, :8], table[2, :, :8])  # the same for every row
    assert torch.equal(table[:, 0, 8:], table[:, 4, 8:])  # the same for every column
    frequencies = [10_000 ** (-i / 4) for i in range(4)]
    expected = [math.sin(4 * f) for f in frequencies] + [math.cos(4 * f) for f in frequencies]
    torch.testing.assert_close(table[1, 4, :8], torch.tensor(expected))
