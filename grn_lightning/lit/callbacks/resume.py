"""What every process of a training that goes on has to agree on, and the settings it keeps."""

from pathlib import Path

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from grn_lightning.lit.examine import Saved
from grn_lightning.lit.resume import finish_save, free_name
from grn_lightning.lit.saving import save_files_whole


class SameStart(L.Callback):
    """Write checkpoint files whole, and go on from one checkpoint on all processes.

    Every process looks for it by itself, before it can talk to the others. On a file system that
    shows a folder late to one of them they might find different ones.
    """

    def __init__(self) -> None:
        self.saved: Saved | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compare with the first process, which then finishes what a killed save has left.

        Raises:
            ValueError: On all processes, if one has found another checkpoint.
        """
        save_files_whole(trainer)
        mine = None if self.saved is None else str(self.saved.path)
        first = trainer.strategy.broadcast(mine)
        if not trainer.strategy.reduce_boolean_decision(first == mine, all=True):
            raise ValueError(
                f"`resume`: the processes see different checkpoints, the first one {first!r}, this "
                f"one {mine!r}: the file system shows folders late. Start again, or give the "
                "checkpoint by `--resume PATH`."
            )
        if self.saved is not None and trainer.is_global_zero:
            finish_save(self.saved)
        trainer.strategy.barrier("resume")


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
