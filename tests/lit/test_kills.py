"""A run that is killed again and again, also while it saves, ends as the run that was not."""

import json
import random
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from grn_lightning.datasets.order import hash_of_places
from grn_lightning.lit.callbacks.keys import STATE
from grn_lightning.lit.checkpoints import EMA_STATE, read_checkpoint
from grn_lightning.lit.data import ShardData, ShardSource
from tests import forked_runs
from tests.tiny_runs import (
    TINY_DIGITS,
    callback,
    source,
    tensors_equal,
    tokenizer_config,
    write_yaml,
)

pytestmark = [pytest.mark.slow, pytest.mark.scale]

LAST_STEP, EVERY, BATCH = 16, 2, 4
EVENTS = 2 * EVERY + 26  # of two steps and the saving of two files
KILLS, KILLS_ELASTIC = 11, 5
KILLED, FINISHED = -signal.SIGKILL, 0


def config(folder: Path, digits: Path, *, processes: int) -> dict[str, Any]:
    """A run of the tokenizer on a batch that does not depend on the number of processes."""
    share = BATCH // processes
    saving = callback("Checkpoint", every_n_train_steps=EVERY, save_top_k=1, save_last=True)
    return tokenizer_config(
        folder,
        digits,
        sources=[source(digits, "image", share), source(digits, "video", share)],
        callbacks=[callback("EMA", decay=0.9), saving],
        trainer={"max_steps": LAST_STEP, "logger": False},
    )


@pytest.fixture(scope="module")
def lives(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of three runs: undisturbed, killed, and killed with one and two processes in turns."""
    folder = tmp_path_factory.mktemp("lives")
    dice = random.Random(0)

    def killed(number: int, processes: tuple[int, ...]) -> list[dict[str, int]]:
        return [
            {"events": dice.randrange(1, EVENTS), "processes": processes[i % len(processes)]}
            for i in range(number)
        ]

    plan = {
        "configs": {
            number: str(
                write_yaml(folder / f"on_{number}", config(folder, digits, processes=number))
            )
            for number in (1, 2)
        },
        "runs": {
            "straight": [{}],
            "killed": [*killed(KILLS, (1,)), {}],
            "elastic": [*killed(KILLS_ELASTIC, (1, 2)), {"processes": 2}],
        },
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    done = subprocess.run(
        [sys.executable, forked_runs.__file__, str(folder / "plan.json")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def outcomes(lives: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((lives / "lives.json").read_text())[name]


def end(lives: Path, name: str) -> dict[str, Any]:
    """The last checkpoint of a run."""
    checkpoint = read_checkpoint(lives / name / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == LAST_STEP
    return checkpoint


@pytest.mark.parametrize("name", ["killed", "elastic"])
def test_no_kill_loses_a_checkpoint(lives, name):
    told = (lives / name / "lives.txt").read_text()
    *killed, last = outcomes(lives, name)
    assert all(KILLED in life["codes"] and FINISHED not in life["codes"] for life in killed), told
    assert set(last["codes"]) == {FINISHED}, told
    steps = [life["step"] for life in killed]
    assert steps == sorted(steps)
    assert all(life["skipped"] == [] for life in killed)  # nothing with a name is half written
    assert any(life["unfinished"] for life in killed)  # some were killed while they saved


def test_a_run_that_was_killed_ends_bit_for_bit_as_the_other(lives):
    straight, killed = end(lives, "straight"), end(lives, "killed")
    assert tensors_equal(straight["state_dict"], killed["state_dict"])
    averages = [one["callbacks"][EMA_STATE]["shadows"] for one in (straight, killed)]
    assert tensors_equal(*averages)
    states = [one["optimizer_states"][0]["state"] for one in (straight, killed)]
    assert states[0].keys() == states[1].keys() != set()
    assert all(tensors_equal(states[0][index], states[1][index]) for index in states[0])
    assert straight[STATE] == killed[STATE]


def test_the_samples_are_the_same_on_any_number_of_processes(lives, digits):
    """No repeats and no holes: the fingerprint is that of the order, read without a training."""
    straight, elastic = end(lives, "straight"), end(lives, "elastic")
    sources = [source(digits, "image", BATCH), source(digits, "video", BATCH)]
    data = ShardData([ShardSource(**one) for one in sources], image_size=TINY_DIGITS.canvas_size)
    data.setup("fit")
    numbers, keys = [], []
    for batch in islice(data.train_dataloader(), LAST_STEP):
        numbers += batch["sample_index"].tolist()
        keys += batch["keys"]
    assert numbers == list(range(LAST_STEP * BATCH))
    expected = {
        "hash": f"{hash_of_places(numbers, keys):016x}",
        "num_samples": LAST_STEP * BATCH,
        "first_sample": 0,
    }
    assert straight[STATE] == elastic[STATE] == expected
    assert straight["samples_seen"] == elastic["samples_seen"] == LAST_STEP * BATCH
