"""Features of CLIP, and how well pictures fit their captions.

Towers and transforms are open_clip's, weights are a local file: nothing is downloaded. Published
CLIP scores differ by the model, so its name and the hash of its weights belong to the number.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from grn_lightning.media.images import to_picture
from grn_lightning.metrics.features import (
    full_float32,
    protocol_of,
    short_hash,
    to_bytes,
    to_frames,
)
from grn_lightning.metrics.protocols import Measurement, Resize, Rounding

LOCAL_DIR = "local-dir:"


def _load(architecture: str, weights: Path | None) -> tuple[Any, Any, Path]:
    """Return model, transform of PIL pictures, and the file of the weights."""
    if architecture.startswith(LOCAL_DIR):
        folder = Path(architecture.removeprefix(LOCAL_DIR))
        found = sorted(folder.glob("open_clip_*.safetensors")) or sorted(folder.glob("*.pt"))
        weights = found[0] if found else folder / "open_clip_model.safetensors"
    elif architecture not in open_clip.list_models():
        raise ValueError(
            f"unknown architecture {architecture!r}; known are '{LOCAL_DIR}FOLDER' and the names "
            "that open_clip.list_models() returns."
        )
    if weights is None or not weights.is_file():
        raise ValueError(
            f"weights of {architecture!r} must be a local file, got "
            f"{None if weights is None else str(weights)!r}; nothing is downloaded."
        )
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            architecture,
            # An absolute path is never taken for the tag of a download.
            pretrained=None if architecture.startswith(LOCAL_DIR) else str(weights.resolve()),
            require_pretrained=True,
        )
    except Exception as error:  # a foreign file: open_clip, torch and json each fail in their way
        raise ValueError(
            f"cannot load the weights of {architecture!r} from '{weights}': "
            f"{type(error).__name__}: {error}"
        ) from error
    return model.requires_grad_(False).eval(), transform, weights


class ClipFeatures(nn.Module):
    """Both towers of an open_clip model; as a module, an extractor of the features of frames.

    Frames become bytes and pass through the transforms that open_clip evaluates the model with.

    Args:
        architecture: Name such as "ViT-L-14-quickgelu" (the weights of OpenAI need the
            "-quickgelu" names), or "local-dir:FOLDER" with `open_clip_config.json` and weights.
        weights: File of the weights, with a name.

    Raises:
        ValueError: If there is no such architecture or file.
    """

    rounding: Rounding = "round"
    resize: Resize = "open_clip"

    def __init__(self, architecture: str, weights: Path | str | None = None) -> None:
        super().__init__()
        model, self.transform, file = _load(
            architecture, None if weights is None else Path(weights)
        )
        self.model = model
        self.tokenizer = open_clip.get_tokenizer(architecture)
        short = Path(architecture.removeprefix(LOCAL_DIR)).name
        self.name = f"clip-{short}"
        self.network = f"{short}-{short_hash(file)}"
        with torch.no_grad():
            self.num_features = self.texts([""]).shape[1]

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips `(b, 3, f, h, w)` in [-1, 1] to features of all frames, `(b f, d)`."""
        images = to_bytes(to_frames(clips), self.rounding).cpu()
        shown = torch.stack([self.transform(to_picture(image)) for image in images])
        with full_float32(clips.device):
            return self.model.encode_image(shown.to(clips.device))

    def texts(self, captions: Sequence[str]) -> Tensor:
        """Return the features of captions, `(n, d)`; long ones are cut."""
        device = next(self.model.parameters()).device
        with full_float32(device):
            return self.model.encode_text(self.tokenizer(list(captions)).to(device))


def caption_scores(features: ClipFeatures, images: Tensor, captions: Sequence[str]) -> Tensor:
    """Return 100 times the cosine of picture and caption, negative ones as 0, `(b,)` float64.

    Args:
        features: Both towers.
        images: What they return of the frames of clips, `(b f, d)`; a clip scores their mean.
        captions: b of them.
    """
    images = nn.functional.normalize(images.double(), dim=1)
    texts = nn.functional.normalize(features.texts(captions).double(), dim=1)
    cosine = torch.einsum("bfd,bd->bf", images.unflatten(0, (len(captions), -1)), texts)
    return 100 * cosine.clamp(min=0).mean(1)


class ClipScore(Metric):
    """100 times the cosine of picture and caption, negative ones as 0, mean over samples.

    That is the score of Hessel et al. (2021) times 40. A clip scores the mean of its frames.

    Args:
        features: Both towers.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self, features: ClipFeatures) -> None:
        super().__init__()
        self.features = features
        self.num_scored = 0
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", torch.tensor(0), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, clips: Tensor, captions: Sequence[str], weights: Tensor | None = None) -> None:
        """Add samples.

        Args:
            clips: `(b, 3, f, h, w)` in [-1, 1].
            captions: What they should show.
            weights: `(b,)`; a sample of weight 0 is padding and left out, all others count once.

        Raises:
            ValueError: If there is not one caption for each clip.
        """
        if len(captions) != len(clips):
            raise ValueError(f"{len(clips)} clips need as many captions, got {len(captions)}.")
        if weights is not None:
            kept = (weights > 0).nonzero().flatten().tolist()
            clips, captions = clips[kept], [captions[index] for index in kept]
        if not len(clips):
            return
        self.total += caption_scores(self.features, self.features(clips), captions).sum()
        self.weight += len(clips)

    def compute(self) -> Tensor:
        """Return the mean, float64; NaN if nothing was added."""
        self.num_scored = int(self.weight)
        return self.total / self.weight

    def measure(self) -> Measurement:
        """Compute the score and return it with its protocol."""
        value = float(self.compute())
        protocol = protocol_of(self.features, num_samples=self.num_scored, reference="captions")
        return Measurement(metric="clip_score", value=value, protocol=protocol)
