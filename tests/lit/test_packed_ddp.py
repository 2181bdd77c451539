"""Two processes with a pack each take the steps of one process with both, and one may go on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grn_lightning.datasets.packing import PackedOrder, PackedPosition, PackRequest
from grn_lightning.lit.checkpoints import read_checkpoint
from grn_lightning.lit.packed import PackedShardData
from tests.tiny_runs import (
    checkpoints,
    fit,
    generator_config,
    kill,
    source,
    start_grn,
    write_yaml,
)

pytestmark = [
    pytest.mark.scale,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

BETA = 0.5
STEPS, LAST = 2, 6
PATIENCE_SECONDS = 300


class _JoinedOrder(PackedOrder):
    def batch(self, position: PackedPosition, *, rank: int = 0) -> PackRequest:
        requests = tuple(request for pack in self._step(position)[0] for request in pack)
        return PackRequest(requests, len(requests))


class JoinedPacks(PackedShardData):
    """Gives the packs of two ranks to one."""

    def _packed_order(self) -> PackedOrder:
        order = super()._packed_order()
        return _JoinedOrder(order.stream, self._measure, token_budget=100, num_ranks=2)


def run_config(folder: Path, digits: Path, tokenizer: Path, **rest: Any) -> dict[str, Any]:
    optim = {"name": "adamw", "lr": 1e-4, "betas": [BETA, 0.9]}
    corruption = {"condition_dropout": 0.3, "i2v_ratio": 0.5}
    config = generator_config(
        folder,
        digits,
        tokenizer,
        kind="text",
        sources=[source(digits, "video", 4), source(digits, "image", 4, image_size=32)],
        init_args={"optim": optim, "corruption": corruption},
        callbacks=[checkpoints(folder, 1)],
        trainer={"max_steps": STEPS, **rest},
    )
    config["data"]["class_path"] = "grn_lightning.lit.packed.PackedShardData"
    config["data"]["init_args"]["token_budget"] = 100
    return config


def first_gradients(folder: Path) -> dict[int, Tensor]:
    """AdamW's first moment after one step is `(1 - beta_1)` times the gradient."""
    (optimizer,) = read_checkpoint(folder / "checkpoints" / "step=1.ckpt")["optimizer_states"]
    return {index: entry["exp_avg"] / (1 - BETA) for index, entry in optimizer["state"].items()}


def data_state(folder: Path, name: str = "PackedShardData") -> dict[str, Any]:
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")[name]


def test_two_processes_with_a_pack_each_are_one_with_both(digits, tokenizer_run, tmp_path):
    one, two, after, alone = (tmp_path / name for name in ("one", "two", "after", "alone"))
    ddp = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu")
    file = write_yaml(two, run_config(two, digits, tokenizer_run))
    process = start_grn("fit", "-c", file, *ddp, log=two / "output.txt")
    try:
        joined = run_config(one, digits, tokenizer_run)
        joined["data"]["class_path"] = f"{__name__}.{JoinedPacks.__name__}"
        fit(one, joined)
        assert process.wait(PATIENCE_SECONDS) == 0, (two / "output.txt").read_text()
    finally:
        kill(process)
    expected, found = first_gradients(one), first_gradients(two)
    assert found.keys() == expected.keys()
    for index, gradient in expected.items():
        scale = float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(found[index], gradient, rtol=0, atol=2e-5 * scale)
    assert data_state(two) == data_state(one, "JoinedPacks")

    # What two processes began, one goes on with: the packs that follow, and no other.
    last = two / "checkpoints" / "last.ckpt"
    config = run_config(after, digits, tokenizer_run, max_steps=STEPS + 2)
    fit(after, config, f"--ckpt_path={last}")
    fit(alone, run_config(alone, digits, tokenizer_run, max_steps=LAST))
    states = [data_state(folder) for folder in (after, alone)]
    steps = [state["packs"].pop("steps") for state in states]
    assert steps == [STEPS + 2, LAST]  # 2 x 2 packs and 2, or 6
    assert states[0] == states[1]
