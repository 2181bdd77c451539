"""Orthogonalization of updates by Newton-Schulz iteration (Jordan et al. 2024, "Muon")."""

from jaxtyping import Float
from torch import Tensor

# Coefficients of the odd quintic of Jordan et al.: they do not converge to 1 but bring singular
# values between about 0.7 and 1.2 within five steps, which is all that an update needs.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(
    matrix: Float[Tensor, "*batch rows cols"], *, num_steps: int = 5
) -> Float[Tensor, "*batch rows cols"]:
    """Return matrices with the same singular vectors and singular values near 1.

    Args:
        matrix: Any real matrices, each on its own; zero stays zero.
        num_steps: Newton-Schulz steps.

    Returns:
        Approximately `U V^T` for `matrix = U S V^T`, in the same dtype.
    """
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if is_tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if is_tall else x
