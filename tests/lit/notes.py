"""A callback for `in_turn.py`: every process writes down in what it computes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import lightning as L
import torch

from grn_lightning.lit import devices
from grn_lightning.lit.callbacks import Throughput


class Notes(L.Callback):
    """Write `notes_N.json` at the end of the training."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.products = set[str]()

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Watch the products of the network."""
        for layer in pl_module.generator.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_hook(lambda *given: self.products.add(str(given[-1].dtype)))

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Tell the types, and which of an H100's rates utilization would be a share of."""
        module: Any = SimpleNamespace(device=torch.device("cuda", 0))
        with patch.object(devices.torch.cuda, "get_device_name", lambda _: "NVIDIA H100"):
            peak = Throughput()._peak(trainer, module)
        found = {
            "weights": sorted({str(p.dtype) for p in pl_module.generator.parameters()}),
            "products": sorted(self.products),
            "peak_tflops": peak,
        }
        (self.folder / f"notes_{trainer.global_rank}.json").write_text(json.dumps(found))
