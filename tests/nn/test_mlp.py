import pytest
import torch
import torch.nn.functional as F

from grn_lightning.nn.mlp import GatedMLP, LinearFP32, SwiGLU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float32_layer_is_not_touched_by_autocast_or_by_the_dtype_of_its_weights(dtype):
    layer = LinearFP32(16, 8).to(dtype)
    x = torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = layer(x)
    assert result.dtype == torch.float32
    assert torch.equal(result, F.linear(x, layer.weight.float(), layer.bias.float()))


def test_swiglu_gates_with_the_first_half():
    layer = SwiGLU(6, 5).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    a, b = F.linear(x, layer.w12.weight, layer.w12.bias).split(5, dim=-1)
    expected = F.linear(a * torch.sigmoid(a) * b, layer.w3.weight, layer.w3.bias)
    torch.testing.assert_close(layer(x), expected)


def test_gated_mlp_passes_the_gate_through_silu():
    layer = GatedMLP(6, 5).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    gate = x @ layer.gate_proj.weight.T
    expected = (
        gate * torch.sigmoid(gate) * (x @ layer.up_proj.weight.T)
    ) @ layer.down_proj.weight.T
    torch.testing.assert_close(layer(x), expected)
