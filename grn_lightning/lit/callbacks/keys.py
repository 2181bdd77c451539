"""A fingerprint of the samples that a run has trained on, each at its place."""

from typing import Any

import lightning as L
import torch

from grn_lightning.datasets.order import HASH_RANGE, hash_of_places
from grn_lightning.lit.preflight import LOG

STATE = "sample_keys"
"""Name of the fingerprint in a checkpoint."""
_HALF = 2**32


class KeyHash(L.Callback):
    """Sum up the running numbers and keys of all samples that were trained on.

    Two runs with equal fingerprints after equally many samples have trained on the same samples at
    the same places, on whatever numbers of processes and with whatever interruptions; see
    `hash_of_places`. Checkpoints hold it as "sample_keys"; it is told when training goes on and
    when it ends. Batches without "keys" and "sample_index" are passed over.
    """

    def __init__(self) -> None:
        self.value = 0
        self.num_samples = 0
        self.first_sample = 0
        self._own_value = 0  # of this process, not yet added to those of the others
        self._own_samples = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note from where on samples are counted, in a run that was begun without."""
        if not self.num_samples:
            self.first_sample = int(getattr(pl_module, "samples_seen", 0))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add the samples of this process."""
        if not isinstance(batch, dict) or not {"keys", "sample_index"} <= batch.keys():
            return
        numbers = batch["sample_index"].tolist()
        self._own_value = (self._own_value + hash_of_places(numbers, batch["keys"])) % HASH_RANGE
        self._own_samples += len(numbers)

    def join(self, trainer: L.Trainer) -> None:
        """Add what all processes have seen; to be called on every one of them."""
        parts = [self._own_value % _HALF, self._own_value // _HALF, self._own_samples]
        mine = torch.tensor(parts, device=trainer.strategy.root_device)
        low, high, samples = trainer.strategy.reduce(mine, reduce_op="sum").tolist()
        self.value = (self.value + low + high * _HALF) % HASH_RANGE
        self.num_samples += samples
        self._own_value = self._own_samples = 0

    def __str__(self) -> str:
        """Say it in a line."""
        return f"{self.num_samples:,} samples with key hash {self.value:016x}"

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell the fingerprint."""
        self.join(trainer)
        if trainer.is_global_zero and self.num_samples:
            LOG.info("has trained on %s.", self)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the fingerprint; every process takes part."""
        self.join(trainer)
        if self.num_samples:
            checkpoint[STATE] = {
                "hash": f"{self.value:016x}",
                "num_samples": self.num_samples,
                "first_sample": self.first_sample,
            }

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from a fingerprint; a checkpoint without one begins one."""
        state = checkpoint.get(STATE)
        if state is not None:
            self.value = int(state["hash"], 16)
            self.num_samples, self.first_sample = state["num_samples"], state["first_sample"]
            if trainer.is_global_zero:
                LOG.info("resume: has trained on %s.", self)
