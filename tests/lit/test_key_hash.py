"""The fingerprint of a run tells which samples it has trained on, wherever it was interrupted."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grn_lightning.datasets.order import hash_of_places
from grn_lightning.lit.callbacks import KeyHash
from grn_lightning.lit.callbacks.keys import STATE
from grn_lightning.lit.checkpoints import read_checkpoint
from tests.tiny_runs import checkpoints, fit, tokenizer_config

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")

KEYS = [f"{number:04d}" for number in range(64)]


def batch(numbers: Sequence[int]) -> dict[str, Any]:
    return {"sample_index": torch.tensor(numbers), "keys": [KEYS[number] for number in numbers]}


class Ranks:
    """Several processes whose sums are added by hand."""

    def __init__(self, number: int):
        self.counters = [KeyHash() for _ in range(number)]

    def see(self, *batches: Sequence[int]) -> None:
        for counter, numbers in zip(self.counters, batches, strict=True):
            counter.on_train_batch_end(None, None, None, batch(numbers), 0)  # type: ignore[arg-type]

    def save(self) -> dict[str, Any]:
        """Return what every process stores, which is the same."""
        sent: list[Tensor] = []

        def send(mine: Tensor, reduce_op: str) -> Tensor:
            assert reduce_op == "sum"
            sent.append(mine)
            return mine * 0

        for counter in self.counters:
            counter.join(trainer_that(send))
        total = torch.stack(sent).sum(0)
        states = []
        for counter in self.counters:
            checkpoint: dict[str, Any] = {}
            trainer = trainer_that(lambda mine, reduce_op: total)
            counter.on_save_checkpoint(trainer, None, checkpoint)  # type: ignore[arg-type]
            states.append(checkpoint[STATE])
        assert all(state == states[0] for state in states)
        return states[0]

    def load(self, state: dict[str, Any]) -> "Ranks":
        for counter in self.counters:
            counter.on_load_checkpoint(trainer_that(None), None, {STATE: state})  # type: ignore[arg-type]
        return self


def trainer_that(reduce: Any) -> Any:
    strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=reduce)
    return SimpleNamespace(strategy=strategy, is_global_zero=True)


def test_ranks_and_interruptions_do_not_change_it():
    value = hash_of_places(range(16), KEYS[:16])
    expected = {"hash": f"{value:016x}", "num_samples": 16, "first_sample": 0}
    one = Ranks(1)
    one.see(range(16))
    assert one.save() == expected

    two = Ranks(2)
    two.see(range(4), range(4, 8))
    state = two.save()
    assert (state["num_samples"], state["hash"] != expected["hash"]) == (8, True)
    three = Ranks(1).load(state)
    three.see(range(8, 12))
    assert Ranks(2).load(three.save()).save() == three.save()
    last = Ranks(2).load(three.save())
    last.see(range(12, 14), range(14, 16))
    assert last.save() == expected


def test_sums_beyond_64_bits_wrap_around():
    """Sixty-four values of 64 bits each: halves are added up, which no overflow can hurt."""
    many = Ranks(64)
    many.see(*[[number] for number in range(64)])
    assert many.save()["hash"] == f"{hash_of_places(range(64), KEYS):016x}"


@pytest.mark.parametrize("other", [torch.zeros(3), [1, 2], {"clips": 1}, {"keys": ["a"]}])
def test_batches_of_other_data_are_passed_over(other):
    counter = KeyHash()
    counter.on_train_batch_end(None, None, None, other, 0)  # type: ignore[arg-type]
    checkpoint: dict[str, Any] = {}
    trainer = trainer_that(lambda mine, reduce_op: mine)
    counter.on_save_checkpoint(trainer, None, checkpoint)  # type: ignore[arg-type]
    assert checkpoint == {}


@pytest.mark.scale
def test_a_run_that_was_begun_without_one_begins_one_where_it_goes_on(digits: Path, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    config = tokenizer_config(first, digits, callbacks=[checkpoints(first, 2)])
    fit(first, config)
    saved = {n: read_checkpoint(first / "checkpoints" / f"step={n}.ckpt") for n in (2, 4)}
    assert saved[2][STATE]["num_samples"] == saved[2]["samples_seen"] == 8
    del saved[2][STATE]
    torch.save(saved[2], first / "checkpoints" / "old.ckpt")
    config = tokenizer_config(second, digits, callbacks=[checkpoints(second, 2)])
    fit(second, config, f"--ckpt_path={first / 'checkpoints' / 'old.ckpt'}")
    state = read_checkpoint(second / "checkpoints" / "last.ckpt")[STATE]
    assert (state["num_samples"], state["first_sample"]) == (8, 8)
    whole, begun = int(saved[4][STATE]["hash"], 16), int(state["hash"], 16)
    before = read_checkpoint(first / "checkpoints" / "step=2.ckpt")[STATE]["hash"]
    assert (int(before, 16) + begun) % 2**64 == whole
