"""LPIPS: how different two pictures look to a frozen VGG-16 (Zhang et al. 2018).

The architecture is torchvision's, the calibrated heads are those that torchmetrics brings along.
The network's weights are nobody's to fetch silently: they come from a path, or from torchvision's
own folder if an earlier program has put them there.
"""

from pathlib import Path

import torch
import torchmetrics.functional.image as torchmetrics_image
from torch import Tensor, nn
from torchvision.models import VGG16_Weights, vgg16

_URL = VGG16_Weights.IMAGENET1K_V1.url
_LAST_LAYERS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPS = 1e-8  # inside the root, so that black features have a gradient


def find_vgg_weights(path: str | Path | None = None) -> Path:
    """Return the file with the weights of torchvision's VGG-16.

    Args:
        path: The file; None looks into torchvision's own folder.

    Raises:
        ValueError: If there is none; the message says which file to fetch and where to put it.
    """
    name = Path(_URL).name
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    file = cached if path is None else Path(path)
    if not file.is_file():
        raise ValueError(
            f"LPIPS needs the weights of VGG-16, but there is no file '{file}': fetch {_URL} and "
            f"put it to '{cached}', or give its path as `model.loss.vgg_weights`; nothing is "
            "downloaded here. Without it set `model.loss.perceptual: 0`."
        )
    return file


def _read(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"'{file}' cannot be read as weights: it is damaged.") from error
    features = {
        k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")
    }
    if not features:
        raise ValueError(f"'{file}' holds no weights of torchvision's VGG-16 (`features.*`).")
    return features


class LPIPS(nn.Module):
    """Learned perceptual distance of frames, frozen and always in eval mode.

    Gradients reach the frames and nothing else.

    Args:
        features: Convolutions of VGG-16 up to `relu5_3`, or beyond.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, features: nn.Sequential) -> None:
        super().__init__()
        starts = (0, *(last + 1 for last in _LAST_LAYERS))
        layers = list(features)
        for layer in layers:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # the compared features must survive the next layer
        self.slices = nn.ModuleList(
            nn.Sequential(*layers[begin:end])
            for begin, end in zip(starts[:-1], starts[1:], strict=True)
        )
        folder = Path(torchmetrics_image.__file__).parent / "lpips_models"
        heads = torch.load(folder / "vgg.pth", map_location="cpu", weights_only=True)
        for index in range(len(self.slices)):
            self.register_buffer(f"head_{index}", heads[f"lin{index}.model.1.weight"])
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def load(cls, path: str | Path | None = None) -> "LPIPS":
        """Return the metric with the weights of `find_vgg_weights`.

        Raises:
            ValueError: If there are none, or the file holds something else.
        """
        file = find_vgg_weights(path)
        with torch.device("meta"):
            features = vgg16().features
        try:
            features.load_state_dict(_read(file), assign=True)
        except RuntimeError as error:
            raise ValueError(f"'{file}' does not fit VGG-16: {error}") from error
        return cls(features)

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in eval mode."""
        return super().train(False)

    def _features(self, frames: Tensor) -> list[Tensor]:
        """Features of each slice, of unit length over their channels."""
        x, found = (frames - self.shift) / self.scale, []
        for part in self.slices:
            x = part(x)
            wide = x.float()
            found.append(wide * (wide.square().sum(1, keepdim=True) + _EPS).rsqrt())
        return found

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the distance `(n,)` of frames `(n, 3, h, w)` in [-1, 1], of at least 16 pixels."""
        distance = torch.zeros(len(first), device=first.device)
        pairs = zip(self._features(first), self._features(second), strict=True)
        for index, (one, two) in enumerate(pairs):
            head = self.get_buffer(f"head_{index}")  # (1, c, 1, 1)
            distance = distance + ((one - two).square() * head).sum(1).mean((1, 2))
        return distance
