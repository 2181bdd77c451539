"""Feature extractors by name, as a command line gives them."""

from pathlib import Path

from torch import nn

from grn_lightning.metrics.clip import ClipFeatures
from grn_lightning.metrics.digits import DigitJudge
from grn_lightning.metrics.dino import DinoFeatures
from grn_lightning.metrics.inception import InceptionFeatures
from grn_lightning.metrics.protocols import CONVENTIONS, Rounding
from grn_lightning.metrics.video_features import VideoFeatures

FEATURES = (*CONVENTIONS, "digits-cnn", "dinov2", "clip:ARCHITECTURE", "video")
"""Names of features: Inception by a published protocol, the judge of the embedded set, and networks
of the user."""


def build_extractor(
    features: str, weights: Path | None = None, *, rounding: Rounding | None = None
) -> nn.Module:
    """Return the extractor that a name means; see `FEATURES`.

    Args:
        features: `dinov2` is the large one; `dinov2:NAME` another of timm's.
        weights: File of its weights. For Inception, None looks into torch hub's cache; "digits-cnn"
            takes the judge's file.
        rounding: How floats become bytes, for Inception if not as the protocol does it.

    Raises:
        ValueError: If there is no such name, or a file is missing or another.
    """
    kind, _, detail = features.partition(":")
    if rounding is not None and kind not in CONVENTIONS:
        raise ValueError(f"rounding belongs to Inception's protocols, not to {features!r}.")
    if kind in CONVENTIONS and not detail:
        return InceptionFeatures(weights, protocol=kind, rounding=rounding)
    if kind == "clip" and detail:
        return ClipFeatures(detail, weights)
    if weights is None and kind in ("digits-cnn", "dinov2", "video"):
        raise ValueError(
            f"features {features!r} need the file of their weights: on the command line "
            "`--feature_weights` (`--weights` of `grn evaluate stats`), or `--judge` of the digits."
        )
    if kind == "digits-cnn" and weights is not None:
        return DigitJudge.load(weights)
    if kind == "dinov2" and weights is not None:
        return DinoFeatures(weights, *([detail] if detail else []))
    if kind == "video" and weights is not None:
        return VideoFeatures(weights)
    raise ValueError(f"there are no features {features!r}; known are {', '.join(FEATURES)}.")
