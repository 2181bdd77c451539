"""Clusters of codewords or latents: made by k-means, kept in one file tied to one tokenizer.

| tensor | shape | what |
|---|---|---|
| `coarse_of` | `(k,)` int32 | cluster of every codeword; absent for clusters of latents |
| `members` | `(m, s)` int32 | codewords of every cluster, padded with -1; likewise |
| `size` | `(m,)` int32 | codewords, or latents of the fit, in every cluster |
| `centroid` | `(m, d)` float32 | centroids |

The header's `grn` entry is JSON: format, kind, tokenizer hash, seed, metric, inertia.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from sklearn.cluster import KMeans
from torch import Tensor

from grn_lightning.functional.clusters import cluster_members
from grn_lightning.functional.hbq import hbq_decode
from grn_lightning.models.coarse_split import ClusterSplit, LatentSplit
from grn_lightning.models.hashes import weights_hash
from grn_lightning.models.pretrained import save_tensors
from grn_lightning.models.tokenizer import HBQTokenizer
from grn_lightning.models.vq_tokenizer import VQTokenizer

FORMAT = 1
_ENTRY = "grn"


@dataclass(frozen=True, kw_only=True)
class ClustersInfo:
    """How clusters were made."""

    kind: Literal["codewords", "latents"]
    """What was clustered: the codebook of a `VQTokenizer`, or latents of an `HBQTokenizer`."""
    tokenizer_hash: str
    """Hash of the tokenizer's weights; with another one the clusters mean nothing."""
    num_rounds: int = 0
    """Bits per channel of the codes, for latents."""
    seed: int = 0
    """Seed of the k-means."""
    metric: str = "euclidean"
    """Distance of the k-means."""
    inertia: float = 0.0
    """Sum of squared distances to the centroids."""
    format_version: int = FORMAT
    """Version of the file's layout."""


@dataclass(frozen=True)
class Clusters:
    """Clusters and how they were made."""

    info: ClustersInfo
    """See there."""
    centroids: Tensor
    """`(m, d)`."""
    sizes: Tensor
    """`(m,)` members, or latents of the fit."""
    cluster_of: Tensor | None = None
    """`(k,)` long, for codewords."""

    def split(self) -> ClusterSplit | LatentSplit:
        """Return the split of code maps that they define."""
        if self.cluster_of is not None:
            return ClusterSplit(self.cluster_of, len(self.centroids))
        return LatentSplit(self.centroids, self.info.num_rounds)


def fit_codewords(
    tokenizer: VQTokenizer, *, num_clusters: int, seed: int = 0, num_restarts: int = 10
) -> Clusters:
    """Cluster a codebook (CTF section 3): k-means on unit codewords, every codeword once.

    Args:
        tokenizer: Whose codebook.
        num_clusters: Clusters, at most as many as codewords; the paper has 512 for 16,384.
        seed: Seed of the k-means.
        num_restarts: Starts of which the best is kept.

    Raises:
        ValueError: If there are more clusters than codewords.
    """
    codewords = tokenizer.quantize.codewords().detach().cpu()
    fitted = _fit(codewords, num_clusters, seed, num_restarts)
    return Clusters(
        info=ClustersInfo(
            kind="codewords",
            tokenizer_hash=weights_hash(tokenizer),
            seed=seed,
            inertia=float(fitted.inertia_),
        ),
        centroids=torch.from_numpy(fitted.cluster_centers_).float(),
        sizes=torch.from_numpy(fitted.labels_).long().bincount(minlength=num_clusters),
        cluster_of=torch.from_numpy(fitted.labels_).long(),
    )


def fit_latents(
    tokenizer: HBQTokenizer,
    codes: Tensor,
    *,
    num_clusters: int,
    seed: int = 0,
    num_restarts: int = 10,
) -> Clusters:
    """Cluster the quantized latents of training samples, each as often as it occurs.

    Args:
        tokenizer: Whose codes.
        codes: `(b, d, *grid)` long, codes of training samples.
        num_clusters: Clusters, at most as many as different latents.
        seed: Seed of the k-means.
        num_restarts: Starts of which the best is kept.

    Raises:
        ValueError: If there are more clusters than different latents.
    """
    num_rounds = tokenizer.config.num_rounds
    vectors = hbq_decode(codes, num_rounds=num_rounds).movedim(1, -1).flatten(0, -2).cpu()
    fitted = _fit(vectors, num_clusters, seed, num_restarts)
    return Clusters(
        info=ClustersInfo(
            kind="latents",
            tokenizer_hash=weights_hash(tokenizer),
            num_rounds=num_rounds,
            seed=seed,
            inertia=float(fitted.inertia_),
        ),
        centroids=torch.from_numpy(fitted.cluster_centers_).float(),
        sizes=torch.from_numpy(fitted.labels_).long().bincount(minlength=num_clusters),
    )


def _fit(vectors: Tensor, num_clusters: int, seed: int, num_restarts: int) -> KMeans:
    different = len(vectors.unique(dim=0))
    if not 1 <= num_clusters <= different:
        raise ValueError(
            f"num_clusters must be between 1 and {different}, the different vectors there are, "
            f"got {num_clusters}."
        )
    means = KMeans(num_clusters, n_init=num_restarts, max_iter=300, random_state=seed)
    return means.fit(vectors.double().numpy())


def write_clusters(path: Path, clusters: Clusters) -> None:
    """Write clusters to a file; see the head of this module."""
    tensors = {
        "centroid": clusters.centroids.float().contiguous(),
        "size": clusters.sizes.int().contiguous(),
    }
    if clusters.cluster_of is not None:
        members = cluster_members(clusters.cluster_of, num_clusters=len(clusters.centroids))
        tensors |= {"coarse_of": clusters.cluster_of.int(), "members": members.int().contiguous()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, path, metadata={_ENTRY: json.dumps(asdict(clusters.info))})


def read_clusters(path: str | Path, *, tokenizer_hash: str | None = None) -> Clusters:
    """Read clusters, and look that they belong to a tokenizer.

    Args:
        path: File that `grn cluster` has written.
        tokenizer_hash: Hash of the tokenizer at hand; None does not look.

    Raises:
        ValueError: If the file is no such file, is of a newer format, or belongs to another
            tokenizer.
    """
    if not Path(path).is_file():
        raise ValueError(f"no clusters at '{path}'; `grn cluster TOKENIZER` writes them.")
    try:
        with safe_open(path, "pt") as file:
            info = json.loads((file.metadata() or {})[_ENTRY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"'{path}' is no file of clusters; `grn cluster TOKENIZER` writes one."
        ) from error
    version = info.get("format_version", 0)
    if version > FORMAT:
        raise ValueError(
            f"'{path}' has format {version}, this version reads up to {FORMAT}; update "
            "grn_lightning."
        )
    found = info["tokenizer_hash"]
    if tokenizer_hash not in (None, found):
        raise ValueError(
            f"the clusters '{path}' belong to tokenizer {found}, but the one at hand is "
            f"{tokenizer_hash}; make new ones: `grn cluster`."
        )
    cluster_of = tensors.get("coarse_of")
    return Clusters(
        info=ClustersInfo(**info),
        centroids=tensors["centroid"],
        sizes=tensors["size"].long(),
        cluster_of=None if cluster_of is None else cluster_of.to(torch.long),
    )
