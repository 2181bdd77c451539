import numpy as np
import pytest
import torch
from torch import Tensor, nn

from grn_lightning.metrics import (
    FrechetDistance,
    Moments,
    Protocol,
    ReferenceStatistics,
    fid,
    fid_tag,
)


class Colours(nn.Module):
    """A few statistics of every frame: features that cost nothing."""

    name = "colours"
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
    metric = FrechetDistance(Colours())
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric


def test_it_equals_the_formula_over_the_features_of_all_frames() -> None:
    real, fake = clips(30), clips(20, shift=0.2)
    features = [Colours()(x).double().numpy() for x in (real, fake)]
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
    metric = FrechetDistance(Colours())
    metric.update(real, real=True)
    padded = torch.cat([fake, torch.full_like(fake[:2], torch.nan)])
    metric.update(padded, real=False, weights=torch.tensor([1.0] * 8 + [0.0] * 2))
    metric.update(padded[8:], real=False, weights=torch.zeros(2))
    assert metric.compute() == filled(real, fake).compute()


@pytest.mark.parametrize("is_empty", [0, 1])
def test_processes_add_up_and_one_may_have_no_samples(is_empty: int) -> None:
    real, fake = clips(12), clips(12, shift=0.1)
    ranks = [FrechetDistance(Colours()), filled(real, fake)][:: -1 if is_empty else 1]
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
    extractor = Colours().train()
    metric = FrechetDistance(extractor).train()
    metric.update(clips(3).requires_grad_(), real=True)
    assert not metric.real_features_sum.requires_grad
    assert not extractor.training


def test_a_number_is_named_after_its_features() -> None:
    assert FrechetDistance(Colours()).tag == fid_tag("colours") == "fid[colours]"


def test_too_few_samples_are_refused_by_name() -> None:
    metric = FrechetDistance(Colours())
    metric.update(clips(2), real=True)
    metric.update(clips(1, f=1), real=False)
    with pytest.raises(ValueError, match=r"fid\[colours\] must .*4 real and 1 generated"):
        metric.compute()


def test_an_extractor_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="name .* and num_features .*Linear has None and None"):
        FrechetDistance(nn.Linear(2, 2))


# --- reference statistics -------------------------------------------------------------------------


def statistics(real: Tensor, **changes: object) -> ReferenceStatistics:
    x = Colours()(real).double()
    protocol = Protocol(**({"features": "colours", "num_samples": len(x)} | changes))
    moments = Moments(x.mean(0), torch.cov(x.T), len(x))
    return ReferenceStatistics(moments=moments, protocol=protocol, source="val")


def test_statistics_stand_for_the_set_that_they_were_made_of() -> None:
    real, fake = clips(30), clips(20, shift=0.2)
    metric = FrechetDistance(Colours(), reference=statistics(real))
    metric.update(fake, real=False)
    assert metric.compute().item() == pytest.approx(filled(real, fake).compute().item(), rel=1e-9)
    with pytest.raises(ValueError, match=r"fid\[colours\] compares with val-.*no real clips"):
        metric.update(real, real=True)


def test_statistics_count_once_however_many_processes_have_them() -> None:
    real, fake = clips(30), clips(20, shift=0.2)
    ranks = [FrechetDistance(Colours(), reference=statistics(real)) for _ in range(2)]
    for rank, part in zip(ranks, fake.split(9), strict=False):
        rank.update(part, real=False)
    ranks[1].update(fake[18:], real=False)
    others = iter([getattr(ranks[1], name) for name in ranks[1].metric_state])
    ranks[0].dist_sync_fn = lambda state, group: [state, next(others)]
    ranks[0].distributed_available_fn = lambda: True
    expected = filled(real, fake).compute().item()
    assert ranks[0].compute().item() == pytest.approx(expected, rel=1e-9)
    assert ranks[0].num_compared == 40


def test_statistics_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="resize 'tensorflow' and 'none'"):
        FrechetDistance(Colours(), reference=statistics(clips(9), resize="tensorflow"))
    moments = Moments(torch.zeros(3).double(), torch.eye(3).double(), 9)
    narrow = ReferenceStatistics(
        moments=moments, protocol=Protocol(features="colours", num_samples=9), source="val"
    )
    with pytest.raises(ValueError, match="about 3 features, the extractor has 6"):
        FrechetDistance(Colours(), reference=narrow)


# --- what is said beside the number ---------------------------------------------------------------


def test_a_measurement_carries_its_protocol() -> None:
    metric = filled(clips(30), clips(20))
    measured = metric.measure(metric="rfid", reference="val")
    assert str(measured) == f"rFID[colours,40]={metric.compute().item():.4g}"
    assert (measured.protocol.reference, measured.caveats) == ("val", ())


def test_what_makes_a_number_doubtful_is_said() -> None:
    few = filled(clips(30), clips(2)).measure()
    assert few.caveats == (
        "4 samples span at most 3 of 6 features: the distance is too large, and comparable at the "
        "same number only",
    )
    collapsed = filled(clips(30), clips(1).expand(10, 3, 2, 8, 8)[:, :, :1]).measure()
    assert "generator has collapsed" in collapsed.caveats[0]


def test_features_that_are_no_numbers_are_refused() -> None:
    broken = clips(10, f=1)
    broken[3:5] = torch.nan
    with pytest.raises(ValueError, match="2 of 10 samples have NaN"):
        FrechetDistance(Colours()).update(broken, real=False)


def test_a_wrong_solver_is_noticed_before_the_first_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    metric = filled(clips(9), clips(9))
    wrong = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda x: 1.0001 * wrong(x))
    fid.check_solver.cache_clear()
    with pytest.raises(RuntimeError, match="must be .* comes out as .* another build of torch"):
        metric.compute()
    monkeypatch.undo()
    assert metric.compute() > 0
    assert fid.check_solver.cache_info().currsize == 1
