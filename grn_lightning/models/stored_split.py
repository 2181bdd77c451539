"""Splits of code maps as plain data and tensors: what an export keeps of them."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from grn_lightning.models.coarse_split import ClusterSplit, CoarseSplit, LatentSplit, PrefixSplit
from grn_lightning.models.hashes import tensors_hash


class SplitTensors(nn.Module):
    """The tensors of a split as buffers, so that they lie in an export like weights."""

    def __init__(self, split: CoarseSplit) -> None:
        super().__init__()
        if isinstance(split, ClusterSplit):
            self.register_buffer("cluster_of", split.cluster_of.int())
        elif isinstance(split, LatentSplit):
            self.register_buffer("centroids", split.centroids)


def split_as_plain(split: CoarseSplit) -> dict[str, Any]:
    """Return what a split is besides its tensors.

    Raises:
        ValueError: If it is none of `models.coarse_split`.
    """
    if isinstance(split, PrefixSplit):
        return {"kind": "prefix", **vars(split)}
    if isinstance(split, ClusterSplit):
        return {"kind": "clusters", "num_clusters": split.num_clusters}
    if isinstance(split, LatentSplit):
        return {"kind": "latents", "num_rounds": split.num_rounds}
    raise ValueError(f"a {type(split).__name__} has no stored form.")


def split_hash(split: CoarseSplit) -> str:
    """Return a hash of all that a split is, 16 hexadecimal digits."""
    plain = json.dumps(split_as_plain(split), sort_keys=True)
    whole = plain + tensors_hash(SplitTensors(split).state_dict())
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def read_split(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CoarseSplit:
    """Return the split that was stored.

    Args:
        plain: From `split_as_plain`.
        tensors: State of its `SplitTensors`.

    Raises:
        ValueError: If this version knows no such split, or a part of it is missing.
    """
    options = dict(plain)
    kind = options.pop("kind", None)
    try:
        if kind == "prefix":
            return PrefixSplit(**options)
        if kind == "clusters":
            return ClusterSplit(tensors["cluster_of"].long(), **options)
        if kind == "latents":
            return LatentSplit(tensors["centroids"], **options)
    except (KeyError, TypeError) as error:
        raise ValueError(f"a stored split of kind {kind!r} is incomplete: {error}.") from error
    raise ValueError(f"a stored split is of unknown kind {kind!r}; install a newer grn_lightning.")
