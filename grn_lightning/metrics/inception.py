"""The Inception of 2015-12-05: the network behind FID, sFID, Inception score, KID.

torch-fidelity has converted its weights from the TensorFlow graph and holds its layers, and
torchmetrics keeps them in evaluation mode. Here are the three published ways to feed it, and its
three outputs.
"""

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torchmetrics.image.fid import NoTrainInceptionV3

from grn_lightning.metrics.features import (
    Features,
    full_float32,
    resize_bytes,
    short_hash,
    to_bytes,
    to_frames,
)
from grn_lightning.metrics.protocols import Rounding, find_convention

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""File of the Inception weights in torch-fidelity's release, converted from the TensorFlow graph of
2015-12-05 with which published FIDs are computed."""

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + INCEPTION_FILE
)

_SIZE = (299, 299)
_SPATIAL_CHANNELS = 7  # of a map of 17 x 17: about as many features as the pooled ones (ADM)


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
        f"Fetch it from {INCEPTION_URL} and give its path (on the command line as "
        "`--feature_weights`, in `grn evaluate stats` as `--weights`), or pass allow_download=True "
        "without one."
    )


class InceptionFeatures(nn.Module):
    """The 2048 features of published FIDs, of every frame; also those of sFID, and the logits.

    Frames become uint8 as they would in a file, by the rounding of the protocol, and are scaled to
    299x299 by its rule. The network computes in float32, whatever the surroundings.

    A clip of f frames counts as f pictures. That says nothing about motion; it is the usual FID of
    frames, and for images (f = 1) the usual FID.

    Args:
        weights_path: The file of torch-fidelity's release; torch hub's cache if None.
        allow_download: Whether a file that the cache lacks may be fetched. Never without asking.
        protocol: "torch_fidelity", "adm" or "clean"; see `protocols.CONVENTIONS`.
        rounding: How floats become bytes, if not as the protocol does it.

    Raises:
        ValueError: If there is no such file or protocol, or if the file holds more than tensors.
    """

    num_features = 2048
    num_spatial = 17 * 17 * _SPATIAL_CHANNELS
    num_classes = 1008

    def __init__(
        self,
        weights_path: Path | str | None = None,
        *,
        allow_download: bool = False,
        protocol: str = "torch_fidelity",
        rounding: Rounding | None = None,
    ) -> None:
        super().__init__()
        convention = find_convention(protocol)
        self.name = protocol
        self.rounding: Rounding = rounding or convention.rounding
        self.resize = convention.resize
        path = _find_inception(weights_path, allow_download=allow_download)
        try:
            # torch-fidelity unpickles without restraint, so look first.
            torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{path} must be a plain state dict of tensors, but does not load as one; fetch it "
                f"again from {INCEPTION_URL}."
            ) from error
        self.layers = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
        self.network = f"inception-2015-12-05-{short_hash(path)}"

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips `(b, 3, f, h, w)` in [-1, 1] to the features of all frames, `(b f, 2048)`."""
        return self.extract(clips).pooled

    def extract(self, clips: Tensor) -> Features:
        """Map clips `(b, 3, f, h, w)` in [-1, 1] to all features of all their frames.

        The spatial ones are the first 7 channels of the first branch of the block "mixed_6", height
        first and channels last, 2023 of them. The logits are without bias, as published Inception
        scores have them, 1008 of them.
        """
        return self.extract_bytes(to_bytes(to_frames(clips), self.rounding))

    def extract_bytes(self, images: Tensor) -> Features:
        """Map pictures uint8 `(n, 3, h, w)` to all their features."""
        with full_float32(images.device):
            return self._run((resize_bytes(images, _SIZE, self.resize) - 128) / 128)

    def _run(self, x: Tensor) -> Features:
        """Go through the layers, which are in order."""
        spatial = x
        for name, layer in self.layers.named_children():
            if name == "fc":
                break
            if name == "Mixed_6d":  # TensorFlow's mixed_6
                spatial = layer.branch1x1(x)[:, :_SPATIAL_CHANNELS]
            x = layer(x)
        pooled = x.flatten(1)
        logits = pooled @ self.layers.fc.weight.T
        return Features(pooled, rearrange(spatial, "n c h w -> n (h w c)"), logits)
