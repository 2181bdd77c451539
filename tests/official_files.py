"""Files in the layouts of the published checkpoints, with random or stored weights."""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

State = dict[str, Tensor]


def random_state(module: nn.Module, *, seed: int = 0) -> State:
    """Random values for every tensor of a module, gains around 1; no part of it idles."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(x.shape, generator=generator) * 0.1 + (name.endswith(("norm.weight",)))
        for name, x in module.state_dict().items()
    }


def wrap(state: State, layout: str) -> Any:
    """What `torch.save` is given in a published layout; other weights lie beside it."""
    others = {name: x + 1 for name, x in state.items()}
    if layout == "ema":
        return {"vae": others, "ema": state, "epoch": 3}
    if layout == "vae":
        return {"vae": state, "ema": None}
    if layout == "model_ema1":
        named, other = ({f"net.{name}": x for name, x in s.items()} for s in (state, others))
        return {
            "model": other,
            "model_ema1": named,
            "model_ema2": other,
            "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []},
            "epoch": 599,
            "args": argparse.Namespace(model="GRN-B", batch_size=128),
        }
    if layout == "gpt_fsdp":
        trainer = {"config": {}, "gpt_fsdp": state, "gpt_ema_fsdp": None, "gpt_fsdp_opt": None}
        return {"args": {"tlen": 512}, "arch": "GRN2b", "epoch": 0, "iter": 7, "trainer": trainer}
    if layout == "gpt_ema_fsdp":
        return {"trainer": {"config": {}, "gpt_fsdp": others, "gpt_ema_fsdp": state}, "iter": 7}
    if layout == "model":
        return {"model": state, "optimizer": {"state": {}, "param_groups": []}, "steps": 7}
    assert layout == "flat"
    return state


def write_official_file(file: Path, state: State, layout: str) -> Path:
    """Write a checkpoint as its publishers do."""
    torch.save(wrap(state, layout), file)
    return file


class Golden(NamedTuple):
    """Stored weights with inputs and outputs."""

    meta: dict[str, Any]
    """Sizes."""
    weights: State
    """Under their published names."""
    arrays: State
    """Inputs and outputs."""


def read_golden(file: Path) -> Golden:
    """Read stored numbers."""
    with safe_open(file, "pt") as stored:
        arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        meta = json.loads(stored.metadata()["meta"])
    weights = {name: arrays.pop(name) for name in list(arrays) if name.startswith("weights.")}
    return Golden(meta, {name.removeprefix("weights."): x for name, x in weights.items()}, arrays)
