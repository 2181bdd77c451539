"""How close a reconstruction comes: PSNR and SSIM of every frame, averaged.

Papers average the PSNR of single pictures; pooling the squared error over a set first gives
another, lower number. So both metrics judge frame by frame and average over frames. Pixels are
clamped to [-1, 1] before they are compared, as they are before they are written.

States are sums: processes add them up, and the result does not depend on how samples were spread.
Samples of weight 0 (the padding of a last batch) are left out before anything is computed.
"""

from abc import abstractmethod

import torch
from einops import rearrange
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.functional.image import structural_similarity_index_measure

MAX_PSNR = 100.0
"""PSNR of a perfect frame in dB: finite, so that one black frame does not hide all others. An error
of half an 8-bit level everywhere gives 54 dB."""

_PEAK = 2.0  # pixels range over [-1, 1]


class FrameMean(Metric):
    """Mean of a score over the frames of all clips; a subclass says which score."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @abstractmethod
    def score(self, reconstruction: Tensor, frames: Tensor) -> Tensor:
        """Compare frames `(n, 3, h, w)` in [-1, 1] one by one; returns `(n,)`."""

    def update(self, reconstruction: Tensor, clips: Tensor, weights: Tensor | None = None) -> None:
        """Add clips.

        Args:
            reconstruction: `(b, 3, f, h, w)`, clamped to [-1, 1] here.
            clips: What they should be, same shape.
            weights: `(b,)`, at least 0; all 1 if None. A clip of weight 0 is ignored whatever its
                pixels are.
        """
        if weights is None:
            weights = clips.new_ones(len(clips), dtype=torch.float64)
        is_real = weights > 0
        pair = (reconstruction[is_real], clips[is_real])
        if len(pair[0]) == 0:
            return
        frames = [rearrange(x.float().clamp(-1, 1), "b c f h w -> (b f) c h w") for x in pair]
        scores = self.score(*frames).double()
        frame_weights = weights[is_real].double().repeat_interleave(clips.shape[2])
        self.total += (scores * frame_weights).sum()
        self.weight += frame_weights.sum()

    def compute(self) -> Tensor:
        """Return the weighted mean, float64; NaN if nothing was added."""
        return self.total / self.weight


class FramePSNR(FrameMean):
    """Peak signal-to-noise ratio in dB of every frame, averaged; at most `MAX_PSNR`."""

    def score(self, reconstruction: Tensor, frames: Tensor) -> Tensor:
        """Return `(n,)` decibels."""
        error = (reconstruction - frames).square().mean((1, 2, 3))
        return (10 * torch.log10(_PEAK**2 / error)).clamp(max=MAX_PSNR)


class FrameSSIM(FrameMean):
    """Structural similarity of every frame, averaged: 11x11 Gaussian window, sigma 1.5."""

    def score(self, reconstruction: Tensor, frames: Tensor) -> Tensor:
        """Return `(n,)` similarities, at most 1."""
        similarity = structural_similarity_index_measure(
            reconstruction, frames, data_range=_PEAK, reduction="none"
        )
        assert isinstance(similarity, Tensor)
        return similarity.reshape(-1)


def reconstruction_metrics() -> MetricCollection:
    """Return the metrics of this file under the names `psnr` and `ssim`."""
    # Groups would merge metrics with equal states, which these have while every weight is 0.
    return MetricCollection({"psnr": FramePSNR(), "ssim": FrameSSIM()}, compute_groups=False)
