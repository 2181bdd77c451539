"""A callback for `in_turn.py`: every process draws another number of samples, in other steps."""

from pathlib import Path
from typing import Any

import lightning as L
import torch

from grn_lightning.samplers import RefineConfig

GRID = (3, 2, 2)
# Captions and steps of process 0 and of process 1, two times.
DRAWINGS = (
    ((["the digit seven moves left", "the digit two moves up"], 2), (["the digit one"], 5)),
    ((["the digit one"], 4), (["the digit two moves up"], 2)),
)


def draw(module: Any, captions: list[str], num_steps: int) -> torch.Tensor:
    """Draw codes with guidance."""
    config = RefineConfig(num_steps=num_steps, guidance_scale=2.0)
    index = torch.arange(len(captions))
    condition = module.condition({"captions": captions})
    return module.sample(condition, index, grid=GRID, config=config, seed=5).codes


class UnevenDraws(L.Callback):
    """Write `rank_N.pt` at the end of every validation."""

    def __init__(self, folder: str):
        self.folder = Path(folder)

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw with what is in place: the average."""
        drawn = [draw(pl_module, *two[trainer.global_rank]) for two in DRAWINGS]
        torch.save(drawn, self.folder / f"rank_{trainer.global_rank}.pt")
