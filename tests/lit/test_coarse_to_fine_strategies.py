"""Stages of coarse-to-fine prediction under each kind of strategy: two processes are one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from grn_lightning.lit.checkpoints import averaged_state, find_checkpoint, read_checkpoint
from grn_lightning.lit.coarse_to_fine import load_coarse_to_fine
from tests.lit.test_strategies import CASES, assert_close, numbers, run_in_turn
from tests.tiny_runs import (
    TINY_ENCODER,
    call_grn,
    callback,
    checkpoints,
    run_config,
    source,
    write_yaml,
)

pytestmark = pytest.mark.scale

STEPS = 4
NAMES = ("ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp")
BACKBONE = {"depth": 2, "width": 32, "num_heads": 2, "mlp_width": 64, "dropout": 0.0}
# A chain over channels is a second transformer; captions bring a tower with them.
STAGES: dict[str, dict[str, Any]] = {
    "LitRaster": {"backbone": BACKBONE | {"channel_depth": 1}},
    "LitFine": {"backbone": BACKBONE},
}


def stage_run(
    folder: Path, digits: Path, tokenizer: Path, role: str, *, devices: int, **rest: Any
) -> Path:
    """Write the settings of a run of 4 updates, eight captioned pictures each."""
    options = {
        "tokenizer": str(tokenizer),
        "grid_size": [2, 2],
        "split": {"coarse_rounds": 1},
        "text_encoder": TINY_ENCODER,
        "condition_dropout": 0.5,
        "optim": {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.95]},
    }
    config = run_config(
        folder,
        model=f"coarse_to_fine.{role}",
        init_args=options | STAGES[role] | rest.pop("init", {}),
        sources=[source(digits, "image", 8 // devices)],
        callbacks=[callback("EMA", decay=0.9), checkpoints(folder, STEPS)],
        trainer={
            "max_steps": STEPS,
            "val_check_interval": 2,
            "gradient_clip_val": 0.5,
            "devices": devices,
            **rest,
        },
    )
    return write_yaml(folder, config)


@pytest.fixture(scope="module")
def runs(digits: Path, tokenizer_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders `ROLE/one` and `ROLE/NAME`."""
    root, calls = tmp_path_factory.mktemp("stages"), []
    for role in STAGES:
        call_grn(
            "fit", "-c", stage_run(root / role / "one", digits, tokenizer_run, role, devices=1)
        )
        for name in NAMES:
            file = stage_run(
                *(root / role / name, digits, tokenizer_run, role),
                devices=2,
                strategy=CASES[name],
                init={"activation_checkpointing": name != "ddp"},  # the same gradients
            )
            calls.append(["fit", "-c", str(file)])
    with run_in_turn(calls, root):
        yield root


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("role", STAGES)
def test_two_processes_learn_what_one_does(role, name, runs):
    one, two = runs / role / "one", runs / role / name
    for quantity in ("val/bits_per_position", "train/grad_norm"):
        expected = numbers(one, quantity)
        assert len(expected) >= STEPS // 2
        assert numbers(two, quantity) == pytest.approx(expected, rel=2e-5), quantity
    first, second = (averaged_state(read_checkpoint(find_checkpoint(f))) for f in (one, two))
    assert_close(second, first, 3e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_their_stages_draw_like_any_other(name, runs):
    """With weights that differ by rounding the labels may too, now and then; logits say it."""
    drawn, known = [], []
    for which in ("one", name):
        stages = load_coarse_to_fine(*(runs / role / which for role in STAGES))
        condition = stages.condition({"captions": ["the digit two", "the digit nine"]})
        drawn.append(stages.draw(condition, torch.arange(2)))
        known.append(stages.coarse(drawn[0].coarse, condition))
    torch.testing.assert_close(*known, rtol=0, atol=1e-3)
    assert (drawn[0].coarse == drawn[1].coarse).float().mean() > 0.8
