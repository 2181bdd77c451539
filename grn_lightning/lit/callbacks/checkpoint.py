"""Checkpoints whose last one is the last step's."""

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, and `last.ckpt` once more when training ends.

    Lightning writes nothing at the end if it has written before, so that a run of 1,400 steps that
    saves every 500 would leave its step 1,000: the weights before the rate has decayed.
    """

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step, unless that was just done."""
        if self.save_last and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
