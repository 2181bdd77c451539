from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from grn_lightning.metrics import FrechetDistance, InceptionFeatures, fid, fid_tag


class Moments(nn.Module):
    """A few statistics of every frame: features that cost nothing."""

    name = "moments"
    num_features = 6

    def forward(self, clips: Tensor) -> Tensor:
        frames = clips.transpose(1, 2).flatten(0, 1).flatten(2)
        return torch.cat([frames.mean(2), frames.std(2)], dim=1)


def clips(b: int, *, f: int = 2, shift: float = 0.0) -> Tensor:
    level = torch.randn(b, 3, f, 1, 1)
    return (0.3 * level + 0.2 * torch.randn(b, 3, f, 8, 8) + shift).clamp(-1, 1)


def distance_of(x: np.ndarray, y: np.ndarray) -> float:
    """Frechet distance by symmetric square roots, in float64."""

    def root(matrix: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T

    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    cross = root(root(cov_x) @ cov_y @ root(cov_x))
    mean_gap = np.sum((x.mean(0) - y.mean(0)) ** 2)
    return float(mean_gap + np.trace(cov_x) + np.trace(cov_y) - 2 * np.trace(cross))


def filled(real: Tensor, fake: Tensor) -> FrechetDistance:
    metric = FrechetDistance(Moments())
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric


def test_it_equals_the_formula_over_the_features_of_all_frames() -> None:
    real, fake = clips(30), clips(20, shift=0.2)
    features = [Moments()(x).double().numpy() for x in (real, fake)]
    value = filled(real, fake).compute()
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(distance_of(*features), rel=1e-8)


def test_a_set_is_no_distance_from_itself_and_far_sets_are_far() -> None:
    real = clips(30)
    assert filled(real, real).compute().item() == pytest.approx(0, abs=1e-7)
    near, far = (filled(real, (real + gap).clamp(-1, 1)).compute() for gap in (0.05, 0.2))
    assert 0 < near < far


def test_padding_is_left_out() -> None:
    real, fake = clips(10), clips(8)
    metric = FrechetDistance(Moments())
    metric.update(real, real=True)
    padded = torch.cat([fake, torch.full_like(fake[:2], torch.nan)])
    metric.update(padded, real=False, weights=torch.tensor([1.0] * 8 + [0.0] * 2))
    metric.update(padded[8:], real=False, weights=torch.zeros(2))
    assert metric.compute() == filled(real, fake).compute()


@pytest.mark.parametrize("is_empty", [0, 1])
def test_processes_add_up_and_one_may_have_no_samples(is_empty: int) -> None:
    real, fake = clips(12), clips(12, shift=0.1)
    ranks = [FrechetDistance(Moments()), filled(real, fake)][:: -1 if is_empty else 1]
    if is_empty == 0:
        ranks[0].update(real, real=True, weights=torch.zeros(12))  # nothing but padding
    others = iter([getattr(ranks[1], name) for name in ranks[1].metric_state])
    ranks[0].dist_sync_fn = lambda state, group: [state, next(others)]
    ranks[0].distributed_available_fn = lambda: True
    value = ranks[0].compute()
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(filled(real, fake).compute().item(), rel=1e-9)


def test_the_real_set_outlives_a_reset_and_the_generated_one_does_not() -> None:
    real, first, second = clips(12), clips(9), clips(9, shift=0.3)
    metric = filled(real, first)
    metric.reset()
    metric.update(second, real=False)
    assert metric.compute() == filled(real, second).compute()


def test_gradients_and_training_mode_stay_away_from_the_features() -> None:
    extractor = Moments().train()
    metric = FrechetDistance(extractor).train()
    metric.update(clips(3).requires_grad_(), real=True)
    assert not metric.real_features_sum.requires_grad
    assert not extractor.training


def test_a_number_is_named_after_its_features() -> None:
    assert FrechetDistance(Moments()).tag == fid_tag("moments") == "fid[moments]"


def test_too_few_samples_are_refused_by_name() -> None:
    metric = FrechetDistance(Moments())
    metric.update(clips(2), real=True)
    metric.update(clips(1, f=1), real=False)
    with pytest.raises(ValueError, match=r"fid\[moments\] must .*4 real and 1 generated"):
        metric.compute()


def test_an_extractor_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="name .* and num_features .*Linear has None and None"):
        FrechetDistance(nn.Linear(2, 2))


class FakeInception(nn.Module):
    """Remembers how it was made and what it was shown."""

    def __init__(self, name: str, features_list: list[str], path: str, antialias: bool) -> None:
        super().__init__()
        self.settings = (name, features_list, Path(path), antialias)

    def forward(self, images: Tensor) -> Tensor:
        self.images = images
        return torch.zeros(len(images), 2048)


def test_inception_sees_rounded_frames_and_no_antialiasing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.zeros(1)}, path)
    monkeypatch.setattr(fid, "NoTrainInceptionV3", FakeInception)
    extractor = InceptionFeatures(path)
    assert extractor.network.settings == ("inception-v3-compat", ["2048"], path, False)

    levels = torch.tensor([0.0, 0.4, 0.6, 254.6, 300.0]) / 127.5 - 1
    batch = levels.view(1, 1, 5, 1, 1).expand(2, 3, 5, 4, 4)
    assert extractor(batch).shape == (10, 2048)
    assert extractor.network.images.dtype == torch.uint8
    assert extractor.network.images[:5, 0, 0, 0].tolist() == [0, 0, 1, 255, 255]


def test_inception_weights_are_taken_from_the_cache_and_never_fetched_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(fid, "NoTrainInceptionV3", FakeInception)
    with pytest.raises(ValueError, match="there is none at .*allow_download=True"):
        InceptionFeatures()
    with pytest.raises(ValueError, match=r"there is none at .*elsewhere\.pth"):
        InceptionFeatures(tmp_path / "elsewhere.pth", allow_download=True)

    def fetch(url: str, path: str, prefix: str, progress: bool) -> None:
        assert prefix in url
        torch.save({}, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    fetched = InceptionFeatures(allow_download=True)
    monkeypatch.delattr(torch.hub, "download_url_to_file")
    cached = InceptionFeatures()
    assert cached.network.settings == fetched.network.settings


class Payload:
    """A stranger's object in a file of weights; unpickling it would run its code."""

    def __reduce__(self) -> tuple:
        return (pytest.fail, ("the file was executed",))


def test_a_file_that_is_not_made_of_tensors_is_refused_unopened(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"weight": Payload()}, path)
    with pytest.raises(ValueError, match="must be a plain state dict"):
        InceptionFeatures(path)
