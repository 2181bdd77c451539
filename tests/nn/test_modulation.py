import pytest
import torch

from grn_lightning.nn.modulation import Modulation, modulate


def test_zero_vectors_modulate_nothing():
    x, zero = torch.randn(2, 3, 4), torch.zeros(2, 1, 4)
    assert torch.equal(modulate(x, zero, zero), x)


def test_vectors_are_consecutive_rows_of_one_linear_layer():
    modulation = Modulation(4, 3)
    c = torch.randn(2, 4)
    for i, vector in enumerate(modulation(c)):
        rows = slice(4 * i, 4 * i + 4)
        expected = torch.nn.functional.silu(c) @ modulation.linear.weight[rows].T
        torch.testing.assert_close(vector[:, 0], expected + modulation.linear.bias[rows])


@pytest.mark.parametrize(("is_fp32", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_autocast_reaches_blocks_but_not_the_final_layer(is_fp32, dtype):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Modulation(4, 2, is_fp32=is_fp32)(torch.randn(2, 4))[0].dtype == dtype
