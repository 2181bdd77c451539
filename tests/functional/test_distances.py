import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch_fidelity.metric_kid import mmd2
from torch_fidelity.metric_prc import calculate_precision_recall_full

from grn_lightning.functional import (
    frechet_distance,
    is_within_radii,
    neighbour_radii,
    polynomial_kernel_distance,
)


def moments(n: int, d: int, *, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, d, dtype=torch.float64) @ torch.randn(d, d, dtype=torch.float64) + shift
    return x.mean(0), torch.cov(x.T)


def test_the_frechet_distance_equals_scipys_root() -> None:
    one, two = moments(300, 24), moments(200, 24, shift=0.5)
    root = scipy.linalg.sqrtm(one[1].numpy() @ two[1].numpy()).real
    gap = (one[0] - two[0]).square().sum().item()
    expected = gap + one[1].trace().item() + two[1].trace().item() - 2 * np.trace(root)
    assert frechet_distance(*one, *two).item() == pytest.approx(expected, rel=1e-10)


def test_it_is_symmetric_and_zero_from_itself() -> None:
    one, two = moments(50, 8), moments(60, 8, shift=1.0)
    there, back = frechet_distance(*one, *two), frechet_distance(*two, *one)
    assert there.item() == pytest.approx(back.item(), rel=1e-12)
    assert frechet_distance(*one, *one).item() == pytest.approx(0, abs=1e-10)


def test_rotating_both_changes_nothing() -> None:
    one, two = moments(50, 8), moments(60, 8)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    turned = [(turn @ mean, turn @ cov @ turn.T) for mean, cov in (one, two)]
    here, there = frechet_distance(*one, *two), frechet_distance(*turned[0], *turned[1])
    assert here.item() == pytest.approx(there.item(), rel=1e-11)


def test_covariances_of_too_few_samples_do_no_harm() -> None:
    """Of rank one, the trace of the root is the product of the lengths times the cosine."""
    zero = torch.zeros(512, dtype=torch.float64)
    u, v = torch.randn(2, 512, dtype=torch.float64)
    value = frechet_distance(zero, torch.outer(u, u), zero, torch.outer(v, v))
    expected = u.dot(u) + v.dot(v) - 2 * u.dot(v).abs()
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_kernel_distance_equals_another_implementation() -> None:
    x, y = torch.randn(40, 12), 1.2 * torch.randn(40, 12) + 0.2
    kernels = [
        (a.double() @ b.double().T / 12 + 1).numpy() ** 3 for a, b in ((x, x), (x, y), (y, y))
    ]
    value = polynomial_kernel_distance(x, y)
    assert value.item() == pytest.approx(mmd2(*kernels), rel=1e-12)


def test_the_kernel_distance_is_unbiased() -> None:
    values = torch.stack([polynomial_kernel_distance(*torch.randn(2, 30, 6)) for _ in range(144)])
    assert values.mean().abs() < 4 * values.std() / 12
    assert (values < 0).double().mean() > 0.3


@pytest.mark.parametrize("chunk_size", [7, 1000])
def test_manifolds_equal_another_implementation(chunk_size: int) -> None:
    fake, real = torch.randn(60, 5), 0.7 * torch.randn(50, 5) + 0.3
    radii = [neighbour_radii(x, chunk_size=chunk_size) for x in (fake, real)]
    recall = is_within_radii(real, fake, radii[0], chunk_size=chunk_size).double().mean()
    precision = is_within_radii(fake, real, radii[1], chunk_size=chunk_size).double().mean()
    expected = calculate_precision_recall_full(fake, real)
    assert (precision.item(), recall.item()) == pytest.approx(expected, rel=1e-6)


def test_radii_are_distances_to_the_third_other_sample() -> None:
    line = torch.tensor([[0.0], [1.0], [3.0], [6.0], [10.0]])
    assert neighbour_radii(line).tolist() == [6, 5, 3, 5, 9]


def test_neighbours_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="less than the 3 samples, got 3"):
        neighbour_radii(torch.randn(3, 2))
