"""Two processes under every strategy are one process on the joined batch.

One launch of two processes trains all of them, one after the other: steps and validations, a resume
from the middle, drawings whose number differs between the processes. The rest happens here, where
there is one process and no DeepSpeed.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from grn_lightning.lit.checkpoints import averaged_state, find_checkpoint, read_checkpoint
from grn_lightning.lit.generator import load_generator
from grn_lightning.lit.shards import layout_of, zero_facts
from grn_lightning.models.pretrained import read_pretrained
from tests.tiny_runs import (
    call_grn,
    callback,
    checkpoints,
    generator_config,
    kill,
    logged,
    source,
    tensors_equal,
    write_yaml,
)

pytestmark = [
    pytest.mark.scale,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty"),
]

HERE = Path(__file__).parent
STEPS, PATIENCE_SECONDS = 4, 420
# Nothing of a tiny network would be divided by default.
CUT_SMALL = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}
CASES: dict[str, Any] = {
    "ddp": "ddp",
    "deepspeed_zero1": "deepspeed_zero1",
    "deepspeed_zero2": "deepspeed_zero2",
    "fsdp": "fsdp",
    "fsdp_full": "fsdp_full",
    "deepspeed_zero3": {
        "class_path": "grn_lightning.lit.strategies.ZeRO",
        "init_args": {"stage": 3, "options": CUT_SMALL},
    },
}
GOES_ON_FROM = {"fsdp": "one", "fsdp_full": "fsdp"}
"""Checkpoints of others, and of another number of processes, that a strategy goes on from."""
OFFLOADED = {
    "deepspeed_zero2": "deepspeed_zero2_offload",
    "deepspeed_zero3": {
        "class_path": "grn_lightning.lit.strategies.ZeRO",
        "init_args": {"stage": 3, "offload": True, "options": CUT_SMALL},
    },
}
"""Under what a resumed run goes on; what is divided is the same."""
HALF: dict[str, Any] = {"deepspeed_zero2_bf16": "deepspeed_zero2", "fsdp_bf16": "fsdp"}
"""Under what products are computed in bfloat16."""
FOLDERS = [name for name in CASES if name not in ("ddp", "fsdp_full")]


def run(folder: Path, digits: Path, tokenizer: Path, *, devices: int, **rest: Any) -> Path:
    """Write the settings of a run: an update of two batches, eight samples in all."""
    saved = checkpoints(rest.pop("saved_to", folder), 2)
    more = rest.pop("callbacks", [])
    optim = {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.95]}
    config = generator_config(
        folder,
        digits,
        tokenizer,
        kind="text",
        sources=[source(digits, "video", 4 // devices)],
        init_args={"optim": optim, "corruption": {"condition_dropout": 0.5}} | rest.pop("init", {}),
        callbacks=[callback("EMA", decay=0.9), saved, *more],
        trainer={
            "max_steps": STEPS,
            "accumulate_grad_batches": 2,
            "val_check_interval": 2,  # batches
            "gradient_clip_val": 0.5,  # shortens some of the gradients
            "devices": devices,
            **rest,
        },
    )
    return write_yaml(folder, config)


@pytest.fixture(scope="module")
def one(digits: Path, tokenizer_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process on the joined batch."""
    folder = tmp_path_factory.mktemp("one")
    call_grn("fit", "-c", run(folder, digits, tokenizer_run, devices=1))
    return folder


def half(folder: Path, digits: Path, tokenizer: Path, **rest: Any) -> Path:
    """Write the settings of the same run in bfloat16."""
    notes = {"class_path": "notes.Notes", "init_args": {"folder": str(folder)}}
    return run(folder, digits, tokenizer, precision="bf16-mixed", callbacks=[notes], **rest)


@pytest.fixture(scope="module")
def one_half(digits: Path, tokenizer_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process on the joined batch in bfloat16."""
    folder = tmp_path_factory.mktemp("one_half")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        call_grn("fit", "-c", half(folder, digits, tokenizer_run, devices=1))
    return folder


def start_in_turn(calls: list[list[str]], folder: Path, rank: int, port: int) -> Any:
    """Start one of two processes; the variables are those of torchrun."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    names = variables | {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | {name: str(value) for name, value in names.items()}
    environment |= {"TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1"}
    file = folder / "calls.json"
    file.write_text(json.dumps(calls))
    with (folder / f"output_{rank}.txt").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, str(HERE / "in_turn.py"), str(file)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@contextmanager
def run_in_turn(calls: list[list[str]], root: Path) -> Iterator[None]:
    """Two processes give commands one after the other, and are gone in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start_in_turn(calls, root, rank, port) for rank in range(2)]
    try:
        for rank, process in enumerate(processes):
            code = process.wait(PATIENCE_SECONDS)
            assert code == 0, (root / f"output_{rank}.txt").read_text()[-6000:]
        yield
    finally:
        for process in processes:
            kill(process)


@pytest.fixture(scope="module")
def two(
    one: Path, digits: Path, tokenizer_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Two processes under every strategy: `NAME`, and `NAME_resumed` from the second step on."""
    root = tmp_path_factory.mktemp("two")
    calls = []
    for name, strategy in CASES.items():
        folder, again, judged = (root / f"{name}{end}" for end in ("", "_resumed", "_judged"))
        uneven = {"class_path": "uneven.UnevenDraws", "init_args": {"folder": str(folder)}}
        settings: dict[str, Any] = {"devices": 2, "strategy": strategy}
        file = run(folder, digits, tokenizer_run, callbacks=[uneven], **settings)
        calls.append(["fit", "-c", str(file)])
        middle = f"--ckpt_path={folder}/checkpoints/step=2.ckpt"
        settings["init"] = {"activation_checkpointing": True}  # the same gradients
        settings["strategy"] = OFFLOADED.get(name, strategy)
        calls.append(["fit", "-c", str(run(again, digits, tokenizer_run, **settings)), middle])
        if name in GOES_ON_FROM:
            other = root / f"{name}_from_{GOES_ON_FROM[name]}"
            before = one if GOES_ON_FROM[name] == "one" else root / GOES_ON_FROM[name]
            before = f"--ckpt_path={before}/checkpoints/step=2.ckpt"
            calls.append(["fit", "-c", str(run(other, digits, tokenizer_run, **settings)), before])
        if name in ("deepspeed_zero3", "fsdp"):
            last = f"--ckpt_path={folder}/checkpoints/last.ckpt"
            file = run(judged, digits, tokenizer_run, **settings)
            calls.append(["validate", "-c", str(file), last])
    for name, strategy in HALF.items():
        file = half(root / name, digits, tokenizer_run, devices=2, strategy=strategy)
        calls.append(["fit", "-c", str(file)])
    with run_in_turn(calls, root):
        yield root


def numbers(folder: Path, name: str) -> dict[int, float]:
    return {step: float(value) for step, value in logged(folder, name).items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        pair = found[name], tensor
        if name.endswith("in_proj_bias"):
            # That of keys moves no attention: its gradient is rounding, which AdamW scales up.
            pair = tuple(torch.cat([whole.chunk(3)[n] for n in (0, 2)]) for whole in pair)
        torch.testing.assert_close(
            *pair, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


def moments_of(checkpoint: dict[str, Any]) -> list[dict[str, Tensor]]:
    """AdamW's moments in the order of its parameters, if they are in the checkpoint."""
    states = checkpoint.get("optimizer_states")
    if states is None:
        return []
    return [states[0]["state"][number] for number in range(len(states[0]["state"]))]


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_curves_are_those_of_one_process(name, one, two):
    for quantity in ("val/loss", "train/grad_norm"):
        expected = numbers(one, quantity)
        assert len(expected) == STEPS
        assert numbers(two / name, quantity) == pytest.approx(expected, rel=2e-5), quantity
    assert len(set(numbers(one, "val/loss").values())) == STEPS


@pytest.mark.parametrize("name", CASES)
def test_consolidated_it_is_what_one_process_writes(name, one, two, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # importing it fails
    alone = read_checkpoint(find_checkpoint(one))
    found = read_checkpoint(find_checkpoint(two / name))
    left_out = {"optimizer_states"} if name in FOLDERS else set()
    assert found.keys() == alone.keys() - left_out
    for key in ("global_step", "samples_seen", "tokenizer_hash"):
        assert found[key] == alone[key], key
    assert found["hyper_parameters"] == alone["hyper_parameters"]
    # AdamW's first steps have the size of `lr`, 1e-3, in the direction of a sign.
    assert_close(found["state_dict"], alone["state_dict"], 3e-5)
    states = [checkpoint["callbacks"]["ema"] for checkpoint in (found, alone)]
    assert states[0]["num_updates"] == states[1]["num_updates"] == STEPS
    assert_close(states[0]["shadows"], states[1]["shadows"], 3e-5)
    for moments, expected in zip(moments_of(found), moments_of(alone), strict=name not in FOLDERS):
        assert_close(moments, expected, 1e-4 * float(expected["exp_avg"].abs().max()))
    average, last = averaged_state(found), found["state_dict"]
    assert not any(average[n].equal(last[n]) for n in states[0]["shadows"] if n.endswith("weight"))


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_run_that_never_stopped(name, two):
    straight, resumed = two / name, two / f"{name}_resumed"
    for quantity in ("val/loss", "train/grad_norm"):
        later = {step: x for step, x in numbers(straight, quantity).items() if step >= 2}
        assert numbers(resumed, quantity) == pytest.approx(later, rel=1e-6), quantity
    first, second = (read_checkpoint(find_checkpoint(folder)) for folder in (straight, resumed))
    assert_close(second["state_dict"], first["state_dict"], 1e-6)
    averages = [one["callbacks"]["ema"]["shadows"] for one in (second, first)]
    assert_close(*averages, 1e-6)
    assert second["samples_seen"] == first["samples_seen"] == 8 * STEPS


@pytest.mark.parametrize("name", GOES_ON_FROM)
def test_fsdp_goes_on_from_others(name, one, two):
    before = one if GOES_ON_FROM[name] == "one" else two / GOES_ON_FROM[name]
    resumed = two / f"{name}_from_{GOES_ON_FROM[name]}"
    for quantity in ("val/loss", "train/grad_norm"):
        later = {step: x for step, x in numbers(before, quantity).items() if step >= 2}
        assert numbers(resumed, quantity) == pytest.approx(later, rel=2e-5), quantity


@pytest.mark.parametrize("name", HALF)
def test_bfloat16_is_that_of_one_process(name, one, one_half, two):
    """Products in bfloat16, weights, moments and averages in float32."""
    notes = [json.loads((two / name / f"notes_{rank}.json").read_text()) for rank in range(2)]
    alone = json.loads((one_half / "notes_0.json").read_text())
    assert notes == [alone, alone]
    assert alone["weights"] == ["torch.float32"]
    assert "torch.bfloat16" in alone["products"]
    assert alone["peak_tflops"] == 989  # that of bfloat16
    for quantity in ("val/loss", "train/grad_norm"):
        curve = numbers(one_half, quantity)
        assert numbers(two / name, quantity) == pytest.approx(curve, rel=2e-3), quantity
        whole = numbers(one, quantity)
        assert all(curve[step] != pytest.approx(whole[step], rel=1e-6) for step in curve)
    found, alone = (read_checkpoint(find_checkpoint(folder)) for folder in (two / name, one_half))
    # Where a gradient is rounding, AdamW steps by `lr`, 1e-3, either way.
    assert_close(found["state_dict"], alone["state_dict"], 2 * STEPS * 1e-3)
    shadows = [checkpoint["callbacks"]["ema"]["shadows"] for checkpoint in (found, alone)]
    assert all(shadow.dtype == torch.float32 for shadow in shadows[0].values())
    assert_close(*shadows, 2 * STEPS * 1e-3)


# --- drawing, judging, exporting ------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_processes_draw_as_many_as_they_like_with_the_average(name, two, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    from uneven import DRAWINGS, draw

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    module = load_generator(two / name)
    for rank in range(2):
        drawn = torch.load(two / name / f"rank_{rank}.pt", weights_only=True)
        for codes, both in zip(drawn, DRAWINGS, strict=True):
            captions, num_steps = both[rank]
            assert len(codes) == len(captions)
            assert codes.equal(draw(module, captions, num_steps))


@pytest.mark.parametrize("name", ["deepspeed_zero3", "fsdp"])
def test_a_folder_is_judged_as_it_was_in_training(name, two, digits, tokenizer_run, tmp_path):
    """By the strategy that wrote it, and by one process without it."""
    trained = numbers(two / name, "val/loss")[STEPS - 1]
    assert list(numbers(two / f"{name}_judged", "val/loss").values()) == pytest.approx([trained])
    file = run(tmp_path, digits, tokenizer_run, devices=1)
    call_grn("validate", "-c", file, "--ckpt_path", find_checkpoint(two / name))
    assert list(numbers(tmp_path, "val/loss").values()) == pytest.approx([trained])


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_exported(name, two, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    checkpoint = find_checkpoint(two / name)
    assert layout_of(checkpoint) == ("fsdp" if name == "fsdp" else "zero")
    call_grn("export", checkpoint, "--out", tmp_path / "net")
    exported = read_pretrained(tmp_path / "net").tensors
    assert tensors_equal(dict(exported), averaged_state(read_checkpoint(checkpoint)))


def test_samples_and_judgements_take_a_folder(two, digits, tmp_path):
    """Drawn and judged from the folder of two processes, and from the file of the same weights."""
    figures, frames = {}, {}
    for name in ("fsdp", "fsdp_full"):
        checkpoint, out = find_checkpoint(two / name), tmp_path / name
        options = ("--refine.num_steps", 2, "--device", "cpu")
        call_grn("sample", checkpoint, "--prompts", '["the digit one"]', "--out", out, *options)
        with Image.open(sorted(out.rglob("*.gif"))[0]) as film:
            shown = ImageSequence.all_frames(film)
            frames[name] = [frame.convert("RGB").tobytes() for frame in shown]
        report = call_grn("evaluate", checkpoint, digits / "clips", *options)
        figures[name] = [one for one in report.figures if not one.name.startswith("seconds")]
    assert len(frames["fsdp"]) > 1
    assert frames["fsdp"] == frames["fsdp_full"]
    assert figures["fsdp"]
    assert figures["fsdp"] == figures["fsdp_full"]


# --- refusals -------------------------------------------------------------------------------------


def test_zero_goes_on_only_as_it_was_divided(two, digits, tokenizer_run, tmp_path, capsys):
    middle = two / "deepspeed_zero2" / "checkpoints" / "step=2.ckpt"
    assert zero_facts(middle).stage == 2
    assert zero_facts(middle).world_size == 2
    refusals = {
        "deepspeed_zero2": "is divided among 2 processes, and 1 are running",
        "fsdp": "was written by deepspeed_zero2|was written by DeepSpeed",
        "auto": "cannot go on from its parts|was written by deepspeed_zero2",
    }
    for strategy, sentence in refusals.items():
        file = run(tmp_path / strategy, digits, tokenizer_run, devices=1, strategy=strategy)
        with pytest.raises(SystemExit):
            call_grn("fit", "-c", file, "--ckpt_path", middle)
        assert re.search(sentence, capsys.readouterr().err), strategy


def test_a_folder_without_a_part_is_refused(two, tmp_path):
    for name, part in (("deepspeed_zero3", "*_rank_1_*_optim_states.pt"), ("fsdp", "*1_0.distcp")):
        copy = shutil.copytree(find_checkpoint(two / name), tmp_path / name)
        [missing] = copy.rglob(part)
        missing.unlink()
        with pytest.raises(ValueError, match=rf"no whole checkpoint: missing \['{missing.name}'\]"):
            read_checkpoint(copy)
