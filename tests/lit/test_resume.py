"""A run that is killed and resumed is, bit for bit, the run that was not."""

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grn_lightning.lit.checkpoints import EMA_STATE, read_checkpoint
from tests.tiny_runs import (
    callback,
    checkpoints,
    fit,
    generator_config,
    kill,
    logged,
    start_grn,
    tensors_equal,
    tokenizer_config,
    write_yaml,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # a folder for each run
]

STAGES = ("tokenizer", "class", "text")
GAME = {  # of both discriminators, with everything that has a state
    "image": {"width": 4, "num_layers": 1, "kind": "spectral"},
    "video": {"width": 4, "num_layers": 1},
    "is_adaptive": True,
    "lecam": 0.1,
    "start_samples": 8,
    "ramp_samples": 16,
    "optim": {"lr": 1e-3},
}
SAVED, LAST = 4, 8  # the step that is resumed from, and the last one
PATIENCE_SECONDS = 120


def stage_config(
    stage: str, folder: Path, digits: Path, tokenizer: Path, *, max_steps: int
) -> dict[str, Any]:
    """A run with all that is random in a stage: order, noise, dropped conditions, dropout."""
    common: dict[str, Any] = {
        "callbacks": [callback("EMA", decay=0.9), checkpoints(folder, SAVED)],
        "trainer": {"max_steps": max_steps},
    }
    if stage != "tokenizer":
        common["trainer"]["gradient_clip_val"] = 1.0
    dropout = {"attention_dropout": 0.2, "projection_dropout": 0.2} if stage == "class" else {}
    noise = {"corruption": {"condition_dropout": 0.5}, "cache_codes": True}
    config = (
        tokenizer_config(folder, digits, init_args={"adversarial": GAME}, **common)
        if stage == "tokenizer"
        else generator_config(
            folder, digits, tokenizer, kind=stage, generator=dropout, init_args=noise, **common
        )
    )
    config["trainer"]["logger"]["init_args"]["flush_logs_every_n_steps"] = 1
    return config


@pytest.fixture(scope="module")
def doomed(
    digits: Path, tokenizer_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Path, subprocess.Popen[bytes]]]]:
    """Endless runs of all stages, each a process of its own; they start at the same time."""
    runs = {}
    for stage in STAGES:
        folder = tmp_path_factory.mktemp(f"killed_{stage}")
        config = stage_config(stage, folder, digits, tokenizer_run, max_steps=1_000_000)
        process = start_grn("fit", "-c", write_yaml(folder, config), log=folder / "output.txt")
        runs[stage] = (folder, process)
    yield runs
    for _, process in runs.values():
        kill(process)


def kill_later(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Kill a run some steps after it has written the checkpoint to be resumed from."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    later = folder / "checkpoints" / f"step={LAST}.ckpt"
    while not later.exists():
        assert process.poll() is None, (folder / "output.txt").read_text()
        assert time.monotonic() < deadline, (folder / "output.txt").read_text()
        time.sleep(0.05)
    kill(process)
    assert process.returncode == -signal.SIGKILL


def assert_same_end(first: Path, second: Path) -> None:
    """Weights, averages and moments of the last step are bitwise equal."""
    one, two = (read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (first, second))
    assert one["global_step"] == two["global_step"] == LAST
    assert one["samples_seen"] == two["samples_seen"]
    assert tensors_equal(one["state_dict"], two["state_dict"])
    averages = [checkpoint["callbacks"][EMA_STATE] for checkpoint in (one, two)]
    assert averages[0]["num_updates"] == averages[1]["num_updates"] == LAST
    assert tensors_equal(averages[0]["shadows"], averages[1]["shadows"])
    assert len(one["optimizer_states"]) == len(two["optimizer_states"])
    for optimizers in zip(one["optimizer_states"], two["optimizer_states"], strict=True):
        moments = [optimizer["state"] for optimizer in optimizers]
        assert moments[0]
        assert all(tensors_equal(moments[0][index], moments[1][index]) for index in moments[0])


@pytest.mark.scale
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_and_resumed_run_is_the_run_that_was_not(
    stage, doomed, digits, tokenizer_run, tmp_path
):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    fit(straight, stage_config(stage, straight, digits, tokenizer_run, max_steps=LAST))
    killed, process = doomed[stage]
    kill_later(killed, process)
    config = stage_config(stage, resumed, digits, tokenizer_run, max_steps=LAST)
    fit(resumed, config, f"--ckpt_path={killed / 'checkpoints' / f'step={SAVED}.ckpt'}")

    for quantity in ("train/loss", "train/grad_norm"):
        expected = logged(straight, quantity)
        assert len(set(expected.values())) == len(expected) == LAST
        before, after = ({s: v for s, v in expected.items() if (s < SAVED) == b} for b in (1, 0))
        assert logged(resumed, quantity) == after
        assert {s: v for s, v in logged(killed, quantity).items() if s < SAVED} == before
    assert_same_end(straight, resumed)
    if stage == "tokenizer":
        state = read_checkpoint(straight / "checkpoints" / "last.ckpt")["state_dict"]
        assert {"adversary.averages"} < {n for n in state if n.startswith("adversary.")}
        both = [logged(folder, "gan/loss_video") for folder in (straight, resumed)]
        # A run begins to repeat the value of clips with its first clip.
        assert {s: v for s, v in both[0].items() if s > SAVED} == {
            s: v for s, v in both[1].items() if s > SAVED
        }


@pytest.mark.scale
def test_what_a_kill_leaves_behind_can_be_read(doomed):
    """Checkpoints are written whole or not at all."""
    for folder, process in doomed.values():
        kill(process)
        for file in (folder / "checkpoints").glob("*.ckpt"):
            assert read_checkpoint(file)["samples_seen"] > 0


def test_the_command_line_beats_the_checkpoint(digits, tokenizer_run, tmp_path):
    """Neither its hyper-parameters nor its optimizer's settings win over what is asked for now."""
    file = tokenizer_run / "checkpoints" / "last.ckpt"
    before = read_checkpoint(file)
    config = tokenizer_config(
        tmp_path,
        digits,
        callbacks=[callback("EMA", decay=0.9), checkpoints(tmp_path, 4)],
        trainer={"max_steps": before["global_step"] + 4},
    )
    overrides = ["--model.init_args.optim.lr=0.0007", "--model.optim.weight_decay=0.125"]
    trainer = fit(
        tmp_path, config, f"--ckpt_path={tokenizer_run}", *overrides, "--model.loss.l1=0.5"
    )
    groups = trainer.optimizers[0].param_groups
    assert [group["lr"] for group in groups] == [0.02, 0.0007]  # of matrices, and of the rest
    assert [group["weight_decay"] for group in groups] == [0.125, 0]
    after = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert before["hyper_parameters"]["optim"]["lr"] == 3e-3
    assert after["hyper_parameters"]["optim"]["lr"] == 0.0007
    assert after["hyper_parameters"]["loss"]["l1"] == 0.5
    assert after["global_step"] == before["global_step"] + 4
