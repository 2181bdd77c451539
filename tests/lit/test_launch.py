"""The documented launch on several nodes, rehearsed: two nodes of one process each, here."""

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from grn_lightning.lit.checkpoints import read_checkpoint
from tests.tiny_runs import checkpoints, generator_config, kill, source, start_grn, write_yaml

pytestmark = pytest.mark.scale

PAGE = Path(__file__).parents[2] / "docs" / "launch.md"
PATIENCE_SECONDS = 240
BETA = 0.9


def blocks(language: str) -> list[str]:
    """Return the blocks of the page that are in a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def rehearsal() -> list[str]:
    """Return the words of the command that the page offers to be tried at home."""
    (command,) = [block for block in blocks("bash") if "localhost" in block]
    return shlex.split(command.replace("\\\n", " "))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_tiny_digits(words: list[str], config: Path) -> list[str]:
    """Change nothing in a command but its experiment, its length and its port."""
    start, end = words.index("-c"), len(words) - words[::-1].index("-c") + 1
    words = [*words[:start], "-c", str(config), *words[end:]]
    words = [word for word in words if not word.startswith("--trainer.max_steps")]
    return [word.replace("29400", str(free_port())) for word in words]


def start_node(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def tiny_config(folder: Path, digits: Path, tokenizer: Path, *, batch_size: int) -> Path:
    config = generator_config(
        folder,
        digits,
        tokenizer,
        kind="class",
        sources=[source(digits, "image", batch_size)],
        init_args={"optim": {"name": "adamw", "lr": 1e-4, "betas": [BETA, BETA]}},
        callbacks=[checkpoints(folder, 1)],
        trainer={"max_steps": 1, "limit_val_batches": 0},
    )
    return write_yaml(folder, config)


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        kill(process)


def gradients(folder: Path) -> dict[int, torch.Tensor]:
    """Gradients of the first step, which AdamW's first moments are multiples of."""
    (optimizer,) = read_checkpoint(folder / "checkpoints" / "last.ckpt")["optimizer_states"]
    return {name: state["exp_avg"] / (1 - BETA) for name, state in optimizer["state"].items()}


def test_two_nodes_take_the_step_of_one_process(
    digits: Path, tokenizer_run: Path, tmp_path: Path, processes: list[Any]
) -> None:
    folders = {name: tmp_path / name for name in ("alone", "together")}
    for folder, size in zip(folders.values(), (8, 4), strict=True):
        tiny_config(folder, digits, tokenizer_run, batch_size=size)
    alone, together = folders.values()
    words = on_tiny_digits(rehearsal(), together / "run.yaml")
    assert words[0] == "torchrun"
    logs = [tmp_path / "node0.txt", tmp_path / "node1.txt", tmp_path / "alone.txt"]
    processes += [start_node(words[1:], log) for log in logs[:2]]
    processes.append(start_grn("fit", "-c", alone / "run.yaml", log=logs[2]))
    for process, log in zip(processes, logs, strict=True):
        assert process.wait(PATIENCE_SECONDS) == 0, log.read_text()

    texts = [log.read_text() for log in logs]
    members = {text.partition("MEMBER: ")[2][:3] for text in texts[:2]}
    assert members == {"1/2", "2/2"}
    # The same samples in the same order, and the same gradients of the joined batch.
    (joined,) = {key for text in texts[:2] for key in re.findall(r"key hash (\w+)", text)}
    assert re.findall(r"key hash (\w+)", texts[2]) == [joined]
    expected, found = gradients(alone), gradients(together)
    assert sum(float(gradient.abs().sum()) for gradient in expected.values()) > 0.1
    for name, gradient in expected.items():
        scale = float(gradient.abs().max()) + 1e-4
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * scale)
