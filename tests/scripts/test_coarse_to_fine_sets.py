"""Stages of coarse-to-fine prediction: sets that are judged, pictures that are made again."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grn_lightning.functional import frechet_distance
from grn_lightning.lit.coarse_to_fine import LitFine, LitRaster, load_coarse_to_fine
from grn_lightning.media.images import decode_image, to_uint8
from grn_lightning.metrics import DigitJudge, FeatureSums, ReferenceStatistics
from grn_lightning.models.clusters import read_clusters, write_clusters
from grn_lightning.pipelines.coarse_to_fine import CoarseToFinePipeline
from grn_lightning.samplers.coarse_to_fine import CoarseToFineConfig, DrawConfig
from tests.scripts.stages import BACKBONE, Chain, draw, store
from tests.tiny_runs import call_grn

# --- judged sets ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def reference(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of the held-out pictures, by the judge."""
    out = tmp_path_factory.mktemp("reference") / "digits.safetensors"
    judge = ("--features", "digits-cnn", "--weights", digits / "judge.safetensors")
    call_grn("evaluate", "stats", digits / "images", "--split", "val", "--out", out, *judge)
    return out


def judge_set(run: Path, digits: Path, *options: Any) -> Any:
    judge = digits / "judge.safetensors"
    usual = ("--num_samples", 20, "--features", "digits-cnn", "--judge", judge, "--seed", 4)
    return call_grn("evaluate", "samples", run, *usual, "--device", "cpu", *options)


def one_by_one(pipeline: CoarseToFinePipeline, codes: torch.Tensor) -> torch.Tensor:
    return torch.cat([pipeline.detokenize(row) for row in codes.split(1)])


def numbers(report: Any) -> dict[str, float]:
    """All numbers but times."""
    figures = {f.tag: f.value for f in report.figures if f.unit != "s"}
    return {one.tag: one.value for one in report.measurements} | figures


def test_a_judged_set_is_what_the_pipeline_draws(chain, digits, reference, tmp_path):
    """An oracle: all pictures from the pipeline, their features and the distance at once."""
    run, out = shutil.copytree(chain.raster, tmp_path / "run"), tmp_path / "out"
    warm = ("--draw.coarse.guidance_scale", 2, "--draw.fine.temperature", 0.5)
    options = ("--fine", chain.fine, "--reference", reference, "--batch_size", 4, *warm)
    report = judge_set(run, digits, *options, "--out", out, "--keep_samples", "true")
    guided = (*options, "--draw.fine.guidance_scale", 3)
    twice = numbers(judge_set(run, digits, *guided, "--out", tmp_path / "guided"))
    assert twice["forwards/sample[coarse to fine,scale 2 and 3]"] == 4 * 2 + 2
    pipeline = load_coarse_to_fine(run, chain.fine)
    labels, index = torch.arange(10).repeat_interleave(2), torch.arange(20)
    drawing = {"coarse": DrawConfig(guidance_scale=2.0), "fine": DrawConfig(temperature=0.5)}
    drawn = pipeline.draw_codes(labels, index, seed=4, config=CoarseToFineConfig(**drawing))
    clips = one_by_one(pipeline, drawn.codes)
    judge = DigitJudge.load(digits / "judge.safetensors")
    sums = FeatureSums(judge.num_features)
    sums.update(judge(clips))
    ours, real = sums.compute(), ReferenceStatistics.read(reference).moments
    distance = frechet_distance(ours.mean, ours.covariance, real.mean, real.covariance)
    found = numbers(report)
    assert found["FID[digits-cnn,20]"] == pytest.approx(float(distance), rel=1e-4)
    is_right = judge.classify(clips) == labels
    accuracy = [value for tag, value in found.items() if tag.startswith("digit accuracy")]
    assert accuracy == [pytest.approx(float(is_right.float().mean()))]
    assert found["steps/sample[coarse to fine,scale 2]"] == 4 + 1
    assert found["forwards/sample[coarse to fine,scale 2]"] == 4 * 2 + 1
    files = sorted((out / "samples").glob("*.png"))
    assert len(files) == 20
    kept = torch.stack([decode_image(file.read_bytes()) for file in files])
    assert torch.equal(kept, to_uint8(clips[:, :, 0]))
    record = json.loads(report.file.read_text())
    assert record["weights"] == pipeline.hashes
    assert record["draw"]["fine"]["temperature"] == 0.5
    assert [found] == [numbers(judge_set(run, digits, *options, "--out", out))]  # nothing drawn


def test_a_judged_set_is_the_same_from_exports_and_goes_on(
    chain, exports, digits, reference, tmp_path, capsys
):
    options = ("--reference", reference, "--batch_size", 2)
    one = judge_set(chain.baseline, digits, *options, "--out", tmp_path / "a")
    parts = ("--part_size", 8, "--out", tmp_path / "b")
    two = judge_set(exports / "baseline", digits, *options, *parts)
    assert numbers(one) == pytest.approx(numbers(two), rel=1e-6)
    assert not any(tag.startswith("steps/sample[coarse") for tag in numbers(one))
    kept, gone, _ = sorted((tmp_path / "b" / "parts").iterdir())
    before = kept.stat().st_mtime_ns
    gone.unlink()
    assert numbers(judge_set(chain.baseline, digits, *options, *parts)) == numbers(two)
    assert kept.stat().st_mtime_ns == before
    for other in (("--seed", 5), ("--draw.coarse.temperature", 0.5)):
        with pytest.raises(SystemExit):
            judge_set(chain.baseline, digits, *options, "--out", tmp_path / "a", *other)
        assert "holds parts that were made otherwise" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.scale
def test_processes_share_a_set_of_stages(chain, digits, reference, tmp_path):
    options = ("--fine", chain.fine, "--reference", reference, "--part_size", 5)
    alone, together = (tmp_path / name for name in ("alone", "together"))
    one = judge_set(chain.raster, digits, *options, "--out", alone)
    two = judge_set(chain.raster, digits, *options, "--devices", 2, "--out", together)
    assert numbers(one) == numbers(two)


def twins(chain: Chain, folder: Path) -> dict[str, Path]:
    """Stages 2 of equal weights that draw otherwise: by their mask, by their clusters."""
    clusters = read_clusters(chain.clusters)
    assert clusters.cluster_of is not None
    moved = replace(clusters, cluster_of=clusters.cluster_of.roll(1))
    write_clusters(folder / "moved.safetensors", moved)
    found = {}
    for name, file, mask in (
        ("usual", chain.clusters, "sample"),
        ("masked in training", chain.clusters, "train+sample"),
        ("free", chain.clusters, "none"),
        ("moved", folder / "moved.safetensors", "sample"),
    ):
        split = {"clusters": str(file)}
        where = folder / name.replace(" ", "-")
        found[name] = store(where / "fine", LitFine, chain.tokenizer, split=split, fine_mask=mask)
        store(where / "coarse", LitRaster, chain.tokenizer, split=split)
    return found


def test_what_is_no_weight_and_decides_a_draw_is_part_of_plan_and_recipe(
    chain, digits, tmp_path, capsys
):
    found = twins(chain, tmp_path)
    hashes = {
        name: load_coarse_to_fine(fine.parent / "coarse", fine).hashes
        for name, fine in found.items()
    }
    assert len({each["fine"] for each in hashes.values()}) == 1
    assert hashes["usual"] == hashes["masked in training"]  # they draw alike
    assert len({tuple(each.items()) for each in hashes.values()}) == 3
    usual = found["usual"]
    options = ("--out", tmp_path / "set", "--keep_samples", "true", "--device", "cpu")
    judge_set(usual.parent / "coarse", digits, "--fine", usual, *options)
    picture = tmp_path / "set" / "samples" / "00000.png"
    for name, part in (("free", "fine_mask 'sample' and 'none'"), ("moved", "split")):
        stages = (found[name].parent / "coarse", "--fine", found[name])
        with pytest.raises(SystemExit):
            judge_set(stages[0], digits, *stages[1:], *options)
        assert f"weights.{part}" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            call_grn("replay", picture, "--checkpoint", *stages, "--out", tmp_path / "x")
        said = capsys.readouterr().err
        assert f"it was made with {part.split()[0].replace('_', ' ')}" in said
        assert "name the right one by `--fine`" in said


def test_a_report_shows_a_judged_set(chain, digits, reference, tmp_path):
    run = shutil.copytree(chain.baseline, tmp_path / "run")
    report = judge_set(run, digits, "--reference", reference, "--draw.coarse.temperature", 0.5)
    call_grn("report", run, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert f"{report.measurements[0].value:.1f}" in page
    assert "coarse labels at guidance 1, temperature 0.5, seed 4" in page
    assert "grn evaluate samples" in page
    first = shutil.copytree(chain.raster / "checkpoints", tmp_path / "a" / "checkpoints").parent
    for stage, command in (
        (chain.fine, f"STAGE_1 --fine {chain.fine} --num_samples 50000"),
        (first, f"{first} --fine STAGE_2 --num_samples 50000"),
        (chain.captioned, f"{chain.captioned} --conditions DATA"),
    ):
        call_grn("report", stage, "--out", tmp_path / "other.html")
        assert f"grn evaluate samples {command}" in (tmp_path / "other.html").read_text()


def test_captions_are_drawn_into_the_folders_of_geneval(chain, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"the digit {name}"}) for name in ("one", "two")]
    prompts.write_text("\n".join(lines) + "\n")
    report = call_grn(
        *("evaluate", "geneval", chain.captioned, "--prompts", prompts, "--per_prompt", 2),
        *("--out", tmp_path / "out", "--device", "cpu"),
    )
    pipeline = load_coarse_to_fine(chain.captioned)
    captions = {"captions": [name for name in ("the digit one", "the digit two") for _ in "ab"]}
    drawn = pipeline.draw_codes(pipeline.condition(captions), torch.arange(4))
    files = sorted(report.folder.glob("*/samples/*.png"))
    kept = torch.stack([decode_image(file.read_bytes()) for file in files])
    assert torch.equal(kept, to_uint8(one_by_one(pipeline, drawn.codes)[:, :, 0]))


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("raster", ["--refine.num_steps", 3], "`--refine` must be left out for coarse-to-fine"),
        ("raster", ["--image_size", 32, "--precision", "bf16"], "`--image_size`, `--precision`"),
        ("raster", [], "is stage 1, which draws together with a stage 2; name that by `--fine`"),
        ("fine", [], "stage 1 must be causal"),
    ],
)
def test_sets_of_stages_are_refused_before_anything_is_drawn(
    name, options, match, chain, digits, tmp_path, capsys
):
    with pytest.raises(SystemExit):
        judge_set(getattr(chain, name), digits, *options, "--out", tmp_path / "x")
    assert re.search(match, capsys.readouterr().err)
    assert not (tmp_path / "x").exists()


def test_generators_that_refine_have_no_stages(chain, digits, trained, tmp_path, capsys):
    with pytest.raises(SystemExit):
        judge_set(trained.classes, digits, "--fine", chain.fine, "--out", tmp_path / "x")
    assert "`--fine` must be left out for generators that refine" in capsys.readouterr().err


# --- replay ---------------------------------------------------------------------------------------


def test_pictures_are_made_again_from_what_they_say(chain, exports, digits, tmp_path, capsys):
    moved = Chain(*(shutil.copytree(run, tmp_path / run.name) if run.is_dir() else run
                    for run in chain))  # fmt: skip
    options = ["--class_labels", "[3, 5]", "--num_samples", 2, "--seed", 4, "--first_index", 7]
    report = draw(moved, tmp_path / "a", *options, "--draw.coarse.guidance_scale", 2)
    again = call_grn("replay", report.folder / "samples.json", "--out", tmp_path / "b")
    assert (again.same, again.compared) == (4, 4)
    one = call_grn("replay", report.files[3], "--out", tmp_path / "c")
    assert one.files[0].read_bytes() == report.files[3].read_bytes()  # the recipe in it included
    told = call_grn(
        *("sample", moved.captioned, "--prompts", "the digit two", "--out", tmp_path / "d"),
        *("--device", "cpu"),
    )
    assert call_grn("replay", told.files[0], "--out", tmp_path / "e").same == 1

    options = ("--fine", moved.fine, "--out", tmp_path / "set", "--keep_samples", "true")
    judge_set(moved.raster, digits, *options, "--batch_size", 8)
    kept = tmp_path / "set" / "samples" / "00013.png"
    assert call_grn("replay", kept, "--out", tmp_path / "f").same == 1

    moved.fine.rename(tmp_path / "elsewhere")
    for where, match in (
        ([], "it was made with '.*fine/checkpoints/last.ckpt', which is not there; .* `--fine`"),
        (["--fine", chain.hbq_raster], "must be causal and stage 2 not"),
        (["--fine", exports / "raster"], "must be causal and stage 2 not"),
        (
            ["--fine", chain.fine, "--checkpoint", other_stage(chain, tmp_path)],
            "made with coarse .* but what is there",
        ),
    ):
        with pytest.raises(SystemExit):
            call_grn("replay", kept, "--out", tmp_path / "x", *where)
        assert re.search(match, capsys.readouterr().err)
    fine = tmp_path / "elsewhere"
    assert call_grn("replay", kept, "--out", tmp_path / "g", "--fine", fine).same == 1


def other_stage(chain: Chain, folder: Path) -> Path:
    """A stage 1 of the same split with other weights."""
    split = {"clusters": str(chain.clusters)}
    backbone = BACKBONE | {"depth": 2}
    return store(folder / "other", LitRaster, chain.tokenizer, split=split, backbone=backbone)
