import pytest
import torch

from grn_lightning.nn.norm import RMSNorm


def test_the_norm_divides_by_the_root_mean_square():
    norm = RMSNorm(6)
    torch.nn.init.uniform_(norm.weight)
    x = torch.randn(2, 3, 6)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected.float())


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_float32_and_the_result_has_the_dtype_of_the_weight(weight_dtype):
    norm = RMSNorm(64).to(weight_dtype)
    x = (torch.randn(4, 64) * 100).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = norm(x)
    assert result.dtype == weight_dtype
    assert torch.equal(result, RMSNorm(64)(x.float()).to(weight_dtype))
