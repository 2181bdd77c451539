"""Who draws samples for judges: a generator that refines, or coarse-to-fine prediction."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grn_lightning.lit.loading import open_coarse_to_fine
from grn_lightning.models.grn_class import GRNClassConfig
from grn_lightning.scripts.draw_plan import DrawOptions, DrawPlan, SamplePlan
from grn_lightning.scripts.opening import identity, open_drawer
from grn_lightning.scripts.runs import STAGES, TrainedRun, open_run
from grn_lightning.scripts.sample_stages import refuse_unused
from grn_lightning.scripts.stage_plan import StagePlan

_OF_STAGES = ("fine", "draw")
_OF_BOTH = ("tokenizer", "seed", "batch_size", "devices", "device", "weights_folder")


@dataclass(frozen=True)
class Drawer:
    """A plan of samples, and what is known of its origin."""

    plan: SamplePlan
    """All that decides the samples, besides what they show."""
    run: TrainedRun | None
    """What the training says, where there was one here."""
    origin: dict[str, Any]
    """What identifies the weights, for a record."""
    num_classes: int | None
    """Classes that are drawn; None draws from text."""


def plan_samples(checkpoint: Path | None, options: DrawOptions, *, device: torch.device) -> Drawer:
    """Open whatever can draw once, and settle how it does.

    Args:
        checkpoint: Run, checkpoint or export of a generator or of stage 1; None with
            `options.weights`.
        options: How samples are drawn.
        device: Where they will be drawn.

    Raises:
        ValueError: If there is none, or it cannot draw that.
    """
    run = None if checkpoint is None or options.weights is not None else open_run(checkpoint)
    if checkpoint is not None and run is not None and run.stage in STAGES:
        return _plan_stages(checkpoint, run, options, device)
    known = [name for name in vars(options) if name not in _OF_STAGES]
    refuse_unused(vars(options), vars(DrawOptions()), known, what="generators that refine")
    opened = open_drawer(
        checkpoint,
        options.weights,
        folder=options.weights_folder,
        tokenizer=options.tokenizer,
        run=run,
    )
    config = opened.pipeline.config
    return Drawer(
        plan=DrawPlan.make(opened, options, device=device),
        run=opened.run,
        origin=opened.facts(),
        num_classes=config.num_classes if isinstance(config, GRNClassConfig) else None,
    )


def _plan_stages(
    checkpoint: Path, run: TrainedRun, options: DrawOptions, device: torch.device
) -> Drawer:
    refuse_unused(
        vars(options),
        vars(DrawOptions()),
        (*_OF_STAGES, *_OF_BOTH),
        what="coarse-to-fine prediction and its baseline",
    )
    fine = None
    place = None if options.tokenizer is None else str(options.tokenizer)
    pipeline = open_coarse_to_fine(checkpoint, options.fine, tokenizer=place)
    origin = identity(run.checkpoint)
    if options.fine is not None:
        fine = open_run(options.fine).checkpoint
        origin |= {f"fine_{name}": value for name, value in identity(fine).items()}
    return Drawer(
        plan=StagePlan.make(pipeline, (run.checkpoint, fine), options, device=device),
        run=run,
        origin=origin,
        num_classes=None if pipeline.is_text else pipeline.coarse.config.num_classes,
    )
