"""From pictures to features: bytes, scaling, precision, and what judges ask of an extractor.

Most of the distance between two FIDs of the same samples arises here, before any network.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch_fidelity.interpolate_compat_tensorflow import (
    interpolate_bilinear_2d_like_tensorflow1x,
)

from grn_lightning.media.images import to_uint8
from grn_lightning.metrics import protocols
from grn_lightning.metrics.protocols import Resize, Rounding


class Features(NamedTuple):
    """What a network says about `n` pictures or clips."""

    pooled: Tensor
    """`(n, num_features)`."""
    spatial: Tensor | None = None
    """`(n, num_spatial)`: features that know where, for sFID."""
    logits: Tensor | None = None
    """`(n, num_classes)`, for the Inception score."""


class FeatureExtractor(Protocol):
    """What a distance asks of its features; a `torch.nn.Module` besides.

    Optional attributes say more about it: `rounding`, `resize` and `network` as in a `Protocol`,
    `title`, the metric that its distance is called by instead of "FID", and `extract`, which
    returns `Features` of clips.
    """

    name: str
    """Part of the name of every number."""

    num_features: int
    """Width of the features."""

    def __call__(self, clips: Tensor, /) -> Tensor:
        """Map clips `(b, 3, f, h, w)` in [-1, 1] to features `(n, num_features)`, where n is b for
        an extractor of clips and `b f` for an extractor of pictures.
        """


def require_extractor(extractor: Any) -> tuple[str, int]:
    """Return name and width of an extractor.

    Raises:
        ValueError: If name or width are missing.
    """
    name, num_features = (getattr(extractor, key, None) for key in ("name", "num_features"))
    if not isinstance(name, str) or not isinstance(num_features, int):
        raise ValueError(
            "a feature extractor must have a name (str) and num_features (int), "
            f"{type(extractor).__name__} has {name!r} and {num_features!r}."
        )
    return name, num_features


def protocol_of(extractor: Any, *, num_samples: int = 0, reference: str = "") -> protocols.Protocol:
    """Return the protocol of numbers with the features of an extractor."""
    network = getattr(extractor, "network", "")
    return protocols.Protocol(
        features=extractor.name,
        num_samples=num_samples,
        reference=reference,
        rounding=getattr(extractor, "rounding", "none"),
        resize=getattr(extractor, "resize", "none"),
        network=network if isinstance(network, str) else "",  # many modules call a layer so
    )


def distance_name(extractor: Any) -> str:
    """Return the metric that a Frechet distance of these features is: "fvd" of clips, or "fid"."""
    return "fvd" if getattr(extractor, "title", "FID") == "FVD" else "fid"


def short_hash(path: Path) -> str:
    """Return the first eight digits of the SHA-256 of a file of weights."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]


@torch.no_grad()
def extract(extractor: nn.Module, clips: Tensor, *, real: bool = False) -> Features:
    """Return all that an extractor has to say; an extractor of one kind says one thing.

    It runs in evaluation mode: a metric inside a LightningModule is switched to training with it.

    Args:
        extractor: A `FeatureExtractor`.
        clips: `(b, 3, f, h, w)` in [-1, 1].
        real: Whether the clips were read from files. Then they are rounded back to the bytes that
            they were, by every protocol; truncation would lose a level here and there.
    """
    extractor.eval()
    of_clips: Any = getattr(extractor, "extract", None)
    of_bytes: Any = getattr(extractor, "extract_bytes", None)
    if real and of_bytes is not None:
        return of_bytes(to_bytes(to_frames(clips), "round"))
    return Features(extractor(clips)) if of_clips is None else of_clips(clips)


# --- pixels ---------------------------------------------------------------------------------------


def to_frames(clips: Tensor) -> Tensor:
    """Return the pictures `(b f, 3, h, w)` of clips `(b, 3, f, h, w)`."""
    return rearrange(clips, "b c f h w -> (b f) c h w")


def to_bytes(images: Tensor, rounding: Rounding) -> Tensor:
    """Map float [-1, 1] to uint8 as a protocol does it: to the nearest level, or to the one below.

    Truncated pictures are half a level darker on average. What came from bytes comes back as it
    was only by rounding: `x / 127.5 - 1` may end a little below its level.

    Raises:
        ValueError: If the rounding is "none", which does not make bytes.
    """
    if rounding == "none":
        raise ValueError("rounding must be 'round' or 'truncate' to make bytes, got 'none'.")
    if rounding == "round":
        return to_uint8(images)
    return ((images.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)


def resize_bytes(images: Tensor, size: tuple[int, int], resize: Resize) -> Tensor:
    """Scale uint8 pictures `(n, 3, h, w)` as a protocol does it, to float [0, 255].

    Pictures that have the size are left alone by every rule.

    Raises:
        ValueError: If the rule is "none" and the size another.
    """
    if resize == "tensorflow":
        return interpolate_bilinear_2d_like_tensorflow1x(images.float(), size, align_corners=False)
    if resize == "pil-bicubic":
        # In float64, torch's filter is PIL's to 2e-5 of a level; in float32, to 5e-3.
        large = interpolate(images.double(), size, mode="bicubic", antialias=True)
        return large.clamp(0, 255).float()
    if resize == "bilinear":
        return interpolate(images.float(), size, mode="bilinear", align_corners=False)
    if tuple(images.shape[-2:]) != tuple(size):
        raise ValueError(f"pictures must be {size} where nothing is scaled, got {images.shape}.")
    return images.float()


# --- precision ------------------------------------------------------------------------------------


def _precisions() -> list[tuple[Any, str, Any]]:
    """Settings that let GPUs round factors to TF32, with the values that forbid it."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and later
        return [(matmul, "fp32_precision", "ieee"), (cudnn.conv, "fp32_precision", "ieee")]
    return [(matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Compute in float32 and nothing less, whatever the surroundings have chosen.

    Inside a training in mixed precision the features would be those of bfloat16, and convolutions
    on GPUs use TF32 unless told otherwise: either changes an FID in its second digit.
    """
    settings = [(place, name, getattr(place, name), value) for place, name, value in _precisions()]
    for place, name, _, value in settings:
        setattr(place, name, value)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for place, name, old, _ in settings:
            setattr(place, name, old)
