"""`grn plan`: what it says, what follows from what, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentError

from grn_lightning.lit.devices import DEVICES, Device, described, find_device
from grn_lightning.lit.memory import StepMemory
from grn_lightning.lit.rehearsal import BatchSizes, Blocks, StepSettings
from grn_lightning.lit.strategies import STRATEGIES
from grn_lightning.models.costs import class_flops, text_flops
from grn_lightning.models.grn_class import GRNClassConfig
from grn_lightning.models.grn_text import GRNTextConfig
from grn_lightning.models.variants import TOKENIZERS
from grn_lightning.scripts.plan import Plan, PlanConfig, plan
from grn_lightning.scripts.plan_advice import Choice, _changes, _Variant
from grn_lightning.scripts.plan_estimates import BatchWork, Rates, speed_of
from grn_lightning.scripts.plan_settings import Source, Training, as_training, read_settings
from grn_lightning.scripts.plan_strategies import PLANNED, device_memory, planned_name
from tests.tiny_runs import TINY_CLASS, TINY_TEXT, callback, generator_config, write_yaml

STEP = StepMemory(
    parameters=4_000, frozen=100, gradients=4_000, optimizer=8_000, average=4_000,
    compute=25_100, update=21_100,
)  # fmt: skip
BLOCKS = Blocks(largest=500, outside=1000)
WIDE = {"width": 128, "depth": 4}
BITS = {"num_elements": 48}  # those of the embedded set's tokenizer, 16 pixels per position


def _file(folder: Path, kind: str, **rest: Any) -> Path:
    network = BITS | rest.pop("generator", {})
    config = generator_config(
        folder, Path("data"), Path("none"), kind=kind, generator=network,
        data={"image_size": 32}, **rest,
    )  # fmt: skip
    return write_yaml(folder, config)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("plan")
    trainer = {"accumulate_grad_batches": 2, "precision": "bf16-mixed", "max_steps": 3600}
    file = _file(folder, "class", trainer=trainer, callbacks=[callback("EMA")], generator=WIDE)
    config = PlanConfig(
        device="4090", tflops=100.0, utilization=0.5, world_size=2, strategy="ddp", price=2.0,
        json=folder / "out" / "plan.json",
    )  # fmt: skip
    return plan([str(file), "model.init_args.optim.name=adamw"], config=config)


# --- one plan -------------------------------------------------------------------------------------


def test_parameters_and_states_follow_from_one_another(planned: Plan) -> None:
    with torch.device("meta"):
        fixed = planned.memory.parameters / 4 - planned.parameters["generator"]
    assert fixed == 0  # the fixed table of positions is a parameter that is not trained
    trained = planned.memory.gradients
    assert planned.memory.optimizer == pytest.approx(2 * trained, rel=0.01)
    assert planned.memory.average == trained
    assert planned.memory.communication == trained
    assert planned.memory.peak == sum(size for _, size in planned.memory.rows())
    assert planned.fits


def test_time_follows_from_operations(planned: Plan) -> None:
    config = GRNClassConfig(**(TINY_CLASS | WIDE | BITS))
    speed = planned.speed
    assert speed.samples_per_step == 4 * 2 * 2
    assert speed.tokens_per_step == speed.samples_per_step * (4 + 2)
    assert speed.flops_per_step == pytest.approx(16 * class_flops(config).total)
    share = 1 - speed.tokenizer_share
    assert speed.seconds_per_step == pytest.approx(speed.flops_per_step / 2 / 50e12 / share)
    assert planned.hours is not None
    assert planned.hours == pytest.approx(speed.seconds_per_step)  # 3600 of them
    assert planned.cost == pytest.approx(planned.hours * 2 * 2.0)


def test_the_table_says_what_was_found_and_what_was_assumed(planned: Plan) -> None:
    text = str(planned)
    assert "2 x 4090, ddp, bf16-mixed" in text
    assert "4 x 1 x 32 x 32 pixels, 2 micro-batches a step" in text
    assert "22.4 GiB" not in text
    assert ": fits" in text
    assert "no tokenizer at 'none' yet" in text
    assert "utilization 50% is assumed" in text
    assert max(map(len, text.splitlines())) < 180


def test_the_same_can_be_had_as_data(planned: Plan, tmp_path: Path) -> None:
    plain = json.loads(json.dumps(planned.plain()))
    assert plain["memory"]["peak"] == planned.memory.peak
    assert plain["fits"] is True
    assert plain["parameters"] == planned.parameters


def test_packs_have_their_budget_of_tokens(tmp_path: Path) -> None:
    file = _file(tmp_path, "text", generator={"attention": "full"})
    settings = yaml.safe_load(file.read_text())
    data = settings["data"]
    data["class_path"] = "grn_lightning.lit.packed.PackedShardData"
    data["init_args"]["token_budget"] = 600
    for one in data["init_args"]["sources"]:
        one["presets"] = {"0.06M": 1.0}
        one["num_frames"] = 1
        one["media"] = "image"
    file.write_text(yaml.safe_dump(settings))
    result = plan([str(file)], config=PlanConfig(device="A100"))
    # 256 positions, 9 of a caption, 1 of time: documents of 266 tokens, which fill the budget.
    assert result.speed.samples_per_step == pytest.approx(600 / 266)
    assert result.speed.tokens_per_step == pytest.approx(600)
    config = GRNTextConfig(**(TINY_TEXT | BITS | {"attention": "full"}))
    flops = text_flops(config, 256, 9, is_text_trained=True)
    assert result.speed.flops_per_step == pytest.approx(600 / 266 * flops.total)
    assert "packs of 600 tokens" in str(result)
    assert "100% of documents, up to 2 x 1 x 256 x 256 pixels" in str(result)


def _mixed(token_budget: int | None) -> Training:
    """Pictures of 100 tokens and clips of 500, two to one."""
    sizes = BatchSizes(
        samples=10, size=(1, 32, 32), is_coded=False, has_text_features=False, text_tokens=9
    )
    pictures = Source(title="pictures", weight=2.0, sizes=sizes, num_samples=None)
    clips = replace(pictures, title="clips", weight=1.0, sizes=replace(sizes, samples=2))
    step = StepSettings(precision="32-true", micro_batches=3)
    return Training(
        model={}, sources=(pictures, clips), token_budget=token_budget, step=step,
        strategy="ddp", world_size=2, max_steps=1,
    )  # fmt: skip


MIXED = [BatchWork(10 * 100, 10 * 1e9, 10 * 3e9), BatchWork(2 * 500, 2 * 8e9, 2 * 30e9)]
RATES = Rates(network=1e12, tokenizer=2e12)


def test_weights_of_packs_are_shares_of_documents() -> None:
    speed = speed_of(_mixed(1400), MIXED, RATES, 2, again=False)
    # 4 pictures and 2 clips have 1400 tokens; 3 micro-batches on 2 devices.
    assert speed.samples_per_step == pytest.approx(6 * (4 + 2))
    assert speed.tokens_per_step == pytest.approx(6 * 1400)
    assert speed.flops_per_step == pytest.approx(6 * (4 * 1e9 + 2 * 8e9))
    tokenizer = (4 * 3e9 + 2 * 30e9) / 2e12
    assert speed.tokenizer_share == pytest.approx(tokenizer / (tokenizer + 20e9 / 1e12))
    assert speed.seconds_per_step == pytest.approx(3 * (tokenizer + 20e9 / 1e12))


def test_weights_of_batches_are_shares_of_steps() -> None:
    speed = speed_of(_mixed(None), MIXED, RATES, 2, again=False)
    assert speed.samples_per_step == pytest.approx(6 * (2 * 10 + 2) / 3)
    assert speed.flops_per_step == pytest.approx(6 * (2 * 10e9 + 16e9) / 3)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(1400, "data.init_args.token_budget: 700"), (None, "batch_size: 5, 1")],
)
def test_advice_names_what_makes_micro_batches_smaller(budget: int | None, expected: str) -> None:
    changes = _changes(_Variant("ddp", False, 2), Choice("ddp", _mixed(budget)))
    assert changes == (expected, "trainer.accumulate_grad_batches: 6")


@pytest.mark.parametrize(
    ("words", "number"),
    [
        (["trainer.devices=8", "trainer.num_nodes=4"], 32),
        (["trainer.devices=[0,2]"], 2),
        (["trainer.devices=auto"], None),
    ],
)
def test_devices_are_those_of_the_files(
    tmp_path: Path, words: list[str], number: int | None
) -> None:
    settings = read_settings([str(_file(tmp_path, "class")), *words])
    tokenizer = TOKENIZERS["digits"]
    assert as_training(settings, tokenizer).world_size == number


# --- what does not fit ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("crowded")
    source = {"path": "none", "batch_size": 64}
    file = _file(folder, "class", sources=[source], generator=WIDE)
    device = PlanConfig(device="4090", memory=1.11, world_size=4, strategy="ddp")
    return plan([str(file), "model.init_args.optim.name=adamw"], config=device)


def test_advice_fits_and_the_least_change_comes_first(crowded: Plan) -> None:
    assert not crowded.fits
    assert "DOES NOT FIT" in str(crowded)
    assert crowded.advice
    assert all(one.peak <= crowded.device.usable for one in crowded.advice)
    first = crowded.advice[0].changes
    assert any("batch_size" in change for change in first)
    assert not any("offload" in change for change in first)
    parts = dict(change.split(": ") for change in first if ": " in change)
    assert int(parts["batch_size"]) * int(parts["trainer.accumulate_grad_batches"]) >= 64


# --- strategies -----------------------------------------------------------------------------------


def _peak(strategy: str, world_size: int, step: StepMemory = STEP) -> float:
    return device_memory(step, strategy, world_size, BLOCKS).peak


def test_a_single_device_holds_what_the_step_was_seen_to_hold() -> None:
    assert _peak("single", 1) == STEP.peak
    assert device_memory(STEP, "single", 1, BLOCKS).activations == 5_000


def test_ddp_keeps_gradients_twice() -> None:
    assert _peak("ddp", 8) == STEP.peak + STEP.gradients


def test_stages_divide_more_and_more_and_offload_takes_it_away() -> None:
    memories = [device_memory(STEP, f"deepspeed_zero{n}", 4, BLOCKS) for n in (1, 2, 3)]
    parts = [(m.parameters, m.gradients, m.average) for m in memories]
    assert parts == [(4_000, 4_000, 4_000), (4_000, 1_000, 4_000), (1_000, 1_000, 1_000)]
    # A quarter of the state, and of the float32 weights that it moves.
    assert {m.optimizer for m in memories} == {3_000}
    away = device_memory(STEP, "deepspeed_zero3_offload", 4, BLOCKS)
    assert (away.parameters, away.gradients, away.optimizer) == (0, 0, 0)
    assert away.host == 1_000 + 1_000 + 3_000
    kept = device_memory(STEP, "deepspeed_zero2_offload", 4, BLOCKS)
    assert kept.parameters == 4_000


def test_fsdp_divides_everything_but_the_blocks_at_hand() -> None:
    memory = device_memory(STEP, "fsdp", 4, BLOCKS)
    states = memory.parameters + memory.gradients + memory.optimizer + memory.average
    assert states == 20_000 / 4
    assert memory.communication == 4 * 500 + 2 * 1000
    assert memory.activations == 5_000


@pytest.mark.parametrize(
    ("kind", "init_args", "name"),
    [
        ("ZeRO", {"stage": 3, "options": {"stage3_max_live_parameters": 0}}, "deepspeed_zero3"),
        ("ZeRO", {"stage": 3, "offload": True}, "deepspeed_zero3_offload"),
        ("ZeRO", {}, "deepspeed_zero2"),
        ("FSDP", {"save_distributed_checkpoint": False}, "fsdp"),
    ],
)
def test_strategies_by_class_can_be_planned(
    tmp_path: Path, kind: str, init_args: dict[str, Any], name: str
) -> None:
    strategy = {"class_path": f"grn_lightning.lit.strategies.{kind}", "init_args": init_args}
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({"trainer": {"strategy": strategy}}))
    settings = read_settings([str(_file(tmp_path, "class")), str(other)])
    training = as_training(settings, TOKENIZERS["digits"])
    assert planned_name(training.strategy, 2) == name


def test_every_named_strategy_can_be_planned() -> None:
    assert {planned_name(name, 2) for name in STRATEGIES} <= set(PLANNED)
    assert planned_name("ddp", 1) == "single"
    assert planned_name("zero2", 8) == "deepspeed_zero2"


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"utilization": 1.5}, r"`utilization` must be in \(0, 1\], got 1.5"),
        ({"world_size": 0}, "`world_size` must be at least 1, got 0"),
        ({"price": -1.0, "text_tokens": 0}, "`text_tokens`.*; `price` must be positive, got -1"),
    ],
)
def test_impossible_assumptions_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PlanConfig(**settings)


def test_files_that_cannot_be_planned_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give the YAML files of the training"):
        plan(["trainer.max_steps=1"], config=PlanConfig())
    with pytest.raises(ValueError, match="'nowhere.yaml' is not there; give the YAML files"):
        plan(["nowhere.yaml"], config=PlanConfig())
    root = Path(__file__).parents[2] / "experiments"
    with pytest.raises(ValueError, match="knows trainings of LitGenerator, got one of LitTokenize"):
        plan([str(root / "tokenizer" / "digits.yaml")], config=PlanConfig())
    with pytest.raises(ArgumentError, match="arguments are required: data, model"):
        plan([str(root / "_base" / "cpu.yaml")], config=PlanConfig())


def test_strategies_and_devices_that_are_unknown_are_told() -> None:
    with pytest.raises(ValueError, match="a plan for strategy 'tp' cannot be made; known are sing"):
        planned_name("tp", 2)
    with pytest.raises(ValueError, match="strategy 'single' has one device, got `world_size` 2"):
        planned_name("single", 2)
    with pytest.raises(ValueError, match="unknown device 'TPU'; known are H100"):
        find_device("TPU")


# --- devices --------------------------------------------------------------------------------------


def test_a_device_may_be_described() -> None:
    device = described(DEVICES["H100"], memory=48, tflops=100)
    assert device.memory == 48 * 2**30
    assert (device.bf16, device.fp32) == (100e12, 100e12)
    assert device.usable == pytest.approx(0.95 * 48 * 2**30 - 2**30)
    assert replace(device, memory=1.0).usable == 0


def test_the_cpu_at_hand_is_measured() -> None:
    device = find_device("cpu")
    assert isinstance(device, Device)
    assert 1e9 < device.fp32 < 1e14
