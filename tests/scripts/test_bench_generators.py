"""`grn bench generators`: equal budgets, what is kept, what is refused, what the table says."""

import json
import re
import shutil
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from grn_lightning.lit.coarse_to_fine import load_coarse_to_fine
from grn_lightning.lit.generator import load_generator
from grn_lightning.models.pretrained import write_pretrained
from grn_lightning.models.tokenizer import HBQTokenizer, TokenizerConfig
from grn_lightning.models.vq_tokenizer import VQTokenizer, VQTokenizerConfig
from grn_lightning.scripts import bench_generators as module
from grn_lightning.scripts.bench_generators import GeneratorBench
from grn_lightning.scripts.generator_judge import PictureJudge, held_out_bits
from grn_lightning.scripts.generator_records import (
    ARMS,
    Arm,
    ArmPlan,
    ArmResult,
    GeneratorBenchConfig,
    Judged,
)
from grn_lightning.scripts.generator_table import markdown, protocol, rows_of
from tests.tiny_runs import TINY_CLASS, TINY_TOKENIZER, call_grn

BACKBONE = {"depth": 1, "width": 32, "num_heads": 2, "mlp_width": 32, "dropout": 0.0}
CHAIN = BACKBONE | {"channel_depth": 1}
PLANS: dict[str, Any] = {
    "ar-vq": {"tokenizer": "vq", "raster": BACKBONE},
    "ctf-vq": {"tokenizer": "vq", "raster": BACKBONE, "fine": BACKBONE},
    "ctf-hbq-m1": {"tokenizer": "hbq", "raster": CHAIN, "fine": BACKBONE, "coarse_rounds": 1},
    "grn": {"tokenizer": "hbq", "generator": TINY_CLASS},
}
TINY: dict[str, Any] = {
    "plans": PLANS,
    "max_steps": 5,
    "batch_size": 4,
    "num_clusters": 3,
    "num_steps": 2,
    "guidance_scales": [1.0, 2.0],
    "num_tried": 6,
    "num_drawn": 8,
    "num_held_out": 6,
    "image_size": 16,
    "optim": {"lr": 1e-3},
}


def exported(file: Path, tokenizer: HBQTokenizer | VQTokenizer) -> Path:
    info = {"kind": "tokenizer", "config": {"tokenizer": asdict(tokenizer.config)}}
    write_pretrained(file, {"tokenizer": tokenizer.eval()}, info)
    return file.with_suffix(".safetensors")


@pytest.fixture(scope="module")
def vq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codebook nobody trained: 16 codewords at 2 x 2 positions."""
    torch.manual_seed(0)
    config = VQTokenizerConfig(
        codebook_size=16,
        codebook_dim=3,
        width=32,
        width_multipliers=(1, 1, 1, 1),
        num_res_blocks=1,
        feature_width=4,
    )
    file = tmp_path_factory.mktemp("vq") / "tokenizer"
    return exported(file, VQTokenizer(config))


@pytest.fixture(scope="module")
def hbq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes of 4 channels and 2 rounds at 2 x 2 positions, untrained as well."""
    torch.manual_seed(0)
    config = TokenizerConfig(**TINY_TOKENIZER)
    file = tmp_path_factory.mktemp("hbq") / "tokenizer"
    return exported(file, HBQTokenizer(config))


@pytest.fixture(scope="module")
def options(digits: Path, hbq: Path, vq: Path, tmp_path_factory: Any) -> list[Any]:
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    runs = ("--hbq", hbq, "--vq", vq)
    return ["-c", file, "--data", digits / "images", *runs, "--seeds", "[3]"]


@pytest.fixture(scope="module")
def bench(options: list[Any], tmp_path_factory: pytest.TempPathFactory) -> GeneratorBench:
    """Four arms of one seed, done in two pieces."""
    folder = tmp_path_factory.mktemp("bench")
    call_grn("bench", "generators", folder, *options, "--arms", "[ctf-vq]")
    return call_grn("bench", "generators", folder, *options, "--arms", f"[{','.join(PLANS)}]")


def record(bench: GeneratorBench, arm: str) -> dict[str, Any]:
    return json.loads((bench.folder / arm / "seed3" / "result.json").read_text())


def test_all_arms_see_as_many_samples_and_share_all_settings(bench: GeneratorBench) -> None:
    records = {arm: record(bench, arm) for arm in PLANS}
    samples = {arm: one["num_samples"] for arm, one in records.items()}
    # 5 updates of 4 samples; two networks have two and three of them
    assert samples == {
        "ar-vq": [20],
        "ctf-vq": [8, 12],
        "ctf-hbq-m1": [8, 12],
        "grn": [20],
    }
    assert len({json.dumps(one["shared"], sort_keys=True) for one in records.values()}) == 1
    for one in records.values():
        assert [judged["guidance_scale"] for judged in one["tried"]] == [1.0, 2.0]
        best = min(one["tried"], key=lambda judged: judged["fid"])
        assert one["judged"]["guidance_scale"] == best["guidance_scale"]
        assert (one["judged"]["num_pictures"], best["num_pictures"]) == (8, 6)


def test_forwards_and_parameters_are_those_of_the_networks(bench: GeneratorBench) -> None:
    forwards = {
        arm: (record(bench, arm)["num_forwards"], record(bench, arm)["num_head_calls"])
        for arm in PLANS
    }
    # 2 x 2 positions, one more for stage 2; 4 channels each through the head; 2 steps of the GRN
    assert forwards == {"ar-vq": (4, 0), "ctf-vq": (5, 0), "ctf-hbq-m1": (5, 16), "grn": (2, 0)}
    folder = bench.folder / "ctf-vq" / "seed3"
    pipeline = load_coarse_to_fine(folder / "stage1", folder / "stage2")
    assert pipeline.fine is not None
    parts = (pipeline.coarse, pipeline.fine)
    sizes = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert record(bench, "ctf-vq")["num_parameters"] == sizes


def test_stored_networks_give_the_recorded_bits(bench: GeneratorBench, digits: Path) -> None:
    config = GeneratorBenchConfig(**TINY | {"optim": {}, "guidance_scales": (1.0,)})
    held_out = PictureJudge(config, digits / "images").held_out
    for arm in ("ar-vq", "ctf-hbq-m1"):
        stages = sorted((bench.folder / arm / "seed3").glob("stage*"))
        bits = held_out_bits(load_coarse_to_fine(*stages), held_out, 3)
        one = record(bench, arm)
        assert sum(bits) == pytest.approx(one["bits"], rel=1e-5)
        assert one["coarse_bits"] == (None if arm == "ar-vq" else pytest.approx(bits[0], rel=1e-5))
    assert record(bench, "grn")["bits"] is None
    grn = load_generator(bench.folder / "grn" / "seed3" / "stage1")
    assert grn.generator_config.width == 32


def test_finished_arms_are_kept_and_missing_ones_trained(
    bench: GeneratorBench, options: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    monkeypatch.setattr(module, "run_arm", lambda *args: trained.append(str(args[1])))
    before = record(bench, "ctf-vq")
    again = call_grn(
        "bench", "generators", bench.folder, *options, "--arms", "[ctf-vq,grn]", "--seeds", "[3,4]"
    )
    assert trained == ["ctf-vq seed 4", "grn seed 4"]
    assert record(bench, "ctf-vq") == before
    assert markdown(again.rows) == markdown(bench.rows)


def test_table_protocol_and_drawing_lie_in_the_folder(bench: GeneratorBench) -> None:
    text = (bench.folder / "bench.md").read_text()
    assert text.startswith(markdown(bench.rows))
    for line in protocol(bench.rows):
        assert f"- {line}\n" in text
        assert line in str(bench)
    facts = json.loads((bench.folder / "bench.json").read_text())
    assert [one["arm"] for one in facts["results"]] == list(PLANS)
    for file in (bench.folder / "bench.png", bench.folder / "grn" / "seed3" / "pictures.png"):
        with Image.open(file) as picture:
            assert min(picture.size) > 100
            assert len(picture.convert("RGB").getcolors(1_000_000)) > 50


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--arms", "[ar-vq,diffusion]"], "no arm 'diffusion'; known are 'ar-vq', .*'grn'"),
        (["--max_steps", "6"], "arms with other settings: max_steps .*another output folder"),
        (["--num_drawn", "1"], "`num_drawn` must be at least 2, got 1"),
        (["--coarse_share", "1.0"], r"`coarse_share` must be in \(0, 1\), got 1.0"),
        (["--guidance_scales", "[]"], "`guidance_scales` must hold scales of at least 0"),
        (["--device", "tpu"], "`device` must be"),
        (
            ["--seeds", "[7]", "--arms", "[ar-vq]", "--vq", "gone"],
            "no tokenizer at 'gone', which the arms ar-vq, ctf-vq need; train it: grn fit .*"
            "digits_vq.yaml, or give `--vq RUN`",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(
    bench: GeneratorBench, options: list[Any], args: list[str], message: str, capsys: Any
) -> None:
    with pytest.raises(SystemExit):
        call_grn("bench", "generators", bench.folder, *options, *args)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("grn: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0])


def test_a_folder_of_somebody_else_is_left_alone(
    options: list[Any], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    for kind, folder in (("generators", tmp_path), ("quantizers", tmp_path / "notes" / "a.txt")):
        data = options[2:4]
        with pytest.raises(SystemExit):
            call_grn("bench", kind, folder, *(options if kind == "generators" else data))
        assert "must be new, empty, or that of a bench; " in capsys.readouterr().err
    assert [file.name for file in tmp_path.rglob("*")] == ["notes", "a.txt"]


def test_another_tokenizer_and_other_networks_are_noticed(
    bench: GeneratorBench, options: list[Any], vq: Path, tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(SystemExit):
        call_grn("bench", "generators", bench.folder, *options, "--hbq", vq)
    assert "other settings: tokenizer 'hbq'" in capsys.readouterr().err
    file = tmp_path / "other.yaml"
    plans = PLANS | {"ar-vq": PLANS["ar-vq"] | {"raster": CHAIN}}
    file.write_text(yaml.safe_dump(TINY | {"plans": plans}))
    with pytest.raises(SystemExit):
        call_grn("bench", "generators", bench.folder, *options, "-c", file)
    assert "other settings: networks of 'ar-vq'" in capsys.readouterr().err


def test_records_of_before_a_setting_was_made_are_known(
    bench: GeneratorBench,
    options: list[Any],
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "run_arm", lambda *args: pytest.fail(f"trained {args[1]}"))
    arms = ("--arms", f"[{','.join(PLANS)}]")
    folder = shutil.copytree(bench.folder, tmp_path / "bench")
    for file in folder.glob("*/seed*/result.json"):
        record = json.loads(file.read_text())
        del record["shared"]["corruption"]["i2v_ratio"]
        if record["arm"] == "grn":
            del record["plan"]["generator"]["projection_dropout"]
        file.write_text(json.dumps(record))
    again = call_grn("bench", "generators", folder, *options, *arms)
    assert markdown(again.rows) == markdown(bench.rows)
    file = folder / "grn" / "seed3" / "result.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"plan": record["plan"] | {"to_come": 1}}))
    with pytest.raises(SystemExit):
        call_grn("bench", "generators", folder, *options, *arms)
    assert "other settings: networks of 'grn'" in capsys.readouterr().err
    file.write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        call_grn("bench", "generators", folder, *options, *arms, "--corruption.i2v_ratio", 0.5)
    assert "other settings: corruption" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"tokenizer": "vq"}, "one of `raster` and `generator`"),
        ({"tokenizer": "hbq", "raster": BACKBONE, "coarse_rounds": 1}, "needs a stage 2"),
        ({"tokenizer": "hbq", "generator": TINY_CLASS, "fine": BACKBONE}, "needs a stage 1"),
        ({"tokenizer": "hbq", "raster": BACKBONE, "fine": BACKBONE}, "got None and 'hbq'"),
    ],
)
def test_a_plan_that_is_no_arm_is_refused(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArmPlan(**plan)


def test_networks_of_the_default_arms_are_of_about_one_size() -> None:
    """Tables of 4096 codewords, or of 12 channels of 16 values, are counted."""
    config = GeneratorBenchConfig()
    assert config.steps_of("ctf-vq") == (300, 300)
    assert config.steps_of("ar-vq") == config.steps_of("grn") == (600,)
    sizes = {arm: default_size(plan) for arm, plan in ARMS.items()}
    middle = statistics.median(sizes.values())
    assert max(abs(size / middle - 1) for size in sizes.values()) < 0.12, sizes


def default_size(plan: ArmPlan) -> int:
    from grn_lightning.models.code_transformer import CodeTransformer, CodeTransformerConfig
    from grn_lightning.models.grn_class import GRNClass

    if plan.generator is not None:
        return sum(p.numel() for p in GRNClass(plan.generator).parameters())
    codes = (1, 4096) if plan.tokenizer == "vq" else (12, 16)
    coarse, fine = codes, codes
    if plan.is_clustered:
        coarse = (1, GeneratorBenchConfig().num_clusters)
    elif plan.coarse_rounds is not None:
        coarse, fine = (12, 2**plan.coarse_rounds), (12, 2 ** (4 - plan.coarse_rounds))
    size = 0
    for backbone, reads, predicts in ((plan.raster, coarse, coarse), (plan.fine, coarse, fine)):
        if backbone is not None:
            network = CodeTransformer(
                CodeTransformerConfig(
                    input_channels=reads[0],
                    input_size=reads[1],
                    output_channels=predicts[0],
                    output_size=predicts[1],
                    is_causal=reads == predicts,
                    num_classes=10,
                    **vars(backbone),
                )
            )
            size += sum(p.numel() for p in network.parameters())
    return size


# ------------------------------------------------------------------ the table


def result(arm: str, seed: int, bits: float | None, fid: float, accuracy: float) -> ArmResult:
    def judged(scale: float | None = None) -> Judged:
        return Judged(fid=fid, accuracy=accuracy, num_pictures=8, guidance_scale=scale)

    shared = {
        "guidance_scales": [1.0, 2.0],
        "max_steps": 5,
        "batch_size": 4,
        "coarse_share": 0.5,
        "num_steps": 2,
        "optim": {"name": "muon"},
    }
    return ArmResult(
        arm=arm,
        seed=seed,
        num_samples=[8, 12],
        num_parameters=[1_000_000, 500_000],
        train_seconds=[2.0, 3.0],
        bits=bits,
        coarse_bits=None if bits is None else bits / 4,
        code_bits=192,
        judged=judged(2.0 if seed else 1.0),
        tried=[judged(1.0), judged(2.0)],
        reconstructed=judged(),
        real=judged(),
        draw_seconds=0.005,
        decode_seconds=0.002,
        num_forwards=5,
        num_head_calls=0,
        tokenizer_hash="0123456789abcdef",
        plan={"tokenizer": "vq"},
        shared=shared,
    )


def test_numbers_of_the_table_are_means_of_the_records() -> None:
    rows = rows_of(
        [
            result("grn", 0, None, 3.0, 0.5),
            result("mine", 0, 12.0, 3.0, 0.5),
            result("ctf-vq", 1, 60.0, 5.0, 0.75),
            result("ctf-vq", 0, 40.0, 4.0, 0.25),
        ]
    )
    assert [row.arm for row in rows] == ["ctf-vq", "grn", "mine"]  # the order of the arms
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in markdown(rows).splitlines()[2:]
    ]
    assert lines[0] == [
        "ctf-vq",
        f"50.0 ± {statistics.stdev((40, 60)):.1f}",
        f"12.5 ± {statistics.stdev((10, 15)):.1f}",
        f"4.50 ± {statistics.stdev((4, 5)):.2f}",
        f"50.0 ± {statistics.stdev((25, 75)):.1f}",
        "1, 2",
        "5.00 ± 0.00",
        "2.00 ± 0.00",
        "5",
        "1.50",
        "5 ± 0",
        "0, 1",
    ]
    assert lines[1][1:4] == ["-", "-", "3.00"]


def test_records_are_read_as_they_were_written(bench: GeneratorBench, tmp_path: Path) -> None:
    stored = module.read_result(bench.folder, Arm("grn", 3))
    assert stored == next(row for row in bench.rows if row.arm == "grn").results[0]
    file = tmp_path / "grn" / "seed0" / "result.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"arm": "grn"}')
    with pytest.raises(ValueError, match=r"result\.json' is no result of this version"):
        module.read_result(tmp_path, Arm("grn", 0))
