"""Two processes take the steps of one process on the joined batch."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grn_lightning.lit.checkpoints import read_checkpoint
from tests.tiny_runs import (
    callback,
    checkpoints,
    fit,
    generator_config,
    kill,
    logged,
    source,
    start_grn,
    tokenizer_config,
    write_yaml,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.scale,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

STAGES = ("tokenizer", "parts", "text")
GAMES = {
    # Batch norms over both processes; and, part by part, norms that know of no batch.
    "tokenizer": {"image": {"width": 4, "num_layers": 1}, "video": {"width": 4, "num_layers": 1}},
    "parts": {"image": {"width": 4, "num_layers": 1, "kind": "spectral"}, "lecam": 0.5},
}
BETAS = (0.5, 0.9)
PATIENCE_SECONDS = 180


def stage_config(
    stage: str, folder: Path, digits: Path, tokenizer: Path, *, batch_size: int
) -> dict[str, Any]:
    """Two steps, the first of which is kept, then validation on all held-out samples."""
    common: dict[str, Any] = {
        "callbacks": [callback("EMA", decay=0.9), checkpoints(folder, 1)],
        "trainer": {"max_steps": 2, "val_check_interval": 2},
    }
    optim = {"name": "adamw", "lr": 1e-4, "betas": list(BETAS)}
    if stage in GAMES:
        sources = [source(digits, "video", batch_size), source(digits, "image", batch_size)]
        init_args = {
            "optim": optim,
            "adversarial": GAMES[stage] | {"optim": optim},
            "procedure": {"micro_batches": 2 if stage == "parts" else 1, "gradient_clip_val": 0},
        }
        return tokenizer_config(folder, digits, sources=sources, init_args=init_args, **common)
    noise = {"optim": optim, "corruption": {"condition_dropout": 0.5}}
    media = "image" if stage == "class" else "video"
    return generator_config(
        folder,
        digits,
        tokenizer,
        kind=stage,
        sources=[source(digits, media, batch_size)],
        init_args=noise,
        **common,
    )


def first_gradients(folder: Path) -> dict[tuple[int, int], Tensor]:
    """AdamW's first moment after one step is `(1 - beta_1)` times the gradient."""
    checkpoint = read_checkpoint(folder / "checkpoints" / "step=1.ckpt")
    return {
        (player, index): entry["exp_avg"] / (1 - BETAS[0])
        for player, optimizer in enumerate(checkpoint["optimizer_states"])
        for index, entry in optimizer["state"].items()
    }


@pytest.fixture(scope="module")
def pairs(
    digits: Path, tokenizer_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Path, subprocess.Popen[bytes]]]]:
    """Runs of both stages on two processes each; they start at the same time."""
    runs = {}
    for stage in STAGES:
        folder = tmp_path_factory.mktemp(f"two_{stage}")
        file = write_yaml(folder, stage_config(stage, folder, digits, tokenizer_run, batch_size=4))
        ddp = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu")
        runs[stage] = (folder, start_grn("fit", "-c", file, *ddp, log=folder / "output.txt"))
    yield runs
    for _, process in runs.values():
        kill(process)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_are_one_on_the_joined_batch(stage, pairs, digits, tokenizer_run, tmp_path):
    one, (two, process) = tmp_path, pairs[stage]
    fit(one, stage_config(stage, one, digits, tokenizer_run, batch_size=8))
    assert process.wait(PATIENCE_SECONDS) == 0, (two / "output.txt").read_text()

    alone, joined = first_gradients(one), first_gradients(two)
    assert alone.keys() == joined.keys()
    assert {player for player, _ in alone} == ({0, 1} if stage in GAMES else {0})
    assert sum(float(gradient.abs().sum()) for gradient in alone.values()) > 0.1
    for index, gradient in alone.items():
        # Sums over eight samples in another order: some units in the last place of the largest.
        # Those of discriminators are differences of sums that nearly cancel.
        scale = float(gradient.abs().max()) + (1e-4 if index[0] == 0 else 0.1)
        torch.testing.assert_close(joined[index], gradient, rtol=0, atol=1e-5 * scale)

    ends = [read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (one, two)]
    assert ends[0]["samples_seen"] == ends[1]["samples_seen"] == 16
    # Held-out samples are divided among the ranks and counted once. AdamW's first steps have the
    # size of `lr` in the direction of the sign, so weights may differ by 2e-4 where it is in doubt.
    for quantity in ("val/psnr", "val/ssim") if stage in GAMES else ("val/loss",):
        values = [float(logged(folder, quantity)[1]) for folder in (one, two)]
        assert values[0] == pytest.approx(values[1], rel=1e-3), quantity
