"""Tiny models on a tiny digits set, trained through the real command line."""

import contextlib
import copy
import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from grn_lightning.cli import main
from grn_lightning.datasets.digits import DigitsConfig

TINY_DIGITS = DigitsConfig(
    canvas_size=16,
    digit_size=8,
    num_frames=5,
    num_train_clips=24,
    num_val_clips=6,
    num_train_images=24,
    num_val_images=6,
    samples_per_shard=10,
)

# 16 x 16 pixels and 5 frames become 3 x 2 x 2 positions of 4 channels with 2 rounds.
TINY_TOKENIZER: dict[str, Any] = {
    "latent_channels": 4,
    "num_rounds": 2,
    "encoder_width": 16,
    "decoder_width": 16,
    "width_multipliers": [1, 1],
    "num_res_blocks": 1,
    "temporal_downsample": [True],
    "patch_size": 4,
}
TINY_CLASS: dict[str, Any] = {
    "num_elements": 8,
    "alphabet_size": 2,
    "grid_size": [2, 2],
    "depth": 4,  # the middle half of the blocks has dropout
    "width": 32,
    "num_heads": 2,
    "bottleneck": 16,
    "num_classes": 10,
    "num_context_tokens": 2,
    "context_start": 1,
}
TINY_TEXT: dict[str, Any] = {
    "num_elements": 8,
    "alphabet_size": 2,
    "text_channels": 16,
    "depth": 2,
    "width": 32,
    "num_heads": 2,
    "mlp_width": 64,
    "blocks_per_chunk": 1,
}
TINY_ENCODER: dict[str, Any] = {"width": 16, "layers": 1, "context_length": 9}


def source(folder: Path, media: str, batch_size: int, **rest: Any) -> dict[str, Any]:
    """One source of the tiny set; `media` is "image" or "video"."""
    frames = {"num_frames": TINY_DIGITS.num_frames} if media == "video" else {}
    where = folder / ("clips" if media == "video" else "images")
    return {"path": str(where), "media": media, "batch_size": batch_size, **frames, **rest}


def run_config(
    folder: Path,
    *,
    model: str,
    init_args: dict[str, Any],
    sources: list[dict[str, Any]],
    callbacks: list[Any] | None = None,
    trainer: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What a YAML under `experiments/` says, for a run that writes to `folder`."""
    config = {
        "seed_everything": 0,
        "model": {"class_path": f"grn_lightning.lit.{model}", "init_args": init_args},
        "data": {
            "class_path": "grn_lightning.lit.data.ShardData",
            "init_args": {
                "sources": sources,
                "image_size": TINY_DIGITS.canvas_size,
                "with_captions": True,
                "with_classes": True,
                "num_classes": 10,
                **(data or {}),
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": -1,
            "max_steps": 4,
            "val_check_interval": 1_000_000,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "use_distributed_sampler": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "logger": logger("CSVLogger", folder),
            "callbacks": callbacks or [],
            **(trainer or {}),
        },
    }
    return copy.deepcopy(config)


def logger(name: str, folder: Path) -> dict[str, Any]:
    """A logger that writes into `folder/log`."""
    rest = {"default_hp_metric": False} if name == "TensorBoardLogger" else {}
    return {
        "class_path": f"lightning.pytorch.loggers.{name}",
        "init_args": {"save_dir": str(folder), "name": "log", "version": "", **rest},
    }


def callback(name: str, **init_args: Any) -> dict[str, Any]:
    """A callback of ours, or Lightning's `ModelCheckpoint`."""
    ours = "lightning.pytorch" if name == "ModelCheckpoint" else "grn_lightning.lit"
    return {"class_path": f"{ours}.callbacks.{name}", "init_args": init_args}


def checkpoints(folder: Path, every: int) -> dict[str, Any]:
    """Keep every so many steps `checkpoints/step=N.ckpt`, and `last.ckpt`."""
    return callback(
        "ModelCheckpoint",
        dirpath=str(folder / "checkpoints"),
        every_n_train_steps=every,
        save_top_k=-1,
        save_last=True,
        filename="{step}",
    )


def write_yaml(folder: Path, config: dict[str, Any]) -> Path:
    """Write a configuration as `run.yaml`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False))
    return path


def call_grn(*args: Any) -> Any:
    """Call `grn ARGS...` in this process; return what the command returns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["grn", *map(str, args)])
        return main()


def fit(folder: Path, config: dict[str, Any], *args: Any) -> L.Trainer:
    """Train through the command line, in this process."""
    return call_grn("fit", "-c", write_yaml(folder, config), *args).trainer


def start_grn(*args: Any, log: Path) -> subprocess.Popen[bytes]:
    """Start `python -m grn_lightning ARGS...` as a process of its own, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment.pop("MASTER_PORT", None)  # of a strategy that was used in this process
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "grn_lightning", *map(str, args)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """End what `start_grn` has started, and the processes that it has started, without warning."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def logged(folder: Path, name: str) -> dict[int, str]:
    """What a CSVLogger wrote of one quantity: its digits, by step."""
    rows = [*csv.reader((folder / "log" / "metrics.csv").read_text().splitlines())]
    column, step = rows[0].index(name), rows[0].index("step")
    whole = [row for row in rows[1:] if len(row) == len(rows[0])]  # the last one may be cut off
    return {int(row[step]): row[column] for row in whole if row[column]}


def tokenizer_config(folder: Path, digits: Path, **rest: Any) -> dict[str, Any]:
    """A run of the tokenizer stage on images and clips in turns."""
    init_args = {
        "tokenizer": TINY_TOKENIZER,
        "optim": {"name": "muon", "lr": 3e-3, "warmup_samples": 16},
        **rest.pop("init_args", {}),
    }
    sources = rest.pop("sources", [source(digits, "image", 4), source(digits, "video", 4)])
    return run_config(
        folder, model="tokenizer.LitTokenizer", init_args=init_args, sources=sources, **rest
    )


def generator_config(
    folder: Path, digits: Path, tokenizer: Path, *, kind: str, **rest: Any
) -> dict[str, Any]:
    """A run of the generator stage; `kind` is "class" (images) or "text" (clips)."""
    network = (TINY_CLASS if kind == "class" else TINY_TEXT) | rest.pop("generator", {})
    init_args = {
        "generator": network,
        **({"text_encoder": TINY_ENCODER} if kind == "text" else {}),
        "tokenizer": str(tokenizer),
        "optim": {"name": "muon", "lr": 3e-3, "warmup_samples": 16},
        **rest.pop("init_args", {}),
    }
    media = "image" if kind == "class" else "video"
    sources = rest.pop("sources", [source(digits, media, 4)])
    return run_config(
        folder, model="generator.LitGenerator", init_args=init_args, sources=sources, **rest
    )


def tensors_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two states are bitwise the same."""
    return first.keys() == second.keys() and all(first[n].equal(second[n]) for n in first)
