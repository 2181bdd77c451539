"""Tiny stages of coarse-to-fine prediction, on a codebook and on bits."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from grn_lightning.lit.coarse_to_fine import LitFine, LitRaster
from tests.official_files import random_state
from tests.tiny_runs import call_grn, callback, checkpoints, fit, logger

# 16 x 16 pixels become 2 x 2 positions of one code out of 16.
VQ = {
    "codebook_size": 16,
    "codebook_dim": 3,
    "width": 32,
    "width_multipliers": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "feature_width": 8,
}
BACKBONE = {"depth": 1, "width": 32, "num_heads": 2, "mlp_width": 32, "dropout": 0.0}


class Chain(NamedTuple):
    """Folders of one run each, and of what lies between them."""

    tokenizer: Path
    codes: Path
    clusters: Path
    baseline: Path
    raster: Path
    fine: Path
    hbq_raster: Path
    captioned: Path


def train(folder: Path, config: dict[str, Any]) -> Path:
    config["trainer"]["logger"] = logger("TensorBoardLogger", folder)
    config["trainer"]["callbacks"] = [callback("EMA", decay=0.5), checkpoints(folder, 3)]
    config["trainer"]["max_steps"] = 3
    fit(folder, config)
    return folder


def stage_options(tokenizer: Path, **rest: Any) -> dict[str, Any]:
    plain = {"backbone": BACKBONE, "tokenizer": str(tokenizer), "grid_size": [2, 2]}
    return {**plain, "num_classes": 10, **rest}


def store(folder: Path, kind: type[LitRaster | LitFine], tokenizer: Path, **rest: Any) -> Path:
    """Write the checkpoint of a stage with random weights, as Lightning does."""
    module = kind(**stage_options(tokenizer, **rest))
    module.configure_model()
    module.load_state_dict(random_state(module))
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(checkpoint)
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return folder


def draw(chain: Chain, out: Path, *args: Any) -> Any:
    """Give `grn sample` both stages."""
    stages = (chain.raster, "--fine", chain.fine)
    return call_grn("sample", *stages, "--out", out, "--device", "cpu", *args)
