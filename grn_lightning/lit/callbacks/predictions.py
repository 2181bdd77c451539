"""Samples of `grn predict` as files, by number: several processes write one set, and resume it."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from grn_lightning.lit.base import require_stage
from grn_lightning.lit.generator import LitGenerator
from grn_lightning.lit.prediction import PredictionPlan
from grn_lightning.lit.tokenizer import Prediction
from grn_lightning.media.images import encode_png, to_uint8
from grn_lightning.media.video import encode_mp4
from grn_lightning.pipelines.recipes import Recipe
from grn_lightning.samplers import RefineConfig

SETTINGS_FILE = "predictions.json"
"""Name of the file that says what the samples of a folder have in common."""


def _put(file: Path, data: bytes) -> None:
    """Write a file that is either whole or not there, whenever the process ends."""
    part = file.with_name(f".{file.name}.part")
    part.write_bytes(data)
    os.replace(part, file)


class WritePredictions(BasePredictionWriter):
    """Write what `grn predict` draws: PNG for pictures, MP4 without loss for clips.

    A file is named by the number of its sample, appears only when it is whole, and carries its
    recipe. Samples whose file is there are not drawn again, so that an interrupted prediction is
    continued by the same command, on any number of processes. A folder takes samples of one kind:
    other weights, steps or seeds are refused.

    Args:
        folder: Where to write to.
        refine: Steps, guidance and temperature.
        samples_per_condition: Samples for every held-out condition.
        num_samples: Stop at this number of samples; null draws for every condition.
        fps: Frames per second of clips.
    """

    def __init__(
        self,
        folder: str,
        refine: RefineConfig | None = None,
        samples_per_condition: int = 1,
        num_samples: int | None = None,
        fps: float = 8.0,
    ):
        super().__init__("batch")
        if samples_per_condition < 1 or (num_samples is not None and num_samples < 1):
            raise ValueError(
                "`samples_per_condition` and `num_samples` must be at least 1, got "
                f"{samples_per_condition} and {num_samples}."
            )
        self.folder, self.fps = Path(folder), fps
        self.refine = refine or RefineConfig()
        self.samples_per_condition, self.num_samples = samples_per_condition, num_samples
        self._hashes: dict[str, str] = {}
        self._checkpoint = ""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a run of another stage."""
        require_stage(self, pl_module, LitGenerator)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look what is there, and tell the module what is missing.

        Raises:
            ValueError: If the folder holds samples of another kind.
        """
        assert isinstance(pl_module, LitGenerator)
        self._hashes = pl_module.pipeline.hashes
        self._checkpoint = str(trainer.ckpt_path or "")
        self._check_settings(pl_module.seed, is_first=trainer.is_global_zero)
        trainer.strategy.barrier()  # nobody draws before the folder has been claimed
        done = {file.stem for kind in ("*.png", "*.mp4") for file in self.folder.glob(kind)}
        pl_module.prediction = PredictionPlan(
            refine=self.refine,
            samples_per_condition=self.samples_per_condition,
            num_samples=self.num_samples,
            is_done=lambda number: self._stem(number) in done,
        )
        trainer.predict_loop.return_predictions = False  # they would all stay in memory

    def _check_settings(self, seed: int, *, is_first: bool) -> None:
        settings = {
            "weights": self._hashes,
            "refine": asdict(self.refine),
            "seed": seed,
            "samples_per_condition": self.samples_per_condition,
            "fps": self.fps,
        }
        settings = json.loads(json.dumps(settings))
        file = self.folder / SETTINGS_FILE
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            differing = [key for key in settings if found.get(key) != settings[key]]
            if differing:
                key = differing[0]
                raise ValueError(
                    f"'{self.folder}' holds samples with {key} {found.get(key)}, these would have "
                    f"{settings[key]}; give another `folder`."
                )
        elif is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            _put(file, (json.dumps(settings, indent=2) + "\n").encode())

    def _stem(self, number: int) -> str:
        return f"{number:07d}"

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the samples of a batch."""
        assert isinstance(prediction, Prediction)
        assert isinstance(pl_module, LitGenerator)
        for row, (number, steps) in enumerate(
            zip(prediction.numbers, prediction.num_steps, strict=True)
        ):
            clip = prediction.clips[row]
            recipe = self._recipe(pl_module, prediction.conditions[row], number, steps, clip)
            self._write(number, to_uint8(clip.cpu()).transpose(0, 1), recipe.as_note())

    def _recipe(
        self, module: LitGenerator, wanted: str | int, number: int, steps: int, clip: Tensor
    ) -> Recipe:
        field: Literal["captions", "class_labels"] = (
            "captions" if module.is_text else "class_labels"
        )
        frames, height, width = clip.shape[1:]
        return Recipe(
            checkpoint=self._checkpoint,
            tokenizer=module.tokenizer_path,
            weights=self._hashes,
            condition={field: wanted},
            sample_index=number,
            seed=module.seed,
            size=(frames, height, width),
            fps=self.fps,
            refine=self.refine,
            num_steps=steps,
            device=module.device.type,
        )

    def _write(self, number: int, clip: Tensor, note: str) -> None:
        stem = self.folder / self._stem(number)
        if len(clip) == 1:
            _put(stem.with_suffix(".png"), encode_png(clip[0], note=note))
        else:
            data = encode_mp4(clip, fps=self.fps, lossless=True, note=note)
            _put(stem.with_suffix(".mp4"), data)
