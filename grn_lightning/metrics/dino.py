"""Features of DINOv2, for distances that do not see with the eyes of an ImageNet classifier.

Frechet distances over them agree better with people than those over Inception (Stein et al. 2023,
"Exposing flaws of generative model evaluation metrics"). The layers are timm's, weights are a local
file.
"""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_checkpoint
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from grn_lightning.metrics.features import (
    full_float32,
    resize_bytes,
    short_hash,
    to_bytes,
    to_frames,
)
from grn_lightning.metrics.protocols import Resize, Rounding

_SIZE = (224, 224)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DinoFeatures(nn.Module):
    """The class token of DINOv2 of every frame, scaled to 224x224 by PIL's bicubic filter.

    The positions of the weights are scaled to that size by timm, which differs from the authors'
    own code in the fourth digit: compare within one implementation.

    Args:
        weights: File of timm's or of the authors' (`dinov2_vitl14_pretrain.pth`).
        architecture: timm's name of the network.

    Raises:
        ValueError: If there is no such file or network, or they do not fit.
    """

    rounding: Rounding = "round"
    resize: Resize = "pil-bicubic"
    mean: Tensor
    std: Tensor

    def __init__(self, weights: Path | str, architecture: str = "vit_large_patch14_dinov2") -> None:
        super().__init__()
        path, known = Path(weights), timm.list_models("*dinov2*")
        if architecture not in known:
            raise ValueError(f"there is no {architecture!r}; known are {', '.join(known)}.")
        if not path.is_file():
            raise ValueError(
                f"weights of {architecture!r} must be a local file, there is none at '{path}'; "
                "nothing is downloaded."
            )
        model: Any = timm.create_model(
            architecture, pretrained=False, num_classes=0, img_size=_SIZE[0]
        )
        try:
            load_checkpoint(model, str(path), filter_fn=checkpoint_filter_fn, weights_only=True)
        except Exception as error:  # a foreign file: timm and torch each fail in their way
            raise ValueError(
                f"cannot load the weights of {architecture!r} from '{path}': "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
        self.model = model.requires_grad_(False).eval()
        self.name = "dinov2-" + architecture.removesuffix("_dinov2").replace("_", "-")
        self.network = f"{architecture}-{short_hash(path)}"
        self.num_features = int(model.num_features)
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1), persistent=False)

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips `(b, 3, f, h, w)` in [-1, 1] to features of all frames, `(b f, d)`."""
        images = to_bytes(to_frames(clips), self.rounding)
        with full_float32(images.device):
            shown = resize_bytes(images, _SIZE, self.resize) / 255
            return self.model((shown - self.mean) / self.std)
