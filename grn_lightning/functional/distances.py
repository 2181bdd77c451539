r"""Distances between two sets of features: Frechet, kernel, and manifolds of nearest neighbours.

All compute in float64. A Frechet distance is a small difference of large traces, and distances
between near neighbours are small differences of large norms; in float32 either loses its last
digits, and on GPUs that round factors to TF32, most of them.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_POSITIVE = 1e-10
"""Smallest eigenvalue that counts as one, as a share of the largest (found by trying: the noise of
2048 features in float64 stays below 1e-14)."""


def frechet_distance(
    mean_1: Float[Tensor, " d"],
    covariance_1: Float[Tensor, "d d"],
    mean_2: Float[Tensor, " d"],
    covariance_2: Float[Tensor, "d d"],
) -> Float[Tensor, ""]:
    r"""Return the squared Frechet distance of two Gaussians (Dowson and Landau 1982), float64.

    .. math:: |\mu_1 - \mu_2|^2 + \mathrm{tr}\,(S_1 + S_2 - 2 (S_1^{1/2} S_2 S_1^{1/2})^{1/2})

    Both roots come from eigenvalues of symmetric matrices, which are real and stable; the root of
    the product ``S_1 S_2``, which is not symmetric, has neither property and goes wrong with some
    libraries without a word. Eigenvalues that are noise are taken for zero, so covariances of
    fewer samples than features do no harm.

    Args:
        mean_1: Mean of the first.
        covariance_1: Symmetric, without negative eigenvalues.
        mean_2: Mean of the second.
        covariance_2: As the first.

    Returns:
        At least 0, up to rounding.

    Example:
        >>> gap, one = torch.tensor([3.0]), torch.ones(1, 1)
        >>> frechet_distance(gap, one, 0 * gap, 4 * one).item()  # 3^2 + (1 - 2)^2
        10.0
    """
    mean_1, mean_2 = mean_1.double(), mean_2.double()
    covariance_1, covariance_2 = covariance_1.double(), covariance_2.double()
    values, vectors = torch.linalg.eigh(covariance_1)
    counts = values > _POSITIVE * values[-1]
    root = vectors[:, counts] * values[counts].sqrt()  # (d, r)
    product = root.T @ covariance_2 @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    gap = (mean_1 - mean_2).square().sum()
    return gap + covariance_1.trace() + covariance_2.trace() - 2 * cross


def polynomial_kernel_distance(
    x: Float[Tensor, "n d"], y: Float[Tensor, "l d"]
) -> Float[Tensor, ""]:
    r"""Return the unbiased squared maximum mean discrepancy of two sets, float64.

    The kernel is :math:`(x \cdot y / d + 1)^3`, that of KID (Binkowski et al. 2018, section 4).

    Args:
        x: At least two samples.
        y: At least two samples.

    Returns:
        0 on average for sets of one distribution, and then as often below as above.
    """
    x, y = x.double(), y.double()
    n, m, d = len(x), len(y), x.shape[1]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / d + 1) ** 3

    same = []
    for one, count in ((x, n), (y, m)):
        values = kernel(one, one)
        same.append((values.sum() - values.trace()) / (count * (count - 1)))
    return same[0] + same[1] - 2 * kernel(x, y).mean()


def neighbour_radii(
    features: Float[Tensor, "n d"], *, num_neighbours: int = 3, chunk_size: int = 1000
) -> Float[Tensor, " n"]:
    """Return the distance of every sample to its k-th nearest other sample, float64.

    Args:
        features: More than `num_neighbours` samples.
        num_neighbours: The k.
        chunk_size: Samples at a time; bounds the memory to ``chunk_size * n`` distances.

    Raises:
        ValueError: If there are too few samples.
    """
    if not 0 < num_neighbours < len(features):
        raise ValueError(
            f"num_neighbours must be at least 1 and less than the {len(features)} samples, got "
            f"{num_neighbours}."
        )
    features = features.double()
    # The nearest sample of all is the sample itself.
    found = [
        torch.cdist(chunk, features).kthvalue(num_neighbours + 1).values
        for chunk in features.split(chunk_size)
    ]
    return torch.cat(found)


def is_within_radii(
    queries: Float[Tensor, "n d"],
    features: Float[Tensor, "l d"],
    radii: Float[Tensor, " l"],
    *,
    chunk_size: int = 1000,
) -> Bool[Tensor, " n"]:
    """Return whether each query lies in the ball around at least one of the features.

    The union of the balls is the manifold of improved precision and recall (Kynkaanniemi et al.
    2019): precision is the share of generated samples on the manifold of real ones, recall the
    reverse.

    Args:
        queries: Samples to look at.
        features: Centres of the balls.
        radii: Of `neighbour_radii`; the surface belongs to the ball.
        chunk_size: Queries at a time; bounds the memory to ``chunk_size * l`` distances.
    """
    features, radii = features.double(), radii.double()
    found = [
        (torch.cdist(chunk, features) <= radii).any(1)
        for chunk in queries.double().split(chunk_size)
    ]
    return torch.cat(found)
