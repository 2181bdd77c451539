"""Summaries of feature sets: running sums, and the reference statistics of real pictures.

`FeatureSums` is what a process adds to; `ReferenceStatistics` is what is kept in a file, with the
protocol it was made by and a hash. ADM and JiT publish theirs as `.npz`, which say nothing about
how they were made: whoever reads one says which features they are taken for.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torchmetrics import Metric

from grn_lightning.metrics.protocols import Protocol

_FORMAT = 1
_ARRAYS = {  # of ADM's evaluator; JiT's files have the first two
    "mean": "mu",
    "covariance": "sigma",
    "spatial_mean": "mu_s",
    "spatial_covariance": "sigma_s",
}
IMAGES_KEY = "arr_0"
"""Name of the pictures in an `.npz` of samples."""


class Moments(NamedTuple):
    """Mean and covariance of a set of features."""

    mean: Tensor
    """`(d,)` float64."""
    covariance: Tensor
    """`(d, d)` float64, unbiased."""
    num_samples: int
    """Samples behind them; 0 if nobody knows."""


class FeatureSums(Metric):
    """Sums over features in float64: memory does not grow, processes add up.

    Args:
        num_features: Width `d` of the features.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    outer: Tensor
    count: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        width = (num_features, num_features)
        self.add_state("total", torch.zeros(num_features).double(), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(width).double(), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Add features `(n, d)`.

        Raises:
            ValueError: If the width is another, or a feature is not a finite number.
        """
        check_features(features, self.num_features)
        features = features.double()
        self.total += features.sum(0)
        self.outer += features.T @ features
        self.count += len(features)

    def compute(self) -> Moments:
        """Return mean and covariance.

        Raises:
            ValueError: If there are fewer than two samples.
        """
        return moments_of_sums(self.total, self.outer, int(self.count))


def check_features(features: Tensor, num_features: int) -> None:
    """Refuse features from which no number should be made.

    Raises:
        ValueError: If they are not `(n, num_features)`, or not finite.
    """
    if features.ndim != 2 or features.shape[1] != num_features:
        raise ValueError(f"features must be (n, {num_features}), got {tuple(features.shape)}.")
    if not bool(torch.isfinite(features).all()):
        bad = int((~torch.isfinite(features)).any(1).sum())
        raise ValueError(
            f"features must be finite, but {bad} of {len(features)} samples have NaN or infinity; "
            "look at the samples, and at the precision of the network."
        )


def moments_of_sums(total: Tensor, outer: Tensor, count: int) -> Moments:
    """Return mean and covariance of sums over `count` features and their outer products.

    Raises:
        ValueError: If there are fewer than two samples.
    """
    if count < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {count}.")
    mean = total / count
    covariance = (outer - count * torch.outer(mean, mean)) / (count - 1)
    return Moments(mean, (covariance + covariance.T) / 2, count)


# --- reference statistics -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceStatistics:
    """Moments of real pictures, by which protocol they were made, and from what."""

    moments: Moments
    """Of the pooled features."""
    protocol: Protocol
    """How; `num_samples` is 0 if the file does not tell."""
    source: str
    """What the pictures were: a name for people."""
    spatial: Moments | None = None
    """Of the spatial features, for sFID."""
    features: Tensor | None = None
    """`(n, d)` float32: features of some of the pictures, for KID, precision and recall."""

    @property
    def digest(self) -> str:
        """SHA-256 of the numbers."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    @property
    def label(self) -> str:
        """Source and the beginning of the hash: what `Protocol.reference` says."""
        return f"{self.source}-{self.digest[:8]}"

    def require(self, protocol: Protocol) -> None:
        """Refuse to be compared with features of another kind.

        Raises:
            ValueError: If network or scaling differ, with both values.
        """
        found = self.protocol.mismatch(protocol)
        if found:
            raise ValueError(
                f"reference {self.label} was not made as the samples are judged (reference, then "
                f"samples): {'; '.join(found)}. Numbers across protocols mean nothing; make "
                "statistics with the same features by `grn evaluate stats`."
            )

    def _tensors(self) -> dict[str, Tensor]:
        found = {"mean": self.moments.mean, "covariance": self.moments.covariance}
        if self.spatial is not None:
            found["spatial_mean"] = self.spatial.mean
            found["spatial_covariance"] = self.spatial.covariance
        if self.features is not None:
            found["features"] = self.features.float()
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    def save(self, path: Path | str) -> None:
        """Write a `.safetensors` with protocol and hash, or an `.npz` as ADM's evaluator reads it.

        The file appears under its name when it is whole.

        Raises:
            ValueError: If the ending is neither.
        """
        path = Path(path)
        if path.suffix not in (".safetensors", ".npz"):
            raise ValueError(f"statistics are written to .safetensors or .npz, got '{path}'.")
        part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with part.open("wb") as file:
                if path.suffix == ".npz":
                    np.savez(file, **self._arrays())
                else:
                    metadata = {"reference": json.dumps(self._facts())}
                    file.write(save(self._tensors(), metadata=metadata))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _arrays(self) -> dict[str, Any]:
        """What ADM's evaluator reads."""
        return {_ARRAYS[k]: v.numpy() for k, v in self._tensors().items() if k in _ARRAYS}

    def _facts(self) -> dict[str, Any]:
        """What a file says about its numbers."""
        return {
            "format": _FORMAT,
            "protocol": self.protocol.as_dict(),
            "source": self.source,
            "count": self.moments.num_samples,
            "digest": self.digest,
        }

    @classmethod
    def read(cls, path: Path | str, *, protocol: Protocol | None = None) -> Self:
        """Read statistics of `save`, or an `.npz` of ADM or JiT.

        Args:
            path: `.safetensors` or `.npz`; nothing in it is executed.
            protocol: For an `.npz`, which does not know: with which features it was made. For
                others, what they are required to be; None takes them as they are.

        Raises:
            ValueError: If there is no such file, it is damaged, or it was made otherwise.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(
                f"there are no reference statistics at '{path}'; make them by `grn evaluate stats`."
            )
        if path.suffix == ".npz":
            return cls._read_npz(path, protocol)
        found = cls._read_safetensors(path)
        if protocol is not None:
            found.require(protocol)
        return found

    @classmethod
    def _read_safetensors(cls, path: Path) -> Self:
        try:
            with safe_open(str(path), framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get("reference", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"'{path}' is no whole safetensors file: {error}.") from error
        if facts.get("format") != _FORMAT:
            raise ValueError(
                f"'{path}' must hold reference statistics of format {_FORMAT}, got "
                f"{facts.get('format', 'something else')}; make them by `grn evaluate stats`."
            )
        found = cls(
            protocol=Protocol.from_dict(facts["protocol"]),
            source=facts["source"],
            features=tensors.get("features"),
            **_moments_of(tensors, int(facts["count"]), path),
        )
        if found.digest != facts["digest"]:
            raise ValueError(f"'{path}' is damaged: its numbers do not have the hash it states.")
        return found

    @classmethod
    def _read_npz(cls, path: Path, protocol: Protocol | None) -> Self:
        if protocol is None:
            raise ValueError(
                f"'{path}' does not say with which features it was made; name them, for example "
                "`--features torch_fidelity`."
            )
        with open_npz(path) as arrays:
            missing = [key for key in ("mu", "sigma") if key not in arrays]
            if missing:
                hint = (
                    f"; it holds pictures ({IMAGES_KEY}): make statistics of them by "
                    "`grn evaluate stats`"
                    if IMAGES_KEY in arrays
                    else ""
                )
                raise ValueError(f"'{path}' lacks {' and '.join(missing)}{hint}.")
            tensors = {
                name: _read_array(arrays, key, path)
                for name, key in _ARRAYS.items()
                if key in arrays
            }
        return cls(
            protocol=protocol.with_samples(0, reference=""),
            source=path.stem,
            **_moments_of(tensors, 0, path),
        )


def _moments_of(tensors: Mapping[str, Tensor], count: int, path: Path) -> dict[str, Any]:
    """Check the arrays of a file and pair them."""
    found: dict[str, Any] = {}
    for field, prefix in (("moments", ""), ("spatial", "spatial_")):
        mean, covariance = tensors.get(f"{prefix}mean"), tensors.get(f"{prefix}covariance")
        if mean is None or covariance is None:
            continue
        shapes = tuple(mean.shape), tuple(covariance.shape)
        if mean.ndim != 1 or shapes[1] != (len(mean), len(mean)):
            raise ValueError(
                f"{prefix}mean and covariance in '{path}' must be (d,) and (d, d), got "
                f"{shapes[0]} and {shapes[1]}."
            )
        if not bool(torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
            raise ValueError(f"{prefix}mean or covariance in '{path}' is not finite.")
        if not torch.allclose(covariance, covariance.T, rtol=1e-5, atol=1e-8):
            raise ValueError(f"{prefix}covariance in '{path}' is not symmetric.")
        found[field] = Moments(mean, covariance, count)
    if "moments" not in found:
        raise ValueError(f"'{path}' lacks mean and covariance.")
    return found


# --- .npz files of others -------------------------------------------------------------------------


def open_npz(path: Path | str) -> Any:
    """Open an `.npz` whose arrays are read when asked for; objects in it are refused.

    Raises:
        ValueError: If it is none.
    """
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"'{path}' is no whole .npz file, an archive of arrays of numbers; such files come "
            "from ADM's evaluator and others, or from `grn evaluate stats`."
        ) from error


def _read_array(arrays: Any, key: str, path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.asarray(arrays[key], dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"'{key}' in '{path}' holds objects or text, which are not read; it must be an array "
            "of numbers."
        ) from error


def npz_images(path: Path | str, *, batch_size: int) -> Iterator[Tensor]:
    """Yield the pictures of an `.npz` of samples, a batch at a time; the file stays on disk.

    Args:
        path: With an array `arr_0`, uint8 `(n, h, w, 3)`, as ADM's evaluator takes it.
        batch_size: Pictures at a time.

    Yields:
        uint8 `(b, 3, h, w)`.

    Raises:
        ValueError: If there are no such pictures.
    """
    with zipfile.ZipFile(path) as archive:
        name = f"{IMAGES_KEY}.npy"
        if name not in archive.namelist():
            raise ValueError(f"'{path}' holds no pictures {IMAGES_KEY}, uint8 (n, h, w, 3).")
        with archive.open(name) as file:
            shape, is_fortran, dtype = _read_header(file)
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or is_fortran:
                raise ValueError(
                    f"{IMAGES_KEY} in '{path}' must be uint8 (n, h, w, 3), got {dtype} {shape}."
                )
            size = int(np.prod(shape[1:]))
            for first in range(0, shape[0], batch_size):
                count = min(batch_size, shape[0] - first)
                data = file.read(count * size)
                if len(data) < count * size:
                    raise ValueError(f"'{path}' ends before its {shape[0]} pictures do.")
                batch = np.frombuffer(bytearray(data), np.uint8).reshape(count, *shape[1:])
                yield torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous()


def _read_header(file: io.BufferedIOBase | Any) -> tuple[tuple[int, ...], bool, Any]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)
