import math

import numpy as np
import pytest
import torch
from torch import Tensor

from grn_lightning.metrics import FramePSNR, FrameSSIM, reconstruction_metrics
from grn_lightning.metrics.reconstruction import MAX_PSNR, FrameMean

METRICS = pytest.mark.parametrize("make", [FramePSNR, FrameSSIM])


def pair(b: int = 3, f: int = 2, size: int = 16) -> tuple[Tensor, Tensor]:
    clips = torch.rand(b, 3, f, size, size) * 2 - 1
    return (clips + 0.2 * torch.randn_like(clips)).clamp(-1, 1), clips


def value(metric: FrameMean, *batch: Tensor) -> float:
    metric.update(*batch)
    return metric.compute().item()


def psnr_of(frame: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two pictures, peak to peak 2."""
    return 10 * math.log10(4 / np.mean((frame - other) ** 2))


def ssim_of(x: np.ndarray, y: np.ndarray) -> float:
    """Structural similarity of two (h, w) pictures, window by window (Wang et al. 2004)."""
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.sum(np.outer(line, line))
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    x, y = (np.pad(picture, 5, mode="reflect") for picture in (x, y))
    values = []
    for i, j in np.ndindex(x.shape[0] - 10, x.shape[1] - 10):
        p, q = (picture[i : i + 11, j : j + 11] for picture in (x, y))
        mean_p, mean_q = (window * p).sum(), (window * q).sum()
        var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
        cov = (window * (p - mean_p) * (q - mean_q)).sum()
        luminance = (2 * mean_p * mean_q + c1) / (mean_p**2 + mean_q**2 + c1)
        values.append(luminance * (2 * cov + c2) / (var_p + var_q + c2))
    return float(np.mean(values))


def test_psnr_is_the_mean_over_frames_and_not_over_pixels() -> None:
    reconstruction, clips = pair()
    reconstruction[0] = clips[0] + 0.01 * torch.randn_like(clips[0])
    frames = [
        psnr_of(*(x[b, :, f].clamp(-1, 1).double().numpy() for x in (reconstruction, clips)))
        for b in range(3)
        for f in range(2)
    ]
    assert value(FramePSNR(), reconstruction, clips) == pytest.approx(np.mean(frames), rel=1e-5)


def test_ssim_equals_the_slow_loop() -> None:
    reconstruction, clips = pair(b=1)
    planes = [
        ssim_of(*(x[0, c, f].double().numpy() for x in (reconstruction, clips)))
        for c in range(3)
        for f in range(2)
    ]
    # E[x^2] - E[x]^2 in float32 there, centred sums in float64 here
    assert value(FrameSSIM(), reconstruction, clips) == pytest.approx(np.mean(planes), abs=1e-5)


def test_perfect_frames_have_a_finite_score() -> None:
    _, clips = pair()
    assert value(FramePSNR(), clips, clips) == MAX_PSNR
    assert value(FrameSSIM(), clips, clips) == pytest.approx(1, abs=1e-6)


def test_half_an_8_bit_level_gives_54_db() -> None:
    clips = torch.zeros(1, 3, 1, 16, 16)
    assert value(FramePSNR(), clips + 1 / 255, clips) == pytest.approx(54.15, abs=0.01)


@METRICS
def test_what_leaves_the_range_counts_as_its_border(make: type[FrameMean]) -> None:
    reconstruction, clips = pair()
    reconstruction[:, :, :, :4] = 1.0
    beyond = reconstruction.clone()
    beyond[:, :, :, :4] = 5.0
    assert value(make(), beyond, clips) == value(make(), reconstruction, clips)


@METRICS
def test_padding_is_ignored_whatever_its_pixels_are(make: type[FrameMean]) -> None:
    reconstruction, clips = pair(b=5)
    expected = value(make(), reconstruction[:3], clips[:3])
    reconstruction[3], clips[4] = math.nan, math.inf
    assert value(make(), reconstruction, clips, torch.tensor([1.0, 1, 1, 0, 0])) == expected


@METRICS
def test_weights_are_those_of_a_mean(make: type[FrameMean]) -> None:
    reconstruction, clips = pair(b=2)
    one, two = (value(make(), reconstruction[i : i + 1], clips[i : i + 1]) for i in (0, 1))
    weighted = value(make(), reconstruction, clips, torch.tensor([3.0, 1.0]))
    assert weighted == pytest.approx((3 * one + two) / 4)


@METRICS
def test_any_split_into_batches_and_processes_gives_the_same(make: type[FrameMean]) -> None:
    reconstruction, clips = pair(b=5)
    whole = make()
    whole.update(reconstruction, clips)
    first, second = make(), make()
    first.update(reconstruction[:1], clips[:1])
    first.update(reconstruction[1:2], clips[1:2])
    second.update(reconstruction[2:], clips[2:])
    others = iter([second.total, second.weight])
    first.dist_sync_fn = lambda state, group: [state, next(others)]
    first.distributed_available_fn = lambda: True
    assert first.compute().item() == pytest.approx(whole.compute().item(), rel=1e-6)


def test_the_collection_keeps_its_metrics_apart_even_after_a_batch_of_padding() -> None:
    reconstruction, clips = pair()
    metrics = reconstruction_metrics()
    metrics.update(reconstruction, clips, torch.zeros(3))
    metrics.update(reconstruction, clips, torch.ones(3))
    values = {name: float(number) for name, number in metrics.compute().items()}
    expected = {"psnr": FramePSNR(), "ssim": FrameSSIM()}
    assert values == {name: value(m, reconstruction, clips) for name, m in expected.items()}
