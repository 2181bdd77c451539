"""Fixtures of the whole suite: one thread, one seed, and where the golden numbers lie."""

import inspect
import os
from collections.abc import Callable, Iterator
from functools import wraps
from importlib import import_module
from pathlib import Path

import pytest
import torch

from grn_lightning.cli import TOOLS


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Seed torch before every test; `GRN_TEST_SEED` sets another seed."""
    torch.manual_seed(int(os.environ.get("GRN_TEST_SEED", "0")))
    torch.set_num_threads(1)


_MEETING = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")
_MET_AT = {name: os.environ.get(name) for name in _MEETING}


@pytest.fixture(autouse=True)
def _nobody_waits_for_others() -> Iterator[None]:
    """Leave the group that a strategy has formed in this process, and forget where it met.

    Processes that a later test starts would look for each other at the same port.
    """
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name, value in _MET_AT.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _shared(name: str) -> Path:
    root = Path(os.environ.get("GRN_SHARED", Path(__file__).parents[2] / "shared"))
    if not (root / name).is_dir():
        pytest.skip(f"no folder {name!r} under {root}; point GRN_SHARED at the folder that has it")
    return root / name


@pytest.fixture
def golden() -> Path:
    """Folder of stored outputs of the published architectures (`*.safetensors`)."""
    return _shared("golden")


@pytest.fixture
def media() -> Path:
    """Folder of short real video files (`*.mp4`)."""
    return _shared("media")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tools that were called, in place of what they do."""
    calls: list[str] = []

    def stand_in(tool: Callable[..., object]) -> Callable[..., str]:
        @wraps(tool)
        def call(*args: object, **kwargs: object) -> str:
            inspect.signature(tool).bind(*args, **kwargs)
            calls.append(tool.__name__)
            return "done"

        return call

    for name in (tool.replace(" ", "_") for tool in TOOLS):
        module = import_module(f"grn_lightning.scripts.{name}")
        monkeypatch.setattr(module, name, stand_in(getattr(module, name)))
    return calls
