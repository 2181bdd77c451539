"""Judging samples of the averaged weights during training.

Judges live here and not in the LightningModule, whose checkpoints would swallow their networks.
Which samples are judged is said by their place in the validation set, and sums are reduced: any
number of devices gives the same number. All of it happens in validations, where the averaged
weights are in place; training steps do not know of it.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MeanMetric

from grn_lightning.datasets.order import ValidationBatchSampler
from grn_lightning.lit.base import require_stage
from grn_lightning.lit.callbacks.due import is_nth_validation
from grn_lightning.lit.generator import LitGenerator
from grn_lightning.metrics import Measurement, ReferenceStatistics
from grn_lightning.metrics.digits import DIRECTIONS, DigitJudge
from grn_lightning.metrics.features import Features, distance_name, protocol_of
from grn_lightning.metrics.generation import GenerationConfig, GenerationMetrics, of_samples
from grn_lightning.metrics.protocols import metric_name
from grn_lightning.samplers import RefineConfig

_SHARDED = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


class DigitFeatures(nn.Module):
    """The judge of the embedded set, read from its file, as features for a Frechet distance.

    Args:
        path: The judge that `grn digits` has written beside the set.

    Raises:
        ValueError: If there is none.
    """

    name = DigitJudge.name
    num_features = DigitJudge.num_features
    num_classes = DigitJudge.num_classes

    def __init__(self, path: str = "data/digits/judge.safetensors"):
        super().__init__()
        if not Path(path).is_file():
            raise ValueError(
                f"no judge at '{path}'; `grn digits` writes one beside the embedded set."
            )
        self.judge = DigitJudge.load(Path(path))
        self.network = self.judge.network

    def forward(self, clips: Tensor) -> Tensor:
        """Return the features of every frame, `(b f, num_features)`."""
        return self.judge(clips)

    def extract(self, clips: Tensor) -> Features:
        """Return features and logits of every frame."""
        return self.judge.extract(clips)


class EvaluateSamples(L.Callback):
    """Draw a sample for each of the first validation conditions and judge the set.

    Logs one number per metric under its protocol, such as `val/FID[digits-cnn,200]`; with the
    features of the digit judge also `val/digit_accuracy` and, for captioned clips,
    `val/direction_accuracy`.

    Args:
        extractor: Features of the distance: `DigitFeatures`, `metrics.InceptionFeatures`, or any
            module that is a `FeatureExtractor`.
        num_samples: Samples over all devices: the first so many of the first validation source,
            whatever the batch size and the number of devices.
        every_n_validations: Judge at every n-th validation only; a resumed training counts on.
        every_n_steps: Judge at validations after multiples of so many steps instead; to be a
            multiple of the trainer's `val_check_interval`.
        refine: Steps, guidance and temperature. Sharded strategies need fixed steps.
        metrics: Some of "fid", "sfid", "is", "kid", "precision" and "recall".
        reference: Statistics to compare with instead of the validation samples: a file of
            `grn evaluate stats`, or an `.npz` of ADM or JiT.
        seed: Seed of the samples' noise.

    Raises:
        ValueError: If settings are out of range, or the reference was made with other features.
    """

    def __init__(
        self,
        extractor: nn.Module,
        num_samples: int = 200,
        every_n_validations: int = 1,
        every_n_steps: int | None = None,
        refine: RefineConfig | None = None,
        metrics: Sequence[str] = ("fid",),
        reference: str | None = None,
        seed: int = 0,
    ):
        for name, value, least in (
            ("num_samples", num_samples, 2),
            ("every_n_validations", every_n_validations, 1),
            ("every_n_steps", every_n_steps, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        self.settings = GenerationConfig(num_samples=num_samples, metrics=tuple(metrics))
        self.extractor = extractor
        self.reference: ReferenceStatistics | None = None
        if reference is not None:
            self.reference = ReferenceStatistics.read(reference, protocol=protocol_of(extractor))
        # Made here as well, so that what does not fit is refused before the training begins.
        self.needs_real = GenerationMetrics(extractor, self.settings, self.reference).needs_real
        self.judge = extractor.judge if isinstance(extractor, DigitFeatures) else None
        self.digit, self.direction = MeanMetric(), MeanMetric()
        self.every_n_validations, self.every_n_steps = every_n_validations, every_n_steps
        self.refine = refine or RefineConfig()
        self.seed = seed
        self.sums: GenerationMetrics | None = None
        self._validations = 0
        self._is_due = False
        self._count = self._batch_size = 0

    # --- what is judged ---------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a run of another stage, and what processes would not do alike.

        Raises:
            ValueError: If steps are adaptive and the strategy is sharded.
        """
        require_stage(self, pl_module, LitGenerator)
        if self.refine.adaptive is not None and isinstance(trainer.strategy, _SHARDED):
            raise ValueError(
                "EvaluateSamples: with weights that are divided among processes all of them must "
                "ask the network equally often, which adaptive steps do not; take `adaptive` out "
                "of `refine`."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn if steps were chosen so that nothing will be judged."""
        every, between = self.every_n_steps, trainer.val_check_interval
        if every is None or not isinstance(between, int) or trainer.max_steps < 0:
            return
        batches_per_step = trainer.accumulate_grad_batches
        batches = range(between, trainer.max_steps * batches_per_step + 1, between)
        if not any(count // batches_per_step % every == 0 for count in batches):
            warnings.warn(
                f"EvaluateSamples: no validation (every {between} batches, until step "
                f"{trainer.max_steps}) falls on a multiple of `every_n_steps`={every}, so nothing "
                "will be judged; take a multiple of the trainer's `val_check_interval`.",
                stacklevel=2,
            )

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Decide whether this validation is judged, and how many samples there will be."""
        assert isinstance(pl_module, LitGenerator)
        self._is_due = self._decide(trainer)
        self.sums = None
        if not self._is_due:
            return
        self.extractor.to(pl_module.device)
        for metric in (self.digit, self.direction):
            metric.to(pl_module.device)
            metric.reset()

    def _decide(self, trainer: L.Trainer) -> bool:
        if trainer.sanity_checking:
            return True  # whatever is wrong should be known before the first step
        if self.every_n_steps is None or trainer.state.fn != TrainerFn.FITTING:
            so_far, self._validations = self._validations, self._validations + 1
            return is_nth_validation(trainer, every=self.every_n_validations, so_far=so_far)
        return trainer.global_step % self.every_n_steps == 0

    def _announce(self, trainer: L.Trainer, batch: Any) -> None:
        """Settle at the first batch how many samples this validation will judge."""
        self._batch_size = len(batch["weights"])
        self._count = self.settings.num_samples
        sampler = getattr(trainer.val_dataloaders, "batch_sampler", None)
        if isinstance(sampler, ValidationBatchSampler):
            is_trial = trainer.sanity_checking
            counts = trainer.num_sanity_val_batches if is_trial else trainer.num_val_batches
            reached = min(counts) * self._batch_size * trainer.world_size
            self._count = int(min(self._count, sampler.num_samples[0], reached))
        frames = _size_of(batch)[0]
        settings = replace(
            self.settings, num_samples=max(2, self._count), frames_per_sample=self._pictures(frames)
        )
        self.sums = GenerationMetrics(self.extractor, settings, self.reference)
        self.sums.to(batch["weights"].device)

    def _pictures(self, frames: int) -> int:
        """Return how many features a clip of so many frames has."""
        return 1 if distance_name(self.extractor) == "fvd" else frames

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
        """Draw for this batch, while there are samples to judge.

        The same batches are drawn on all processes, whole: divided weights are gathered by all.
        """
        if not self._is_due or dataloader_idx > 0:
            return
        assert isinstance(pl_module, LitGenerator)
        if self.needs_real:
            _refuse_codes(batch)
        if batch_idx == 0 or self.sums is None:
            self._announce(trainer, batch)
        assert self.sums is not None
        if batch_idx * self._batch_size * trainer.world_size >= self._count:
            return
        numbers = batch["sample_index"]
        weights = batch["weights"] * (numbers < self._count)
        drawn = pl_module.draw_clips(
            batch, numbers, size=_size_of(batch), config=self.refine, seed=self.seed
        )
        if self.needs_real:
            self.sums.update(batch["clips"], real=True, sample_index=numbers, weights=weights)
        self.sums.update(drawn, real=False, sample_index=numbers, weights=weights)
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

    # --- what is told -----------------------------------------------------------------------------

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what was judged."""
        if not self._is_due or self.sums is None:
            return
        for one in self.measurements():
            pl_module.log(f"val/{one.tag}", one.value)
        left_out = {} if trainer.sanity_checking else self.sums.left_out
        for name, why in left_out.items():
            warnings.warn(f"EvaluateSamples: no {metric_name(name)}: {why}.", stacklevel=2)
        named = {"digit_accuracy": self.digit, "direction_accuracy": self.direction}
        for name, metric in named.items():
            if metric.update_called:
                pl_module.log(f"val/{name}", metric.compute(), prog_bar=True)

    def measurements(self) -> list[Measurement]:
        """Return the numbers of the last validation that was judged; all processes must ask."""
        if self.sums is None:
            return []
        frames = self.sums.config.frames_per_sample
        try:
            found = self.sums.compute()
        except ValueError as error:  # a training must not end because a set was too small
            warnings.warn(f"EvaluateSamples: {error}", stacklevel=2)
            return []
        name = distance_name(self.extractor)
        return [of_samples(one, distance=name, frames_per_sample=frames) for one in found]


def _size_of(batch: Any) -> tuple[int, int, int]:
    """Return frames, height and width of the clips that a batch holds or was encoded from."""
    return tuple(batch.get("clip_size") or batch["clips"].shape[2:])


def _refuse_codes(batch: Any) -> None:
    if "clips" not in batch:
        raise ValueError(
            "EvaluateSamples compares samples with pixels, but the validation batches hold codes; "
            "give it a `reference` (`grn evaluate stats`), or set `path_val` of the source to the "
            "shards that they were encoded from."
        )
