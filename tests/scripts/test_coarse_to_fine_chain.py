"""A VQ tokenizer, its codes and clusters, both stages and the baseline: through every command."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import grn_lightning
from grn_lightning.functional import hbq_encode
from grn_lightning.lit.coarse_to_fine import (
    LitFine,
    LitRaster,
    load_coarse_to_fine,
    load_stage,
)
from grn_lightning.lit.tokenizer import load_tokenizer
from grn_lightning.models.coarse_split import PrefixSplit
from grn_lightning.models.code_transformer import CodeTransformer
from grn_lightning.models.hashes import weights_hash
from grn_lightning.pipelines.coarse_to_fine import CoarseToFinePipeline
from grn_lightning.pipelines.reconstruction import Reconstruction, plan_tiles
from grn_lightning.scripts import bench_fine as bench_fine_module
from grn_lightning.scripts.stand_ins import prefix_stand_ins
from tests.scripts.stages import Chain, draw, store
from tests.tiny_runs import call_grn, tensors_equal

ROOT = Path(__file__).parents[2]

LABELS, INDEX = torch.tensor([3, 5]), torch.tensor([0, 1])


# --- the tokenizer alone --------------------------------------------------------------------------


def test_a_codebook_is_judged_and_reconstructs_files(chain, digits, tmp_path):
    run = shutil.copytree(chain.tokenizer, tmp_path / "vq")
    report = call_grn("evaluate", run, digits / "images", "--device", "cpu")
    rates = {f.name: f.value for f in report.figures if f.name == "bits/pixel"}
    assert rates == {"bits/pixel": pytest.approx(4 / 64)}
    scores = {row["rounds"]: row["scores"]["PSNR"] for row in report.rounds}
    assert scores.keys() == {0, 1}
    assert scores[1] == report.figures[0].value != scores[0]
    picture = tmp_path / "a.png"
    Image.new("RGB", (20, 13), (200, 30, 90)).save(picture)
    done = call_grn(
        "reconstruct", picture, "--tokenizer", run, "--out", tmp_path / "out", "--device", "cpu"
    )
    (file,) = done.files
    assert file.num_bits == 3 * 2 * 4  # 24 x 16 pixels, 4 bits of a position
    with Image.open(file.out) as rebuilt:
        assert rebuilt.size == (20, 13)
    with pytest.raises(ValueError, match="`rounds` must be left out: .* have no rounds"):
        Reconstruction(load_tokenizer(run), plan_tiles(16, 16, stride=8), num_rounds=2)


def test_stored_codes_are_those_of_the_tokenizer(chain, digits):
    facts = json.loads((chain.codes / "train.codes.json").read_text())
    tokenizer = load_tokenizer(chain.tokenizer)
    assert facts["bits_per_pixel"] == pytest.approx(4 / 64)
    stage = load_stage(chain.baseline)
    assert stage.tokenizer_hash == weights_hash(tokenizer)
    assert stage.network.config.output_size == 16


# --- what stage 2 adds ----------------------------------------------------------------------------


def test_four_ways_to_decode_one_coarse_map(chain, digits, tmp_path):
    result = call_grn(
        *("bench", "fine", chain.fine, digits / "images", "--coarse", chain.raster),
        *("--out", tmp_path / "b", "--num_samples", 6, "--batch_size", 4, "--device", "cpu"),
    )
    over = ["centroid", "member nearest to the centroid", "random member", "stage 2"]
    assert [a.name for a in result.arms if a.maps == "true"] == ["the code itself", *over]
    assert [a.name for a in result.arms if a.maps == "drawn"] == over
    assert result.num_samples == 6
    assert 0 < result.leak_rate < 1  # fine_mask: sample
    assert all((arm.psnr is None) == (arm.maps == "drawn") for arm in result.arms)
    assert all(arm.fid is not None and 0 <= arm.accuracy <= 1 for arm in result.arms)
    report = json.loads((tmp_path / "b" / "fine.json").read_text())
    assert [arm["fid"] for arm in report["arms"]] == [arm.fid for arm in result.arms]
    rows, columns = 6, 9
    with Image.open(tmp_path / "b" / "fine.png") as sheet:
        assert sheet.width / sheet.height > columns / rows * 0.8


@torch.no_grad()
def test_its_second_stage_draws_as_the_pipeline_does(chain):
    stage, pipeline = load_stage(chain.fine), load_coarse_to_fine(chain.raster, chain.fine)
    stage.configure_model()
    bench = bench_fine_module._Bench(stage, pipeline, seed=4)
    drawn = pipeline.draw(LABELS, INDEX, seed=4)
    decoded = bench.over(drawn.coarse, LABELS, INDEX)
    assert torch.equal(decoded["stage 2"].clamp(-1, 1), drawn.clips)
    for name in ("member nearest to the centroid", "random member"):
        codes = stage.tokenizer.quantize(bench.stand_ins[name](drawn.coarse, INDEX)).squeeze(2)
        assert torch.equal(stage.split.coarse(codes), drawn.coarse)


@pytest.mark.parametrize("is_joint", [False, True])
def test_stand_ins_of_prefixes_stay_in_their_cells(trained, is_joint):
    tokenizer = load_tokenizer(trained.tokenizer)
    channels, rounds = tokenizer.config.latent_channels, tokenizer.config.num_rounds
    split = PrefixSplit(channels, rounds, 1, is_joint)
    codes = torch.randint(2**rounds, (5, channels, 2, 3))
    coarse, index = split.coarse(codes), torch.arange(5)
    stand_ins = prefix_stand_ins(tokenizer, split, seed=0)
    middle, random = (
        stand_ins[name](coarse, index) for name in ("middle of the cell", "random bits")
    )
    for latents in (middle, random):
        found = hbq_encode(latents.squeeze(2), num_rounds=rounds)
        assert torch.equal(split.coarse(found), coarse)
    highest, lowest = (
        tokenizer.dequantize(split.join(coarse, torch.full_like(codes, fill))[:, :, None])
        for fill in (2 ** (rounds - 1) - 1, 0)
    )
    torch.testing.assert_close(middle, (highest + lowest) / 2)


@pytest.mark.parametrize(
    ("where", "match"),
    [("new", "is a run of LitRaster; give one of LitFine"), ("", "`out` must be a new folder")],
)
def test_what_is_no_second_stage_is_not_compared(where, match, chain, digits, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        call_grn("bench", "fine", chain.baseline, digits / "images", "--out", tmp_path / where)
    assert match in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- exports --------------------------------------------------------------------------------------


def same_draws(first: Any, second: Any) -> bool:
    drawn = [pipeline.draw(LABELS, INDEX) for pipeline in (first, second)]
    return torch.equal(drawn[0].codes, drawn[1].codes) and drawn[0].clips.equal(drawn[1].clips)


def test_exports_draw_what_their_runs_draw(chain, exports):
    runs = load_coarse_to_fine(chain.raster, chain.fine)
    both = grn_lightning.load(exports / "raster", fine=exports / "fine")
    assert isinstance(both, CoarseToFinePipeline)
    assert both.fine_mask == "sample"
    assert both.hashes == runs.hashes
    assert same_draws(runs, both)
    assert same_draws(runs, grn_lightning.load(chain.raster, fine=exports / "fine"))
    plain = grn_lightning.load(exports / "baseline")
    assert same_draws(load_coarse_to_fine(chain.baseline), plain)
    assert same_draws(grn_lightning.load(chain.baseline), plain)


def test_a_stage_alone_is_a_network(chain, exports):
    for name in ("raster", "fine"):
        alone = grn_lightning.load(exports / name)
        assert isinstance(alone, CodeTransformer)
        of_run = grn_lightning.load(getattr(chain, name))
        assert tensors_equal(alone.state_dict(), of_run.state_dict())


def test_stages_that_do_not_belong_together_are_refused(chain, exports, digits, tmp_path):
    with pytest.raises(ValueError, match="is a plain baseline, which has no stage 2"):
        grn_lightning.load(exports / "baseline", fine=exports / "fine")
    with pytest.raises(ValueError, match="stage 1 must be causal and stage 2 not"):
        grn_lightning.load(exports / "raster", fine=exports / "baseline")
    other = tmp_path / "clusters.safetensors"
    call_grn(
        *("cluster", chain.tokenizer, digits / "images", "--out", other, "--num_clusters", 4),
        *("--image_size", 16, "--num_restarts", 1, "--seed", 3, "--device", "cpu"),
    )
    split = {"clusters": str(other)}
    folder = store(tmp_path / "other", LitFine, chain.tokenizer, split=split)
    with pytest.raises(ValueError, match="both stages must have one split"):
        grn_lightning.load(exports / "raster", fine=folder)


def test_a_stage_starts_from_its_like_and_from_nothing_else(chain, exports, trained, capsys):
    for start in (chain.raster, exports / "raster"):
        stage = load_stage(chain.raster)
        other = LitRaster(**dict(stage.hparams) | {"init_from": str(start)})
        other.configure_model()
        assert tensors_equal(other.network.state_dict(), stage.network.state_dict())
    options = dict(load_stage(chain.raster).hparams)
    for wrong, match in (
        (chain.tokenizer, "`init_from`: .*vq' has no network; what it has is .*tokenizer"),
        (chain.baseline, "`init_from`: .*ar': the checkpoint does not fit CodeTransformer"),
        (exports / "fine", "`init_from`: .*fine': the checkpoint does not fit CodeTransformer"),
        (trained.classes, "has no network; what it has is generator"),
    ):
        module = LitRaster(**options | {"init_from": str(wrong)})
        with pytest.raises(ValueError, match=match):
            module.configure_model()


def test_prefixes_and_captions_are_exported_too(chain, trained, tmp_path):
    call_grn("export", trained.tokenizer, "--out", tmp_path / "hbq")
    call_grn("export", chain.hbq_raster, "--out", tmp_path / "raster")
    split = json.loads((tmp_path / "raster.json").read_text())["config"]["split"]
    assert split["kind"] == "prefix"
    assert split["coarse_rounds"] == 1
    call_grn("export", chain.captioned, "--out", tmp_path / "text")
    ours, run = grn_lightning.load(tmp_path / "text"), grn_lightning.load(chain.captioned)
    assert isinstance(ours, CoarseToFinePipeline)
    prompts = {"captions": ["the digit one", "the digit two"]}
    drawn = [p.draw(p.condition(prompts), INDEX).codes for p in (ours, run)]
    assert torch.equal(*drawn)


def test_the_baseline_becomes_an_official_file_and_stage_2_does_not(exports, tmp_path, capsys):
    call_grn("convert", exports / "baseline", "--to", "official", "--out", tmp_path / "ar.pt")
    stored = torch.load(tmp_path / "ar.pt", weights_only=True)["model"]
    assert tensors_equal(stored, grn_lightning.load(exports / "baseline").coarse.state_dict())
    with pytest.raises(SystemExit):
        call_grn("convert", exports / "fine", "--to", "official", "--out", tmp_path / "fine.pt")
    assert "bidirectional, captioned or many-channelled" in capsys.readouterr().err


# --- samples --------------------------------------------------------------------------------------


def pixels(file: Path) -> bytes:
    with Image.open(file) as picture:
        return picture.tobytes()


def test_samples_are_the_pictures_of_the_stages_whatever_the_batch(chain, tmp_path):
    options = ["--class_labels", "[3, 5]", "--num_samples", 2, "--seed", 4]
    warm = ["--draw.coarse.guidance_scale", 2, "--draw.fine.temperature", 0.5]
    report = draw(chain, tmp_path / "a", *options, *warm)
    assert [file.name for file in report.files] == [
        "00000-class-3.png",
        "00001-class-3.png",
        "00002-class-5.png",
        "00003-class-5.png",
    ]
    assert report.forwards_per_sample == 4 * 2 + 1
    assert report.sheet.is_file()
    told = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert told["draw"]["coarse"]["guidance_scale"] == 2
    assert "--draw.fine.temperature=0.5" in told["command"]
    assert told["weights"].keys() == {"coarse", "fine", "tokenizer", "split", "fine_mask"}
    assert len(told["samples"]) == 4
    one = ["--class_labels", 5, "--first_index", 3, "--seed", 4, "--batch_size", 1]
    again = draw(chain, tmp_path / "b", *one, *warm)
    assert pixels(again.files[0]) == pixels(report.files[3])
    assert pixels(report.files[0]) != pixels(report.files[1])


def test_the_baseline_and_captions_are_drawn_from(chain, exports, tmp_path):
    report = call_grn(
        *("sample", exports / "baseline", "--class_labels", 7, "--out", tmp_path / "a"),
        *("--device", "cpu"),
    )
    assert report.forwards_per_sample == 4
    report = call_grn(
        *("sample", chain.captioned, "--prompts", '["the digit two"]', "--out", tmp_path / "b"),
        *("--device", "cpu"),
    )
    assert report.files[0].name == "00000-the-digit-two.png"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--class_labels", 3, "--refine.num_steps", 3], "`--refine` must be left out"),
        (["--class_labels", 3, "--preset", "1M"], "`--preset` must be left out"),
        (["--prompts", "two"], "draw 10 classes"),
        (["--class_labels", 10], r"must be in \[0, 10\), got \[10\]"),
        (["--class_labels", 3, "--draw.coarse.top_p", 0], "top_p must be in"),
    ],
)
def test_what_stages_do_not_know_is_refused(options, match, chain, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        draw(chain, tmp_path / "x", *options)
    assert stop.value.code == 2
    assert re.search(match, capsys.readouterr().err)
    assert not (tmp_path / "x").exists()


def test_what_refining_generators_do_not_know_is_refused(chain, digits, trained, tmp_path, capsys):
    where = ("--class_labels", 3, "--out", tmp_path / "x", "--device", "cpu")
    with pytest.raises(SystemExit):
        call_grn("sample", trained.classes, "--fine", chain.fine, *where)
    assert "`--fine` must be left out for generators that refine" in capsys.readouterr().err
    for command in (("evaluate", chain.raster, chain.codes), ("check", chain.raster)):
        with pytest.raises(SystemExit):
            call_grn(*command)
        assert "is a stage of coarse-to-fine prediction" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["baseline", "fine"])
def test_tools_of_refinement_refuse_stages_of_any_form(name, exports, capsys):
    with pytest.raises(SystemExit):
        call_grn("calibrate", exports / name)
    assert "is a stage of coarse-to-fine prediction, which does" in capsys.readouterr().err


# --- the lesson -----------------------------------------------------------------------------------

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGE = (ROOT / "docs" / "ctf.md").read_text(encoding="utf-8")
SMALLER = {
    "--num_clusters 128": "--num_clusters 4 --num_restarts 1",
    "--num_clusters 64": "--num_clusters 3 --num_restarts 1",
    "--image_size 32": "--image_size 16",
    "--num_samples 4": "--num_samples 1",
    "--class_labels 207": "--class_labels 2",
}


def lay_out(chain: Chain, hbq: Path, digits: Path) -> None:
    """What the page finds around it, in the folder where it is walked."""
    for name, folder in (
        ("tokenizer-digits", hbq),
        ("tokenizer-digits-vq", chain.tokenizer),
        ("ctf-digits-vq-coarse", chain.raster),
        ("ctf-digits-vq-fine", chain.fine),
        ("ctf-digits-vq-baseline", chain.baseline),
    ):
        shutil.copytree(folder, Path("runs", name))
    shutil.copytree(digits, "data/digits")
    shutil.copytree(ROOT / "experiments", "experiments")
    Path("weights").mkdir()
    tokenizer, stage = load_tokenizer(chain.tokenizer), load_stage(chain.baseline)
    torch.save({"model": tokenizer.state_dict()}, "weights/vq_ds16_c2i.pt")
    table = torch.zeros(1 + 4, 8, 2)
    torch.save({"model": stage.network.state_dict() | {"freqs_cis": table}}, "weights/c2i_B_256.pt")


def test_the_lesson_can_be_walked(chain, trained, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lay_out(chain, trained.tokenizer, digits)
    said: dict[str, Any] = {}
    for language, text in BLOCK.findall(PAGE):
        if language == "python":
            exec(text, said)
        for line in text.replace("\\\n", " ").splitlines() if not language else ():
            for long, short in SMALLER.items():
                line = line.replace(long, short)
            words = shlex.split(line)
            assert words[0] == "grn"
            if words[1] == "fit":  # trained for minutes; that it resolves is enough here
                with pytest.raises(SystemExit) as stop:
                    call_grn(*words[1:], "--print_config")
                assert stop.value.code == 0
            else:
                call_grn(*words[1:])
    assert said["drawn"].clips.shape == (2, 3, 1, 16, 16)
    assert len(list(Path("runs/lesson/ctf").glob("0*.png"))) == 2
    back = torch.load("weights/back.pt", weights_only=True)["model"]
    assert tensors_equal(back, load_stage(chain.baseline).network.state_dict())
    for split in ("clusters/digits-vq-k128", "clusters/digits-hbq-k64"):
        assert Path("runs", split).with_suffix(".safetensors").is_file()


def test_what_the_lesson_names_exists():
    for file in set(re.findall(r"(?:experiments/[\w/]+\.yaml|images/[\w-]+\.png)", PAGE)):
        folder = ROOT if file.startswith("experiments") else ROOT / "docs"
        assert (folder / file).is_file(), file
