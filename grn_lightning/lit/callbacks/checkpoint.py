"""Checkpoints whose last one is the last step's, and that a kill at any moment leaves whole."""

from pathlib import Path
from weakref import proxy

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from grn_lightning.lit.saving import is_local, link, save_files_whole, save_whole


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, and `last.ckpt` once more when training ends.

    Lightning writes nothing at the end if it has written before, so that a run of 1,400 steps that
    saves every 500 would leave its step 1,000: the weights before the rate has decayed.

    Files and folders are written under another name first, `last.ckpt` points to a checkpoint at
    any time, also as a link, and no step is saved whose gradients are still being accumulated: the
    batches in between would be lost.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder, and let the trainer write files whole."""
        self._superseded: list[str] = []
        save_files_whole(trainer)
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with the `last.ckpt` of the run that is continued, instead of beside it.

        What is resumed may be older than the first `last.ckpt`, of which it then knows nothing.
        """
        super().on_train_start(trainer, pl_module)
        folder = Path(self.dirpath or "").absolute()
        goes_on_here = trainer.ckpt_path and Path(trainer.ckpt_path).absolute().parent == folder
        if goes_on_here and not self.last_model_path:
            self.last_model_path = str(folder / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step, unless that was just done."""
        if self.save_last:
            self.save_now(trainer)

    def save_now(self, trainer: L.Trainer) -> Path:
        """Save this step as the last one, unless that was just done; return where it lies.

        To be called on every process.
        """
        if self._last_global_step_saved != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            if self.save_last == "link" and self.save_top_k != 0:
                self._save_checkpoint(trainer, self.format_checkpoint_name(candidates))
            asked, self.save_last = self.save_last, self.save_last or True
            self._save_last_checkpoint(trainer, candidates)
            self.save_last = asked
        return Path(self._last_checkpoint_saved)

    def _should_skip_saving_checkpoint(self, trainer: L.Trainer) -> bool:
        accumulates = trainer.fit_loop.epoch_loop._should_accumulate()
        return accumulates or super()._should_skip_saving_checkpoint(trainer)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        save_whole(trainer, filepath, weights_only=self.save_weights_only)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    @staticmethod
    def _link_checkpoint(trainer: L.Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero and Path(filepath).absolute() != Path(linkpath).absolute():
            link(Path(linkpath), Path(filepath))
        trainer.strategy.barrier()

    def _save_last_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict) -> None:
        """Save or link the last one; only then remove what it has pointed to."""
        super()._save_last_checkpoint(trainer, monitor_candidates)
        superseded, self._superseded = self._superseded, []
        for filepath in superseded:
            super()._remove_checkpoint(trainer, filepath)

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        if self.save_last == "link" and is_local(filepath):
            self._superseded.append(filepath)
        else:
            super()._remove_checkpoint(trainer, filepath)
