"""`grn calibrate`: find out how many steps the samples of a trained generator need."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grn_lightning.datasets.shards import ShardSet
from grn_lightning.models.grn_class import GRNClassConfig
from grn_lightning.samplers import RefineConfig, StepBudget, fit_steps, until_decision
from grn_lightning.samplers.calibration import steps_of
from grn_lightning.scripts.calibrated import store_sampling
from grn_lightning.scripts.drawing import conditions_for, draw_parts, step_bar
from grn_lightning.scripts.heldout import open_held_out
from grn_lightning.scripts.opening import AUTO, Opened, open_drawer
from grn_lightning.scripts.records import command_line, environment, now
from grn_lightning.scripts.requests import SizeRequest, as_asked, style_and_task
from grn_lightning.scripts.runs import ClipSize, choose_device

_REFINE = RefineConfig()
_BUDGET = StepBudget()


@dataclass(frozen=True)
class CalibrationReport:
    """The rule that was found, and what it does."""

    file: Path
    """Where it is stored."""
    config: RefineConfig
    """Settings of sampling with the rule."""
    entropies: tuple[float, ...]
    """Entropy of every sample at the decision step, in order."""
    num_steps: tuple[int, ...]
    """Steps that the rule gives to each."""

    def __str__(self) -> str:
        """Tell a person."""
        rule, steps = self.config.adaptive, torch.tensor(self.num_steps)
        assert rule is not None
        low, middle, high = torch.tensor(self.entropies).quantile(torch.tensor([0.05, 0.5, 0.95]))
        tenths = [round(float(steps.double().quantile(q / 10))) for q in range(0, 11, 2)]
        return "\n".join(
            [
                f"{len(steps)} samples: entropy at step {rule.decision_step} is {middle:.4f} "
                f"({low:.4f} to {high:.4f} for nine in ten)",
                f"steps = {rule.decision_step} + clip(round({rule.slope:.4g} H + "
                f"{rule.offset:.4g}), {rule.min_steps - rule.decision_step}, "
                f"{self.config.num_steps - rule.decision_step})",
                f"mean {steps.double().mean():.2f} steps; in order, every fifth sample: {tenths}",
                f"in '{self.file}'; `grn sample` now uses it, `--sampling plain` does not",
            ]
        )


def _captions(data: Path | None, prompts: list[str] | None, size: ClipSize, count: int) -> list:
    """Return the prompts over and over, or the captions of held-out samples."""
    if prompts:
        return [prompts[row % len(prompts)] for row in range(count)]
    if data is None:
        raise ValueError(
            "this generator draws from text: give `--data`, a folder of shards with captions like "
            "those it was trained on, or `--prompts`."
        )
    shards = ShardSet.open(data, "val")
    if "txt" not in shards.fields:
        raise ValueError(f"the shards in '{data}' have no captions (txt).")
    held_out = open_held_out(
        shards,
        split="val",
        size=size,
        fps=None,
        num_samples=min(count, len(shards)),
        batch_size=64,
    )
    captions = [caption for batch in held_out for caption in batch["captions"]]
    return [captions[row % len(captions)] for row in range(count)]


def _wanted(
    opened: Opened, data: Path | None, prompts: list[str] | None, size: ClipSize, count: int
) -> dict[str, list[Any]]:
    """Return one condition for every sample; classes take turns."""
    config = opened.pipeline.generator.config
    if isinstance(config, GRNClassConfig):
        labels = [row % config.num_classes for row in range(count)]
        return conditions_for(opened.pipeline, prompts, labels)
    return {"captions": _captions(data, prompts, size, count)}


def _decision_entropies(
    opened: Opened, asked: dict[str, Any], size: ClipSize, config: RefineConfig, options: dict
) -> Iterator[Tensor]:
    """Yield the entropies at the last step of a walk, a batch at a time."""
    count = options.pop("num_samples")
    with step_bar(count, config, "calibrate") as bar:
        parts = draw_parts(
            opened.pipeline,
            asked,
            torch.arange(count),
            size=size,
            config=config,
            observer=bar,
            decode=False,
            **options,
        )
        yield from (part.entropy[-1].cpu() for part in parts)


def calibrate(
    checkpoint: Path,
    *,
    data: Path | None = None,
    prompts: list[str] | str | None = None,
    steps: StepBudget = _BUDGET,
    num_samples: int = 256,
    sampling: str = AUTO,
    refine: RefineConfig = _REFINE,
    num_frames: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    tokenizer: Path | None = None,
    device: str = "auto",
) -> CalibrationReport:
    """Fit the rule of adaptive steps to a wanted mean number of steps.

    Samples are walked up to the step whose entropy decides. The rule `round(k H + b)` gets the
    slope at which the samples in the middle of the distribution share the steps between the fewest
    and `refine.num_steps`, and the offset at which the mean comes out. It is stored beside the run
    as `sampling.json`, or in the JSON of an export, and `grn sample` finds it there.

    Args:
        checkpoint: Checkpoint of a generator, the folder of its run, or an export.
        data: Shards whose held-out captions are drawn, for a generator of text.
        prompts: Captions to draw instead, in turn.
        steps: The wanted mean and the fewest steps; which step decides.
        num_samples: Samples to measure, numbered from 0.
        sampling: The walk to calibrate by name; "auto" takes that of the weights.
        refine: Its most steps, schedule and so on, where they differ from their defaults.
        num_frames: Frames of a clip; by default as in training.
        image_size: Height and width in pixels, or one number for both; by default as in training.
        seed: Seed of all noise.
        batch_size: Samples at a time.
        tokenizer: Where the tokenizer lies, if not where it lay in training.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: If nothing can be drawn from what is given, or no rule meets the budget.
    """
    given = dict(locals())
    if num_samples < 2 or batch_size < 1:
        raise ValueError(
            "`num_samples` must be at least 2 and `batch_size` at least 1, "
            f"got {num_samples} and {batch_size}."
        )
    opened = open_drawer(checkpoint, None, folder=Path(), tokenizer=tokenizer)
    opened.pipeline.to(choose_device(device))
    size = SizeRequest(None, None, None, num_frames, image_size).resolve(
        opened, fps=8.0, picture=None
    )
    style, task = style_and_task(opened.pipeline, size, has_first_frame=False)
    config = replace(opened.sampling(sampling, refine, task), adaptive=None)
    steps.check(config.num_steps)

    texts = [prompts] if isinstance(prompts, str) else prompts
    wanted = _wanted(opened, data, texts, size, num_samples)
    asked = as_asked(wanted, opened.pipeline, style=style, picture=None, size=size)
    walk = until_decision(config, steps.decision_step)
    options = {"num_samples": num_samples, "seed": seed, "batch_size": batch_size}
    entropies = torch.cat(list(_decision_entropies(opened, asked, size, walk, options)))

    rule = fit_steps(entropies, steps, max_steps=config.num_steps)
    counts = steps_of(rule, entropies, config.num_steps)
    config = replace(config, adaptive=rule)
    calibration = {
        "command": command_line(calibrate, given),
        "date": now(),
        **opened.facts(),
        "wanted": asdict(steps),
        "mean_steps": counts.double().mean().item(),
        "num_samples": num_samples,
        "seed": seed,
        "entropies": [round(value, 6) for value in entropies.tolist()],
        "environment": environment(opened.pipeline.device),
    }
    folder = Path() if opened.run is None else opened.run.folder
    return CalibrationReport(
        file=store_sampling(checkpoint, folder, config, calibration),
        config=config,
        entropies=tuple(entropies.tolist()),
        num_steps=tuple(counts.tolist()),
    )
