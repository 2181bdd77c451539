"""What every process of a training that goes on has to agree on, and the settings it keeps."""

from pathlib import Path

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from grn_lightning.lit.resume import free_name
from grn_lightning.lit.saving import save_files_whole


class SameStart(L.Callback):
    """Write checkpoint files whole, and refuse to begin at different ones on different processes.

    Every process looks for the checkpoint by itself, before it can talk to the others. On a file
    system that shows a folder late to one of them they might find different ones.
    """

    def __init__(self) -> None:
        self.ckpt_path: str | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compare with the first process.

        Raises:
            ValueError: On all processes, if one has found another checkpoint.
        """
        save_files_whole(trainer)
        first = trainer.strategy.broadcast(self.ckpt_path)
        if not trainer.strategy.reduce_boolean_decision(first == self.ckpt_path, all=True):
            raise ValueError(
                f"`resume`: the processes see different checkpoints, the first one {first!r}, this "
                f"one {self.ckpt_path!r}: the file system shows folders late. Start again, or give "
                "the checkpoint by `--resume PATH`."
            )


class SaveSettings(SaveConfigCallback):
    """Lightning's `config.yaml`; a run that goes on keeps the one before as `config-1.yaml`, ..."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save the settings, unless they are what they were."""
        goes_on = self.config.get("resume") not in (None, "none")
        if goes_on and not self.already_saved:
            path = Path(trainer.log_dir or ".") / self.config_filename
            if trainer.is_global_zero and path.is_file():
                text = self.parser.dump(self.config, skip_none=False)
                if path.read_text() == text:
                    self.already_saved = True
                else:
                    path.rename(free_name(path))
            self.already_saved = trainer.strategy.broadcast(self.already_saved)
        super().setup(trainer, pl_module, stage)
