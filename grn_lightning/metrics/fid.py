r"""Frechet distance between the features of two sets of clips (FID, and its relatives).

Both sets are summarized by mean and covariance of their features:

    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))

The number depends on the features more than on anything else, so the extractor is an argument and
its name belongs to every number: `fid[inception-2015-12-05]`, `fid[digits-cnn]`. torchmetrics holds
the sums and the formula; here are the clips, the weights, and what happens on processes without
samples.
"""

from pathlib import Path
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

from grn_lightning.media.images import to_uint8

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""File of the Inception weights in torch-fidelity's release, converted from the TensorFlow graph of
2015-12-05 with which published FIDs are computed."""

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + INCEPTION_FILE
)


class FeatureExtractor(Protocol):
    """What a distance asks of its features; a `torch.nn.Module` besides."""

    name: str
    """Part of the name of every number."""

    num_features: int
    """Width of the features."""

    def __call__(self, clips: Tensor, /) -> Tensor:
        """Map clips `(b, 3, f, h, w)` in [-1, 1] to features `(n, num_features)`, where n is b for
        an extractor of clips and `b f` for an extractor of pictures.
        """


def fid_tag(name: str) -> str:
    """Return the name of a distance with the features `name`.

    Example:
        >>> fid_tag("digits-cnn")
        'fid[digits-cnn]'
    """
    return f"fid[{name}]"


class _PassFeatures(nn.Module):
    """Stands where torchmetrics expects a network, so that it takes features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class FrechetDistance(FrechetInceptionDistance):
    """Frechet distance with any features, summed and solved in float64.

    The metric holds the extractor as a submodule: keep it out of LightningModules, whose
    checkpoints would swallow it.

    Args:
        extractor: A module that is a `FeatureExtractor`; used in evaluation mode, without gradient.
        reset_real_features: Whether `reset` forgets the real set too. The validation set stays the
            same, so by default it is kept and needs to be added once.
    """

    def __init__(self, extractor: nn.Module, *, reset_real_features: bool = False) -> None:
        extractor_name, num_features = (
            getattr(extractor, key, None) for key in ("name", "num_features")
        )
        if not isinstance(extractor_name, str) or not isinstance(num_features, int):
            raise ValueError(
                "a feature extractor must have a name (str) and num_features (int), "
                f"{type(extractor).__name__} has {extractor_name!r} and {num_features!r}."
            )
        super().__init__(_PassFeatures(num_features), reset_real_features=reset_real_features)
        self.extractor_name = extractor_name
        self.extractor = extractor
        # Else it is set by `update`, and `compute` fails on a process that had no sample.
        self.orig_dtype = torch.float64

    @property
    def tag(self) -> str:
        """Name of the number."""
        return fid_tag(self.extractor_name)

    def update(self, clips: Tensor, real: bool, weights: Tensor | None = None) -> None:
        """Add clips to one of the sets.

        Args:
            clips: `(b, 3, f, h, w)` in [-1, 1].
            real: Which set; the generated one if False.
            weights: `(b,)`; a clip of weight 0 is padding and left out, all others count once.
        """
        if weights is not None:
            clips = clips[weights > 0]
        if len(clips):
            # A metric inside a LightningModule is switched to training with it.
            super().update(self.extractor.eval()(clips).double(), real=real)

    def compute(self) -> Tensor:
        """Return the distance, float64.

        Raises:
            ValueError: If one of the sets has fewer than two samples.
        """
        counts = int(self.real_features_num_samples), int(self.fake_features_num_samples)
        if min(counts) < 2:
            raise ValueError(
                f"{self.tag} must have at least 2 samples in each set, got {counts[0]} real and "
                f"{counts[1]} generated ones."
            )
        return super().compute()


def _cached_inception() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def _find_inception(weights_path: Path | str | None, *, allow_download: bool) -> Path:
    path = _cached_inception() if weights_path is None else Path(weights_path)
    if path.is_file():
        return path
    if weights_path is None and allow_download:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(path), "6726825d", progress=False)
        return path
    raise ValueError(
        f"weights_path must be the file {INCEPTION_FILE} (96 MB), but there is none at {path}. "
        f"Fetch it from {INCEPTION_URL}, or pass allow_download=True without a path."
    )


class InceptionFeatures(nn.Module):
    """The 2048 features of published FIDs, of every frame.

    Frames become uint8 as they would in a file: clamped, scaled and *rounded* to the nearest of 256
    levels (truncation, which is also found, shifts the number). They are scaled to 299x299 without
    antialiasing, like the graph of 2015 does it.

    A clip of f frames counts as f pictures. That says nothing about motion; it is the usual FID of
    frames, and for images (f = 1) the usual FID.

    Args:
        weights_path: The file of torch-fidelity's release; torch hub's cache if None.
        allow_download: Whether a file that the cache lacks may be fetched. Never without asking.

    Raises:
        ValueError: If there is no such file, or if it holds more than tensors.
    """

    name = "inception-2015-12-05"
    num_features = 2048

    def __init__(
        self, weights_path: Path | str | None = None, *, allow_download: bool = False
    ) -> None:
        super().__init__()
        path = _find_inception(weights_path, allow_download=allow_download)
        try:
            # torch-fidelity unpickles without restraint, so look first.
            torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{path} must be a plain state dict of tensors, but does not load as one; fetch it "
                f"again from {INCEPTION_URL}."
            ) from error
        self.network = NoTrainInceptionV3(
            "inception-v3-compat", [str(self.num_features)], str(path), antialias=False
        )

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips `(b, 3, f, h, w)` in [-1, 1] to the features of all frames, `(b f, 2048)`."""
        return self.network(to_uint8(rearrange(clips, "b c f h w -> (b f) c h w")))
