"""Samples of coarse-to-fine prediction, or of its plain baseline, as a plan of all that decides."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch

from grn_lightning.lit.loading import open_coarse_to_fine
from grn_lightning.pipelines.coarse_to_fine import CoarseToFinePipeline
from grn_lightning.pipelines.recipes import StageRecipe, check_weights
from grn_lightning.samplers.coarse_to_fine import CoarseToFineConfig
from grn_lightning.scripts.draw_plan import DrawOptions, SamplePlan
from grn_lightning.scripts.drawing import DrawnPart, decoded, seconds_on
from grn_lightning.scripts.runs import ClipSize


@dataclass(frozen=True)
class StagePlan(SamplePlan):
    """Which stages draw how; what the samples show is said sample by sample."""

    stages: tuple[str, str | None]
    """Stage 1 or the plain baseline, and stage 2: runs, checkpoints or exports."""
    tokenizer: str | None
    """Where the tokenizer lies, if not where it lay in training."""
    hashes: dict[str, str]
    """Hashes of the weights of all parts."""
    draw_config: CoarseToFineConfig
    """How labels are drawn."""
    pixels: ClipSize
    """Size of the samples."""
    seed: int
    """Seed of all draws."""
    batch_size: int
    """Samples drawn at a time."""
    device: str
    """Type of the device."""

    @classmethod
    def make(
        cls,
        pipeline: CoarseToFinePipeline,
        stages: tuple[Path, Path | None],
        options: DrawOptions,
        *,
        device: torch.device,
    ) -> Self:
        """Settle what options leave open.

        Args:
            pipeline: Who draws.
            stages: Where stage 1, or the plain baseline, and stage 2 lie.
            options: How.
            device: Where samples will be drawn.
        """
        first, second = stages
        stride = pipeline.tokenizer.config.spatial_stride
        height, width = pipeline.coarse.config.grid_size
        return cls(
            stages=(str(first), None if second is None else str(second)),
            tokenizer=None if options.tokenizer is None else str(options.tokenizer),
            hashes=pipeline.hashes,
            draw_config=options.draw,
            pixels=ClipSize(1, height * stride, width * stride),
            seed=options.seed,
            batch_size=options.batch_size,
            device=device.type,
        )

    @property
    def size(self) -> ClipSize:
        """Size of the samples."""
        return self.pixels

    @property
    def fps(self) -> float:
        """Of clips, which these are not."""
        return 1.0

    @property
    def walk(self) -> tuple[str, ...]:
        """What decides the cost of a sample, for tags."""
        scales = f"scale {self.draw_config.coarse.guidance_scale:g}"
        if self.stages[1] is None:
            return (scales,)
        fine = self.draw_config.fine.guidance_scale
        return "coarse to fine", scales if fine == 1 else f"{scales} and {fine:g}"

    def described(self) -> dict[str, Any]:
        """Return what a record says of the drawing."""
        return {
            "checkpoint": self.stages[0],
            "fine": self.stages[1],
            "weights": self.hashes,
            "seed": self.seed,
            "draw": asdict(self.draw_config),
        }

    def facts(self) -> dict[str, Any]:
        """Return what decides the samples, besides what they are asked to show, as plain data."""
        facts = {
            "weights": self.hashes,
            "seed": self.seed,
            "size": self.pixels,
            "draw": asdict(self.draw_config),
            "batch": self.batch_size,
            "device": self.device,
            "version": version("grn-lightning"),
        }
        return json.loads(json.dumps(facts))

    def open(self, device: torch.device) -> CoarseToFinePipeline:
        """Load the weights.

        Raises:
            ValueError: If they are others by now.
        """
        pipeline = open_coarse_to_fine(*self.stages, tokenizer=self.tokenizer)
        check_weights(self.hashes, pipeline.hashes, where=f"'{self.stages[0]}'")
        return pipeline.to(device)

    def draw(
        self,
        pipeline: Any,
        wanted: Mapping[str, Sequence[Any]],
        numbers: Sequence[int],
        *,
        progress: Callable[[float], None],
        decode: bool = True,
    ) -> Iterator[DrawnPart]:
        """Draw some samples; `progress` is told after every batch."""
        index = torch.tensor(numbers, device=pipeline.device)
        for first in range(0, len(index), self.batch_size):
            rows = range(first, min(first + self.batch_size, len(index)))
            part = slice(rows.start, rows.stop)
            start = seconds_on(pipeline.device)
            condition = pipeline.condition({name: some[part] for name, some in wanted.items()})
            drawn = pipeline.draw_codes(
                condition, index[part], config=self.draw_config, seed=self.seed
            )
            clips = decoded(pipeline, drawn.codes) if decode else None
            yield DrawnPart(
                rows=rows,
                clips=clips,
                elements=drawn.codes,
                num_forwards=drawn.num_rows,
                seconds=seconds_on(pipeline.device) - start,
                num_steps=torch.full((len(rows),), drawn.num_steps),
            )
            progress(float(len(rows)))

    def note_of(self, field: str, value: Any, *, number: int, num_steps: int) -> str:
        """Return the recipe that travels in the file of a sample, for `grn replay`."""
        return StageRecipe(
            checkpoint=self.stages[0],
            fine=self.stages[1],
            tokenizer=self.tokenizer,
            weights=self.hashes,
            condition={field: value},
            sample_index=number,
            seed=self.seed,
            draw=self.draw_config,
            device=self.device,
        ).as_note()

    def shown(self, prompt: str) -> str:
        """Return what the networks read of a prompt: the prompt."""
        return prompt
