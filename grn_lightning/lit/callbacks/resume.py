"""What every process of a training that goes on has to agree on, and the settings it keeps."""

from pathlib import Path

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from grn_lightning.lit.resume import Start, free_name, make_ready
from grn_lightning.lit.saving import save_files_whole


class SameStart(L.Callback):
    """Write checkpoint files whole, and go on from one checkpoint on all processes.

    Every process looks for it by itself, before it can talk to the others, but only the first one
    reads all bytes: what it takes is what all of them take.
    """

    def __init__(self) -> None:
        self.start: Start | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the checkpoint of the first process, which then makes the folder ready.

        Raises:
            ValueError: On all processes, if one of them does not see it.
        """
        save_files_whole(trainer)
        mine = None if self.start is None else str(self.start.path)
        first = trainer.strategy.broadcast(mine)
        was = trainer.strategy.broadcast(None if self.start is None else str(self.start.saved.path))
        is_seen = first == mine or (was is not None and Path(was).exists())
        if not trainer.strategy.reduce_boolean_decision(is_seen, all=True):
            raise ValueError(
                f"`resume`: the processes see different checkpoints, the first one {first!r}, this "
                f"one {mine!r}: the file system shows folders late. Start again, or give the "
                "checkpoint by `--resume PATH`."
            )
        if first is not None and first != mine:
            _restore_instead(trainer, first)
        if self.start is not None and trainer.is_global_zero:
            make_ready(self.start)
        trainer.strategy.barrier("resume")


def _restore_instead(trainer: L.Trainer, path: str) -> None:
    """Let Lightning restore another checkpoint than the one that `fit` was called with."""
    connector = trainer._checkpoint_connector
    restore = connector.resume_start
    connector.resume_start = lambda _=None, **rest: restore(path, **rest)  # type: ignore[method-assign]


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
