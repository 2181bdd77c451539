from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from grn_lightning.metrics import (
    Features,
    FeatureSums,
    GenerationConfig,
    GenerationMetrics,
    Measurement,
    ReferenceStatistics,
)
from grn_lightning.metrics.features import protocol_of

CONFIG = GenerationConfig(num_samples=60, kid_subsets=5, kid_subset_size=25)


class Colours(nn.Module):
    """Statistics of every frame: features of all kinds that cost nothing."""

    name, num_features, num_spatial, num_classes = "colours", 6, 8, 3

    def extract(self, clips: Tensor) -> Features:
        frames = clips.transpose(1, 2).flatten(0, 1)
        flat = frames.flatten(2)
        spatial = nn.functional.adaptive_avg_pool2d(frames[:, :2], 2).flatten(1)
        return Features(torch.cat([flat.mean(2), flat.std(2)], 1), spatial, 9 * flat.mean(2))

    def forward(self, clips: Tensor) -> Tensor:
        return self.extract(clips).pooled


class PlainColours(nn.Module):
    """The same, with nothing but pooled features."""

    name, num_features = "colours", 6

    def forward(self, clips: Tensor) -> Tensor:
        return Colours()(clips)


def clips(b: int, *, f: int = 1, shift: float = 0.0) -> Tensor:
    level = torch.randn(b, 3, f, 1, 1)
    return (0.3 * level + 0.2 * torch.randn(b, 3, f, 8, 8) + shift).clamp(-1, 1)


@pytest.fixture
def real() -> Tensor:
    return clips(70)


@pytest.fixture
def drawn() -> Tensor:
    return clips(60, shift=0.1)


def judged(drawn: Tensor, real: Tensor | None, **options: object) -> GenerationMetrics:
    settings = {"extractor": Colours(), "config": CONFIG} | options
    metrics = GenerationMetrics(**settings)
    for part in drawn.split(13):
        metrics.update(part, real=False)
    for part in [] if real is None else real.split(20):
        metrics.update(part, real=True)
    return metrics


def values(found: list[Measurement]) -> dict[str, float]:
    return {one.metric: one.value for one in found}


def statistics(real: Tensor, *, with_features: bool) -> ReferenceStatistics:
    found, sums = Colours().extract(real), [FeatureSums(6), FeatureSums(8)]
    sums[0].update(found.pooled)
    sums[1].update(found.spatial)
    return ReferenceStatistics(
        moments=sums[0].compute(),
        protocol=protocol_of(Colours(), num_samples=len(real)),
        source="val",
        spatial=sums[1].compute(),
        features=found.pooled if with_features else None,
    )


def test_every_number_equals_that_of_torch_fidelity_on_the_same_features(
    drawn: Tensor, real: Tensor
) -> None:
    ours = values(judged(drawn, real).compute())
    fake_of, real_of = (Colours().extract(x) for x in (drawn, real))
    stats = [fid_features_to_statistics(x.pooled.double()) for x in (real_of, fake_of)]
    spatial = [fid_features_to_statistics(x.spatial.double()) for x in (real_of, fake_of)]
    pair = fake_of.pooled.double(), real_of.pooled.double()
    kid = kid_features_to_metric(*pair, kid_subsets=5, kid_subset_size=25, verbose=False)
    prc = prc_features_to_metric(*pair, verbose=False)
    name = "frechet_inception_distance"
    expected = {
        "fid": fid_statistics_to_metric(*stats, False)[name],
        "sfid": fid_statistics_to_metric(*spatial, False)[name],
        "is": isc_features_to_metric(fake_of.logits)["inception_score_mean"],
        "kid": kid["kernel_inception_distance_mean"],
        "precision": prc["precision"],
        "recall": prc["recall"],
    }
    assert list(ours) == list(expected)
    assert ours == pytest.approx(expected, rel=1e-6)
    assert 0 < ours["precision"] < 1


def test_a_reference_gives_what_the_real_samples_give(drawn: Tensor, real: Tensor) -> None:
    expected = values(judged(drawn, real).compute())
    whole = statistics(real, with_features=True)
    metrics = judged(drawn, None, reference=whole)
    assert not metrics.needs_real
    assert values(metrics.compute()) == pytest.approx(expected, rel=1e-6)
    bare = judged(drawn, real, reference=statistics(real, with_features=False))
    assert bare.needs_real  # for KID, precision and recall
    assert values(bare.compute()) == pytest.approx(expected, rel=1e-6)


def test_every_number_says_how_many_samples_it_is_of(drawn: Tensor, real: Tensor) -> None:
    few = GenerationConfig(num_samples=60, kid_subsets=5, kept_features=30)
    found = judged(drawn, real, config=few).compute()
    assert [one.tag for one in found] == [
        "FID[colours,60]",
        "sFID[colours,60]",
        "IS[colours,60]",
        "KID[colours,30]",
        "precision[colours,30]",
        "recall[colours,30]",
    ]
    assert found[3].caveats == ("subsets have 30 samples instead of 1000",)
    assert "30 real ones" in found[4].caveats[0]


def test_no_more_room_is_kept_than_there_are_samples() -> None:
    metrics = GenerationMetrics(Colours(), GenerationConfig(num_samples=60, frames_per_sample=2))
    assert metrics.samples["kept"].capacity == 120
    assert metrics.real["kept"].capacity == 10_000
    many = GenerationConfig(num_samples=90_000)
    assert GenerationMetrics(Colours(), many).real["kept"].capacity == 50_000


def test_split_over_processes_or_stopped_it_is_one_set(drawn: Tensor, real: Tensor) -> None:
    whole = judged(drawn, real)
    ranks = [GenerationMetrics(Colours(), CONFIG) for _ in range(2)]
    for rank, metrics in enumerate(ranks):
        metrics.update(drawn[rank::2], real=False, sample_index=torch.arange(60)[rank::2])
        metrics.update(real[rank::2], real=True, sample_index=torch.arange(70)[rank::2])
    resumed = GenerationMetrics(Colours(), CONFIG)
    resumed.load_sums(ranks[1].sums())
    for (_, _, mine), (_, _, other) in zip(ranks[0]._all(), resumed._all(), strict=True):
        mine.distributed_available_fn = lambda: True
        states = iter([getattr(other, name) for name in other.metric_state])
        mine.dist_sync_fn = lambda state, group, states=states: [state, next(states)]
    assert values(ranks[0].compute()) == pytest.approx(values(whole.compute()), rel=1e-9)


def test_an_interrupted_set_goes_on_where_it_was(drawn: Tensor, real: Tensor) -> None:
    first = judged(drawn[:31], real)
    second = GenerationMetrics(Colours(), CONFIG)
    second.load_sums(first.sums())
    second.update(drawn[31:], real=False)
    expected = values(judged(drawn, real).compute())
    assert values(second.compute()) == pytest.approx(expected, rel=1e-9)
    other = GenerationMetrics(Colours(), GenerationConfig(num_samples=60, metrics=("fid",)))
    with pytest.raises(ValueError, match="stored sums are of other metrics or features"):
        other.load_sums(first.sums())


def test_frames_count_as_pictures_and_padding_does_not(real: Tensor) -> None:
    drawn = clips(20, f=3)
    config = GenerationConfig(num_samples=20, frames_per_sample=3, metrics=("fid", "is"))
    metrics = GenerationMetrics(Colours(), config)
    padded = torch.cat([drawn, torch.full_like(drawn[:4], torch.nan)])
    index = torch.cat([torch.arange(20), torch.zeros(4, dtype=torch.long)])
    weights = (torch.arange(24) < 20).float()
    metrics.update(padded, real=False, sample_index=index, weights=weights)
    metrics.update(padded[20:], real=False, sample_index=index[20:], weights=weights[20:])
    metrics.update(real, real=True)
    found = metrics.compute()
    assert [one.tag for one in found] == ["FID[colours,60]", "IS[colours,60]"]
    frames = drawn.transpose(1, 2).flatten(0, 1)[:, :, None]
    expected = judged(frames, real, config=GenerationConfig(num_samples=60)).compute()
    assert values(found) == pytest.approx({k: values(expected)[k] for k in ("fid", "is")})


def test_what_cannot_be_had_is_left_out_with_a_reason(drawn: Tensor, real: Tensor) -> None:
    metrics = judged(drawn, real, extractor=PlainColours())
    assert metrics.left_out == {
        "sfid": "colours has no spatial features",
        "is": "colours has no classes",
    }
    assert [one.metric for one in metrics.compute()] == ["fid", "kid", "precision", "recall"]


def test_what_too_few_samples_cannot_tell_is_left_out_too(drawn: Tensor, real: Tensor) -> None:
    """An Inception score has ten parts, and a ball is drawn through the third neighbour."""
    few = GenerationConfig(num_samples=3, kid_subsets=2)
    metrics = judged(drawn[:3], real, config=few)
    told = "each set must have at least 4, got 3 samples"
    score = "its 10 parts need as many pictures, got 3"
    assert GenerationMetrics(Colours(), few).left_out == {
        "is": score, "precision": told, "recall": told,
    }  # fmt: skip
    assert [one.metric for one in metrics.compute()] == ["fid", "sfid", "kid"]

    many = replace(few, num_samples=9)
    metrics = judged(drawn[:9], real[:3], config=many)
    assert [one.metric for one in metrics.compute()] == ["fid", "sfid", "kid"]
    told = "each set must have at least 4, got 9 samples and 3 real ones"
    assert (metrics.left_out["precision"], metrics.left_out["recall"]) == (told, told)
    metrics.reset()
    for part, is_real in ((drawn[:9], False), (real, True)):
        metrics.update(part, real=is_real)
    assert "recall" in values(metrics.compute())
    assert metrics.left_out == {"is": "its 10 parts need as many pictures, got 9"}

    stored = statistics(real[:3], with_features=True)
    metrics = judged(drawn, None, reference=stored)
    assert set(metrics.left_out) == {"precision", "recall"}
    assert [one.metric for one in metrics.compute()] == ["fid", "sfid", "is", "kid"]


def test_parts_of_5000_take_any_number(drawn: Tensor, real: Tensor) -> None:
    judge = Colours()
    judge.name = "adm"
    config = GenerationConfig(num_samples=9, metrics=("is",))
    metrics = judged(drawn[:9], None, extractor=judge, config=config)
    assert [one.metric for one in metrics.compute()] == ["is"]


def test_a_number_names_what_it_was_compared_with(drawn: Tensor, real: Tensor) -> None:
    """Statistics without features serve the distances; the others compare with what was added."""
    bare = statistics(clips(80), with_features=False)
    found = judged(drawn, real, reference=bare).compute()
    named = {one.metric: one.protocol.reference for one in found}
    assert named == {
        "fid": bare.label, "sfid": bare.label, "is": "", "kid": "", "precision": "", "recall": "",
    }  # fmt: skip
    whole = statistics(real, with_features=True)
    found = judged(drawn, None, reference=whole).compute()
    assert {one.protocol.reference for one in found if one.metric != "is"} == {whole.label}


def test_sums_of_other_settings_are_refused(drawn: Tensor, real: Tensor) -> None:
    """Their shapes are the same, and the numbers would be a mixture."""
    sums = judged(drawn[:31], real).sums()
    rounded = Colours()
    rounded.rounding = "truncate"
    for extractor, config, match in (
        (rounded, CONFIG, "rounding 'none' and 'truncate'"),
        (Colours(), replace(CONFIG, num_neighbours=5), "num_neighbours 3 and 5"),
        (Colours(), replace(CONFIG, kid_subset_size=20), "kid_subset_size 25 and 20"),
    ):
        with pytest.raises(ValueError, match=rf"judged otherwise \(theirs, then these\): {match}"):
            GenerationMetrics(extractor, config).load_sums(sums)
    del sums["settings"]
    with pytest.raises(ValueError, match="features None and 'colours'"):
        GenerationMetrics(Colours(), CONFIG).load_sums(sums)


def test_a_reset_forgets_everything(drawn: Tensor, real: Tensor) -> None:
    metrics = judged(real[:60], drawn)
    metrics.reset()
    for part, is_real in ((drawn, False), (real, True)):
        metrics.update(part, real=is_real)
    expected = values(judged(drawn, real).compute())
    assert values(metrics.compute()) == pytest.approx(expected, rel=1e-9)


def test_impossible_wishes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_samples must be at least 2, got 1; metrics must be"):
        GenerationConfig(num_samples=1, metrics=("fid", "lpips"))
    other = Colours()
    other.name = "digits"
    with pytest.raises(ValueError, match="features 'colours' and 'digits'"):
        GenerationMetrics(other, CONFIG, statistics(clips(20), with_features=False))


def test_a_stored_reference_serves(tmp_path: Path, drawn: Tensor, real: Tensor) -> None:
    statistics(real, with_features=True).save(tmp_path / "ref.safetensors")
    stored = ReferenceStatistics.read(tmp_path / "ref.safetensors")
    found = judged(drawn, None, reference=stored).compute()
    assert values(found) == pytest.approx(values(judged(drawn, real).compute()), rel=1e-6)
    assert found[0].protocol.reference == stored.label
    assert found[2].protocol.reference == ""  # an Inception score has none
