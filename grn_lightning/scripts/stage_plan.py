"""Samples of coarse-to-fine prediction, or of its plain baseline, as a plan of all that decides."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from grn_lightning.lit.loading import open_coarse_to_fine
from grn_lightning.pipelines.coarse_to_fine import CoarseToFinePipeline
from grn_lightning.pipelines.recipes import StageRecipe, check_weights
from grn_lightning.scripts.draw_plan import DrawOptions, SamplePlan
from grn_lightning.scripts.drawing import DrawnPart, decoded, seconds_on
from grn_lightning.scripts.runs import ClipSize


@dataclass(frozen=True)
class StagePlan(SamplePlan):
    """Which stages draw how; what the samples show is said sample by sample."""

    recipe: StageRecipe
    """What all samples have in common; its condition is empty."""
    pixels: ClipSize
    """Size of the samples."""
    batch_size: int
    """Samples drawn at a time."""

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
        recipe = StageRecipe(
            checkpoint=str(first),
            fine=None if second is None else str(second),
            tokenizer=None if options.tokenizer is None else str(options.tokenizer),
            weights=pipeline.hashes,
            condition={},
            sample_index=0,
            seed=options.seed,
            draw=options.draw,
            device=device.type,
        )
        return cls(recipe, ClipSize(1, height * stride, width * stride), options.batch_size)

    @property
    def size(self) -> ClipSize:
        """Size of the samples."""
        return self.pixels

    @property
    def walk(self) -> tuple[str, ...]:
        """What decides the cost of a sample, for tags."""
        draw = self.recipe.draw
        scales = f"scale {draw.coarse.guidance_scale:g}"
        if self.recipe.fine is None:
            return (scales,)
        fine = draw.fine.guidance_scale
        return "coarse to fine", scales if fine == 1 else f"{scales} and {fine:g}"

    def rest(self) -> dict[str, Any]:
        """Return the size, of which recipes of stages say nothing: the networks have one."""
        return {"size": self.pixels}

    def open(self, device: torch.device) -> CoarseToFinePipeline:
        """Load the weights.

        Raises:
            ValueError: If they are others by now.
        """
        recipe = self.recipe
        pipeline = open_coarse_to_fine(recipe.checkpoint, recipe.fine, tokenizer=recipe.tokenizer)
        check_weights(recipe.weights, pipeline.hashes, where=f"'{recipe.checkpoint}'")
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
                condition, index[part], config=self.recipe.draw, seed=self.recipe.seed
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
        return replace(self.recipe, condition={field: value}, sample_index=number).as_note()

    def shown(self, prompt: str) -> str:
        """Return what the networks read of a prompt: the prompt."""
        return prompt
