"""Features of whole clips for FVD, by a network that the user has as a file.

Published FVDs use an I3D that was trained on Kinetics-400. Its weights are nobody's to fetch
silently, and no package brings them along; what goes around is a TorchScript file, which holds
network and weights together. Any other network serves as well, and gives another number: its
file's name and hash belong to it.
"""

import warnings
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from grn_lightning.metrics.features import (
    full_float32,
    resize_bytes,
    short_hash,
    to_bytes,
    to_frames,
)
from grn_lightning.metrics.protocols import Resize, Rounding

SIZE = (224, 224)
"""Height and width in pixels that I3D sees; frames are scaled, not cropped."""

_PROBE_FRAMES = 16
_OPTIONS = {"rescale": False, "resize": False, "return_features": True}


class VideoFeatures(nn.Module):
    """Features of clips by a network in a TorchScript file.

    Frames become uint8 as they would in a file, are scaled to 224x224 by bilinear interpolation
    and lie in [-1, 1]. The network is called with `(b, 3, f, 224, 224)` and must return
    `(b, num_features)`; if its `forward` has the options `rescale`, `resize` and `return_features`,
    as the I3D that goes around has, it is asked for features and to leave the pixels alone. Such a
    file is made from a module by `torch.jit.trace(module, clips).save(path)`.

    Args:
        path: The file.

    Raises:
        ValueError: If there is none, or it is not such a network.
    """

    title = "FVD"
    rounding: Rounding = "round"
    resize: Resize = "bilinear"

    def __init__(self, path: Path | str) -> None:
        super().__init__()
        path = Path(path)
        if not path.is_file():
            raise ValueError(
                f"there is no file '{path}' with a video network; save one in TorchScript that "
                "maps clips (b, 3, f, 224, 224) in [-1, 1] to features (b, n)."
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch asks for another format of files
                self.scripted = torch.jit.load(path, map_location="cpu").eval()
        except Exception as error:
            raise ValueError(f"'{path}' is no TorchScript file: {error}") from error
        names = {argument.name for argument in self.scripted.forward.schema.arguments}
        self.options = _OPTIONS if set(_OPTIONS) <= names else {}
        self.name = self.network = f"{path.stem}-{short_hash(path)}"
        self.num_features = self._probe(path)

    @torch.no_grad()
    def _probe(self, path: Path) -> int:
        try:
            features = self.scripted(torch.zeros(1, 3, _PROBE_FRAMES, *SIZE), **self.options)
        except Exception as error:
            raise ValueError(
                f"the network in '{path}' does not take clips (b, 3, f, 224, 224): {error}"
            ) from error
        if not isinstance(features, Tensor) or features.ndim != 2:
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features)
            raise ValueError(f"the network in '{path}' must return features (b, n), got {shape}.")
        return features.shape[1]

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips `(b, 3, f, h, w)` in [-1, 1] to features `(b, num_features)`."""
        frames = to_bytes(to_frames(clips), self.rounding)
        scaled = resize_bytes(frames, SIZE, self.resize) / 127.5 - 1
        shown = rearrange(scaled, "(b f) c h w -> b c f h w", b=len(clips))
        with full_float32(clips.device):
            return self.scripted(shown, **self.options)
