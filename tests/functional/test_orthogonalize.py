"""Newton-Schulz changes singular values only, and brings them near 1."""

import pytest
import torch

from grn_lightning.functional.orthogonalize import orthogonalize

SHAPES = [(8, 64), (64, 8), (32, 48), (48, 32), (1, 10), (10, 1)]


def published_polynomial(s: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Singular values after the iteration of Jordan et al. (2024), which acts on each alone."""
    for _ in range(num_steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_steps", [1, 5])
def test_it_is_the_published_polynomial_of_the_singular_values(shape, num_steps):
    matrix = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    expected = u @ torch.diag(published_polynomial(s / s.norm(), num_steps)) @ vh
    torch.testing.assert_close(orthogonalize(matrix, num_steps=num_steps), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape):
    # The polynomial maps [0.005, 1] into [0.68, 1.16]; no smaller share of the norm occurs here.
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert values.min() > 0.68
    assert values.max() < 1.16


def test_small_singular_values_of_a_square_matrix_are_raised():
    matrix = torch.diag(torch.tensor([1.0, 0.1, 0.01]))
    values = orthogonalize(matrix).diagonal()
    assert (values > 0.68).all()


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_the_scale_of_the_matrix_does_not_matter(factor):
    matrix = torch.randn(6, 9, dtype=torch.float64)
    torch.testing.assert_close(orthogonalize(factor * matrix), orthogonalize(matrix))


def test_the_transpose_gives_the_transpose():
    matrix = torch.randn(12, 5)
    assert orthogonalize(matrix.mT).equal(orthogonalize(matrix).mT)


def test_zero_stays_zero():
    assert not orthogonalize(torch.zeros(4, 6)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_type_is_kept(dtype):
    assert orthogonalize(torch.randn(4, 6).to(dtype)).dtype == dtype
