"""Runs that are killed, as cheaply as can be: import and parse once, then fork for every life.

    python tests/forked_runs.py PLAN.json

A plan has files of settings, named by the number of processes they are for or, for one process, in
any other way, and runs: a folder and the lives that follow each other there, with which settings,
on how many processes, and where they end. A life goes on from the newest fit checkpoint, as `grn
fit --resume auto` does. What every life has left behind is written beside the plan as `lives.json`.
"""

import io
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from grn_lightning.cli import _run_trainer
from grn_lightning.lit import saving
from grn_lightning.lit.resume import survey

PATIENCE_SECONDS = 100


def die() -> None:
    """Be killed, as by a machine that goes away."""
    os.kill(os.getpid(), signal.SIGKILL)


class Deadline:
    """Counts what happens in a life, and ends it at the n-th event."""

    def __init__(self, last: int | None):
        self.left = last

    def __call__(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                die()

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function before and after which a life may end."""

        def watched(*args: Any, **settings: Any) -> Any:
            self()
            result = function(*args, **settings)
            self()
            return result

        return watched


def write_haltingly(deadline: Deadline) -> Callable[..., None]:
    """Return a `torch.save` during which a life may end, half of the file written."""
    save = torch.save

    def halting(content: Any, stream: Any) -> None:
        if isinstance(stream, str | Path):
            with Path(stream).open("wb") as file:
                halting(content, file)
            return
        whole = io.BytesIO()
        save(content, whole)
        for part in (whole.getvalue()[: whole.tell() // 2], whole.getvalue()[whole.tell() // 2 :]):
            deadline()
            stream.write(part)
            stream.flush()
        deadline()

    return halting


def live(cli: Any, folder: Path, deadline: Deadline) -> None:
    """Train on from where the last life was saved; saving and stepping are its events."""
    saving.torch.save = write_haltingly(deadline)  # type: ignore[attr-defined]
    for name in ("fsync", "replace", "rename", "unlink", "remove"):
        setattr(os, name, deadline.around(getattr(os, name)))
    cli.model.training_step = deadline.around(cli.model.training_step)
    cli.trainer._default_root_dir = str(folder)
    cli.config_init["fit"] = {"resume": "auto", "ckpt_path": None}
    cli.before_fit()
    path = cli.config_init["fit"]["ckpt_path"]
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=path)


def fork(cli: Any, folder: Path, environment: dict[str, str], last: int | None) -> int:
    """Begin a life in a process of its own; return its number."""
    child = os.fork()
    if child:
        return child
    output = os.open(folder / "lives.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    code = 1
    try:
        live(cli, folder, Deadline(last))
        code = 0
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def one_life(cli: Any, folder: Path, life: dict[str, Any]) -> dict[str, Any]:
    """Let one or two processes train until one of them ends, and look at what they leave behind."""
    ranks = life.get("processes", 1)
    with (folder / "lives.txt").open("a") as text:
        text.write(f"--- {life}\n")
    children = [
        fork(cli, folder, environment, life.get("events") if rank == 0 else None)
        for rank, environment in enumerate(rank_environments(ranks) if ranks > 1 else [{}])
    ]
    end = time.monotonic() + PATIENCE_SECONDS
    codes: dict[int, int] = {}
    while len(codes) < ranks:
        for child in set(children) - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end or any(codes.values()):
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    found = survey(folder)
    return {
        "codes": sorted(codes.values()),
        "step": found.newest.step if found.newest else 0,
        "skipped": [reason for _, reason in found.skipped],
        "unfinished": [path.name for path in folder.rglob(".*.part")],
    }


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """What tells processes of one node about each other."""
    port = str(free_port())
    return [
        {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "NODE_RANK": "0",
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
        }
        for rank in range(ranks)
    ]


def build(config: str, processes: int) -> Any:
    """Parse and instantiate a run, as `grn fit` does."""
    options = ["--resume=auto", f"--trainer.devices={processes}"]
    options += ["--trainer.strategy=ddp"] if processes > 1 else []
    sys.argv = ["grn", "-c", config, *options]
    return _run_trainer(run=False)


def main() -> None:
    """Live all lives of a plan."""
    plan_file = Path(sys.argv[1])
    plan = json.loads(plan_file.read_text())
    torch.set_num_threads(1)
    built = {
        name: build(file, int(name) if name.isdigit() else 1)
        for name, file in plan["configs"].items()
    }
    outcomes: dict[str, list[Any]] = {}
    for name, lives in plan["runs"].items():
        folder = plan_file.parent / name
        folder.mkdir()
        outcomes[name] = [
            one_life(built[life.get("config", str(life.get("processes", 1)))], folder, life)
            for life in lives
        ]
    plan_file.with_name("lives.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
