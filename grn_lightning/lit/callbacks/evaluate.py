"""Judging samples of the averaged weights during training.

Judges live here and not in the LightningModule, whose checkpoints would swallow their networks.
Each process draws samples for the conditions of its own validation batches, and the sums are
reduced: any number of devices gives the same number.
"""

import hashlib
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from grn_lightning.lit.base import require_stage
from grn_lightning.lit.generator import LitGenerator
from grn_lightning.metrics.digits import DIRECTIONS, DigitJudge
from grn_lightning.metrics.fid import FrechetDistance
from grn_lightning.samplers import RefineConfig


class DigitFeatures(nn.Module):
    """The judge of the embedded set, read from its file, as features for a Frechet distance.

    Args:
        path: The judge that `grn digits` has written beside the set.

    Raises:
        ValueError: If there is none.
    """

    name = DigitJudge.name
    num_features = DigitJudge.num_features

    def __init__(self, path: str = "data/digits/judge.safetensors"):
        super().__init__()
        if not Path(path).is_file():
            raise ValueError(
                f"no judge at '{path}'; `grn digits` writes one beside the embedded set."
            )
        self.judge = DigitJudge.load(Path(path))
        # A judge that was fitted otherwise gives other features under the same name.
        self.network = f"{self.name}-{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]}"

    def forward(self, clips: Tensor) -> Tensor:
        """Return the features of every frame, `(b f, num_features)`."""
        return self.judge(clips)


class EvaluateSamples(L.Callback):
    """Draw a sample for each of the first validation conditions and judge the set.

    Logs `val/fid[NAME]`, the Frechet distance to the same validation samples, where NAME is the
    extractor's; with the features of the digit judge also `val/digit_accuracy` and, for captioned
    clips, `val/direction_accuracy`.

    Args:
        extractor: Features of the distance: `DigitFeatures`, `metrics.InceptionFeatures`, or any
            module that is a `FeatureExtractor`.
        num_samples: Samples over all devices, rounded up to whole validation batches.
        every_n_validations: Judge at every n-th validation only.
        refine: Steps, guidance and temperature.
    """

    def __init__(
        self,
        extractor: nn.Module,
        num_samples: int = 200,
        every_n_validations: int = 1,
        refine: RefineConfig | None = None,
    ):
        if num_samples < 2:
            raise ValueError(f"`num_samples` must be at least 2, got {num_samples}.")
        if every_n_validations < 1:
            raise ValueError(
                f"`every_n_validations` must be at least 1, got {every_n_validations}."
            )
        self.fid = FrechetDistance(extractor, reset_real_features=True)
        self.judge = extractor.judge if isinstance(extractor, DigitFeatures) else None
        self.digit, self.direction = MeanMetric(), MeanMetric()
        self.num_samples = num_samples
        self.every_n_validations = every_n_validations
        self.refine = refine or RefineConfig()
        self._validations = 0
        self._left = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a run of another stage."""
        require_stage(self, pl_module, LitGenerator)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Decide whether this validation is judged, and how many samples this process draws."""
        assert isinstance(pl_module, LitGenerator)
        is_due = self._validations % self.every_n_validations == 0
        self._validations += not trainer.sanity_checking
        self._left = -(-self.num_samples // trainer.world_size) if is_due else 0
        for metric in (self.fid, self.digit, self.direction):
            metric.to(pl_module.device)
            metric.reset()

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw for this batch, while the budget lasts."""
        if self._left <= 0:
            return
        assert isinstance(pl_module, LitGenerator)
        if "clips" not in batch:
            raise ValueError(
                "EvaluateSamples compares samples with pixels, but the validation batches hold "
                "codes; set `path_val` of the source to the shards that they were encoded from."
            )
        real, weights = batch["clips"], batch["weights"]
        self._left -= len(real)
        size = tuple(real.shape[2:])
        drawn = pl_module.draw_clips(
            batch, batch["sample_index"], size=size, config=self.refine, seed=0
        )
        self.fid.update(real, real=True, weights=weights)
        self.fid.update(drawn, real=False, weights=weights)
        if self.judge is not None:
            self._judge(drawn, batch, weights)

    def _judge(self, drawn: Tensor, batch: Any, weights: Tensor) -> None:
        assert self.judge is not None
        if "class_labels" in batch:
            is_right = self.judge.classify(drawn) == batch["class_labels"]
            self.digit.update(is_right.float(), weights)
        words = [caption.split()[-1] for caption in batch.get("captions", [])]
        if drawn.shape[2] > 1 and words and all(word in DIRECTIONS for word in words):
            asked = torch.tensor([DIRECTIONS.index(word) for word in words], device=drawn.device)
            self.direction.update((self.judge.direction(drawn) == asked).float(), weights)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what was judged."""
        if not bool(self.fid.update_called):
            return
        pl_module.log(f"val/{self.fid.tag}", self.fid.compute().float())
        named = {"digit_accuracy": self.digit, "direction_accuracy": self.direction}
        for name, metric in named.items():
            if metric.update_called:
                pl_module.log(f"val/{name}", metric.compute(), prog_bar=True)
