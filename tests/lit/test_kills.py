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
    generator_config,
    source,
    tensors_equal,
    tokenizer_config,
    write_yaml,
)

pytestmark = [pytest.mark.slow, pytest.mark.scale]

LAST_STEP, EVERY, BATCH = 28, 2, 4
EVENTS = 2 * EVERY + 26  # of two steps and the saving of two files
KILLS, KILLS_ELASTIC, KILLS_OTHER = 20, 4, 3
OTHERS = ("packed", "fsdp")
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


def text_config(folder: Path, digits: Path, tokenizer: Path, **rest: Any) -> dict[str, Any]:
    """A run of the generator on clips and pictures."""
    saving = callback("Checkpoint", every_n_train_steps=EVERY, save_top_k=1, save_last=True)
    return generator_config(
        folder,
        digits,
        tokenizer,
        kind="text",
        sources=[source(digits, "video", 4), source(digits, "image", 4, image_size=32)],
        init_args={"corruption": {"condition_dropout": 0.3}},
        callbacks=[callback("EMA", decay=0.9), saving],
        trainer={"max_steps": LAST_STEP, "logger": False, **rest},
    )


def packed_config(folder: Path, digits: Path, tokenizer: Path) -> dict[str, Any]:
    """A run on packs of documents, of which some wait at any time."""
    packed = text_config(folder, digits, tokenizer)
    packed["data"]["class_path"] = "grn_lightning.lit.packed.PackedShardData"
    packed["data"]["init_args"]["token_budget"] = 100
    packed["model"]["init_args"]["corruption"]["i2v_ratio"] = 0.5
    return packed


def killed(dice: random.Random, number: int, **life: Any) -> list[dict[str, Any]]:
    """Lives on one process that end at random places."""
    return [{"events": dice.randrange(1, EVENTS), **life} for _ in range(number)]


@pytest.fixture(scope="module")
def lives(digits: Path, tokenizer_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs, each undisturbed and killed; one is killed on one and two processes."""
    folder = tmp_path_factory.mktemp("lives")
    dice = random.Random(0)
    configs = {
        "1": config(folder, digits, processes=1),
        "2": config(folder, digits, processes=2),
        "packed": packed_config(folder, digits, tokenizer_run),
        "fsdp": text_config(folder, digits, tokenizer_run, strategy="fsdp"),  # writes folders
    }
    runs: dict[str, list[dict[str, Any]]] = {
        "straight": [{}],
        "killed": [*killed(dice, KILLS), {}],
        "elastic": [
            *(
                life | {"processes": 1 + i % 2}
                for i, life in enumerate(killed(dice, KILLS_ELASTIC))
            ),
            {"processes": 2},
        ],
    }
    for name in OTHERS:
        life = {"config": name}
        runs |= {
            f"straight_{name}": [life],
            f"killed_{name}": [*killed(dice, KILLS_OTHER, **life), life],
        }
    files = {name: str(write_yaml(folder / f"on_{name}", one)) for name, one in configs.items()}
    (folder / "plan.json").write_text(json.dumps({"configs": files, "runs": runs}))
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


@pytest.mark.parametrize("name", ["killed", "elastic", *(f"killed_{name}" for name in OTHERS)])
def test_no_kill_loses_a_checkpoint(lives, name):
    told = (lives / name / "lives.txt").read_text()
    *ended, last = outcomes(lives, name)
    assert all(KILLED in life["codes"] and FINISHED not in life["codes"] for life in ended), told
    assert set(last["codes"]) == {FINISHED}, told
    steps = [life["step"] for life in ended]
    assert steps == sorted(steps)
    assert all(life["skipped"] == [] for life in ended)  # nothing with a name is half written
    assert any(life["unfinished"] for life in ended)  # some were killed while they saved


@pytest.mark.parametrize("of", ["", *(f"_{name}" for name in OTHERS)])
def test_a_run_that_was_killed_ends_bit_for_bit_as_the_other(lives, of):
    straight, killed = end(lives, f"straight{of}"), end(lives, f"killed{of}")
    assert tensors_equal(straight["state_dict"], killed["state_dict"])
    averages = [one["callbacks"][EMA_STATE]["shadows"] for one in (straight, killed)]
    assert tensors_equal(*averages)
    assert straight[STATE] == killed[STATE]
    if of == "_fsdp":  # whose moments lie in parts
        return
    states = [one["optimizer_states"][0]["state"] for one in (straight, killed)]
    assert states[0].keys() == states[1].keys() != set()
    assert all(tensors_equal(states[0][index], states[1][index]) for index in states[0])


def test_the_fingerprint_of_packs_counts_every_document(lives):
    checkpoint = end(lives, "killed_packed")
    assert checkpoint[STATE]["num_samples"] == checkpoint["samples_seen"] > LAST_STEP


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
