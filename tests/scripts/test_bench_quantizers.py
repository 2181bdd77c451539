"""`grn bench quantizers`: what is kept, what is compared, what is refused, what the table says."""

import inspect
import json
import re
import shlex
import statistics
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from grn_lightning.lit.tokenizer import load_tokenizer
from grn_lightning.metrics import CodeAlarms
from grn_lightning.models.tokenizer import TokenizerConfig
from grn_lightning.scripts import bench_quantizers as module
from grn_lightning.scripts.bench_quantizers import QuantizerBench
from grn_lightning.scripts.quantizer_records import Arm, ArmResult, QuantizerBenchConfig
from grn_lightning.scripts.quantizer_table import Row, alarms, markdown, rows_of
from tests.tiny_runs import TINY_TOKENIZER, call_grn

ARMS = ["hbq", "none", "fsq", "vq", "vq2"]
TINY = {
    "tokenizer": TINY_TOKENIZER | {"temporal_downsample": [False], "num_rounds": 4},
    "settings": {"vq2": {"name": "vq", "codebook_bits": 2, "codeword_width": 2}},
    "max_steps": 2,
    "batch_size": 4,
    "image_size": 16,
    "num_judged": 6,
    "optim": {"lr": 1e-3},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    return file


@pytest.fixture(scope="module")
def bench(digits: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> QuantizerBench:
    """Five arms of one seed, done in two pieces."""
    folder = tmp_path_factory.mktemp("bench")
    common = (folder, "-c", config, "--data", digits / "images", "--seeds", "[3]")
    call_grn("bench", "quantizers", *common, "--arms", "[hbq]")
    return call_grn("bench", "quantizers", *common, "--arms", f"[{','.join(ARMS)}]")


def record(bench: QuantizerBench, arm: str) -> dict:
    return json.loads((bench.folder / arm / "m4" / "seed3" / "result.json").read_text())


def test_arms_share_data_and_bits_and_differ_in_the_quantizer(bench: QuantizerBench) -> None:
    assert {row.arm for row in bench.rows} == set(ARMS)
    records = {arm: record(bench, arm) for arm in ARMS}
    assert len({json.dumps(one["shared"], sort_keys=True) for one in records.values()}) == 1
    # 16 x 16 pixels are 2 x 2 positions of 16 bits; five levels of three bits fit into them
    bits = {arm: one["bits_per_pixel"] for arm, one in records.items()}
    assert bits == {"hbq": 0.25, "vq": 0.25, "vq2": 0.25, "none": None, "fsq": 15 / 64}
    assert (records["vq2"]["code_channels"], records["vq2"]["alphabet_size"]) == (8, 4)
    assert all(one["num_judged"] == 6 for one in records.values())


def test_the_judged_weights_lie_beside_the_record(bench: QuantizerBench) -> None:
    for arm in ARMS:
        tokenizer = load_tokenizer(bench.folder / arm / "m4" / "seed3" / "tokenizer")
        assert tokenizer.config.quantizer.name == arm.rstrip("2")
        size = sum(tensor.numel() for tensor in tokenizer.state_dict().values())
        assert size == record(bench, arm)["num_parameters"]


def test_rounds_are_decoded_one_by_one_where_there_are_rounds(bench: QuantizerBench) -> None:
    curve = record(bench, "hbq")["psnr_by_rounds"]
    assert set(curve) == {"unquantized", *map(str, range(1, 9))}
    assert curve["4"] == pytest.approx(record(bench, "hbq")["psnr"], abs=1e-4)
    assert curve["8"] == pytest.approx(curve["unquantized"], abs=0.1)
    assert set(record(bench, "fsq")["psnr_by_rounds"]) == {"unquantized"}


def test_finished_arms_are_kept_and_missing_ones_trained(
    bench: QuantizerBench, digits: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    monkeypatch.setattr(module, "run_arm", lambda *args, **rest: trained.append(str(args[2])))
    before = record(bench, "vq")
    common = (bench.folder, "-c", config, "--data", digits / "images", "--seeds", "[3,4]")
    again = call_grn("bench", "quantizers", *common, "--arms", "[vq,none]")
    assert trained == ["vq M=4 seed 4", "none M=4 seed 4"]
    assert record(bench, "vq") == before
    assert markdown(again.rows) == markdown(bench.rows)


def test_table_numbers_and_drawing_lie_in_the_folder(bench: QuantizerBench) -> None:
    table = (bench.folder / "bench.md").read_text()
    assert table.splitlines()[2:] == markdown(bench.rows).splitlines()[2:]
    assert table in f"{bench}\n"
    facts = json.loads((bench.folder / "bench.json").read_text())
    assert len(facts["results"]) == len(ARMS)
    assert "torch" in facts["environment"]
    with Image.open(bench.folder / "bench.png") as picture:
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 50


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--arms", "[hbq,rvq]"], "no arm 'rvq'; known are 'hbq', .* 'vq2'"),
        (["--num_rounds", "[3]", "--arms", "[vq]"], "12 bits .* divisor of 12"),
        (["--max_steps", "3"], "arms with other settings: max_steps .*another output folder"),
        (["--num_judged", "1"], "`num_judged` must be at least 2, got 1"),
        (["--device", "tpu"], "`device` must be"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(
    bench: QuantizerBench, digits: Path, config: Path, args: list, message: str, capsys
) -> None:
    with pytest.raises(SystemExit):
        call_grn(
            "bench", "quantizers", bench.folder, "-c", config, "--data", digits / "images", *args
        )
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("grn: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0])


def test_a_setting_of_an_arm_that_changes_is_noticed(
    bench: QuantizerBench, digits: Path, tmp_path: Path, capsys
) -> None:
    file = tmp_path / "other.yaml"
    file.write_text(yaml.safe_dump(TINY | {"settings": {"vq": {"name": "vq", "codebook_bits": 4}}}))
    with pytest.raises(SystemExit):
        call_grn("bench", "quantizers", bench.folder, "-c", file, "--data", digits / "images")
    assert "other settings: quantizer of 'vq'" in capsys.readouterr().err


def test_a_damaged_record_is_named(bench: QuantizerBench, tmp_path: Path) -> None:
    file = tmp_path / "hbq" / "m4" / "seed0" / "result.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"arm": "hbq"}')
    with pytest.raises(ValueError, match=r"result\.json' is no result of this version"):
        module.bench_quantizers(tmp_path, data=Path(record(bench, "hbq")["shared"]["data"]))


# ------------------------------------------------------------------ the table


def result(arm: str, seed: int, psnr: float, **rest) -> ArmResult:
    values = {
        "arm": arm,
        "num_rounds": 4,
        "seed": seed,
        "latent_width": 4,
        "code_channels": 4,
        "alphabet_size": 16,
        "bits_per_pixel": 0.25,
        "psnr": psnr,
        "ssim": 0.5,
        "fid": None,
        "psnr_by_rounds": {},
        "usage": 0.5,
        "entropy": 0.25,
        "alarms": [],
        "step_milliseconds": 10.0,
        "num_parameters": 1,
        "num_judged": 6,
        "quantizer": {},
        "shared": {},
    }
    return ArmResult(**(values | rest))


def test_the_table_tells_mean_and_deviation_and_the_gap_seed_by_seed() -> None:
    continuous = {"code_channels": 0, "bits_per_pixel": None, "usage": None, "entropy": None}
    ours = [result("hbq", seed, psnr) for seed, psnr in enumerate((20.0, 21.0, 22.0))]
    theirs = [result("none", seed, psnr, **continuous) for seed, psnr in ((0, 20.5), (1, 21.1))]
    rows = rows_of([*ours, *theirs])
    assert [row.arm for row in rows] == ["hbq", "none"]  # 21.0 dB before 20.8 dB
    gap = rows[0].gap(rows[1])
    assert gap is not None
    assert gap.values == pytest.approx((-0.5, -0.1))
    cells = [cell.strip() for cell in markdown(rows).splitlines()[2].split("|")]
    deviation = statistics.stdev((-0.5, -0.1))
    assert cells[5:7] == ["21.00 ± 1.00", f"-0.30 ± {deviation:.2f}"]
    assert markdown(rows).splitlines()[3].split("|")[3].strip() == "continuous"


def test_a_single_seed_has_no_deviation_and_an_arm_without_partner_no_gap() -> None:
    row = Row("hbq", 4, (result("hbq", 0, 20.0),))
    assert "| 20.00 | - |" in markdown([row])


def test_alarms_name_arm_and_seed() -> None:
    rows = rows_of([result("vq", 2, 20.0, alarms=["a code channel sleeps"])])
    assert alarms(rows) == ["vq, M=4, seed 2: a code channel sleeps"]


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="`max_steps` must be at least 1, got 0"):
        QuantizerBenchConfig(max_steps=0)


# ------------------------------------------------------------------ the page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "quantizers.md"
BLOCKS = re.findall(
    r"^```(\w*)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


def test_commands_of_the_page_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a training of minutes, so that here only its options are read."""
    calls = []

    @wraps(module.bench_quantizers)
    def stand_in(*args: Any, **options: Any) -> str:
        bound = inspect.signature(module.bench_quantizers).bind(*args, **options)
        calls.append(bound.arguments["output"])
        return "done"

    monkeypatch.setattr(module, "bench_quantizers", stand_in)
    lines = [line for kind, text in BLOCKS if not kind for line in text.splitlines()]
    commands = [line for line in lines if line.startswith("grn ")]
    for command in commands:
        call_grn(*shlex.split(command)[1:])
    assert len(calls) == len(commands) >= 4


def test_configurations_of_the_page_are_accepted(tmp_path: Path) -> None:
    files = [yaml.safe_load(text) for kind, text in BLOCKS if kind == "yaml"]
    switch, watch, shards = files
    TokenizerConfig(**switch["model"]["init_args"]["tokenizer"])
    (callback,) = watch["trainer"]["callbacks"]
    CodeAlarms(**callback["init_args"]["alarms"])
    config = {key: shards[key] for key in ("settings", "max_steps", "image_size")}
    bench = QuantizerBenchConfig(tokenizer=TokenizerConfig(**shards["tokenizer"]), **config)
    for name in shards["arms"]:
        bench.tokenizer_of(Arm(name, 4, 0))
