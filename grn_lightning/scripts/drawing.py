"""Drawing many clips from a trained generator: what it can draw, in parts, with a progress bar."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from grn_lightning.lit.generator import Condition, LitGenerator
from grn_lightning.models.grn_class import GRNClassConfig
from grn_lightning.samplers import ForwardCount, RefineConfig, StepInfo, refine_in_batches
from grn_lightning.scripts.runs import ClipSize, TrainedRun


@dataclass(frozen=True)
class DrawnPart:
    """Some of the clips that were asked for."""

    rows: range
    """Which ones."""
    clips: Tensor
    """`(b, 3, f, h, w)` in [-1, 1], on the generator's device."""
    elements: Tensor
    """`(b, c, *grid)` long: what the generator has drawn, before decoding."""
    num_forwards: ForwardCount
    """Calls of the generator, and rows in them."""
    seconds: float
    """Time for conditions, refinement and decoding."""


def conditions_for(
    module: LitGenerator, prompts: list[str] | None, class_labels: list[int] | None
) -> dict[str, list[Any]]:
    """Return what is asked for, under the name that the generator understands.

    Raises:
        ValueError: If it is something else than this generator draws.
    """
    config = module.generator_config
    if not isinstance(config, GRNClassConfig):
        if class_labels is not None or not prompts:
            raise ValueError(
                "this generator draws from text: give `--prompts` and no `--class_labels`, for "
                "example --prompts '[\"the digit seven moves left\"]'."
            )
        return {"captions": prompts}
    if prompts is not None or not class_labels:
        raise ValueError(
            f"this generator draws {config.num_classes} classes: give `--class_labels` and no "
            "`--prompts`, for example --class_labels '[0, 1]'."
        )
    wrong = [label for label in class_labels if not 0 <= label < config.num_classes]
    if wrong:
        raise ValueError(f"`class_labels` must be in [0, {config.num_classes}), got {wrong}.")
    return {"class_labels": class_labels}


def size_for(
    module: LitGenerator,
    run: TrainedRun,
    source: dict[str, Any],
    *,
    num_frames: int | None,
    image_size: int | tuple[int, int] | None,
) -> ClipSize:
    """Return the size of samples: what is asked for, or else that of a source of the training.

    Raises:
        ValueError: If it is unknown, or another one than the generator or tokenizer can make.
    """
    config, stride = module.generator_config, module.tokenizer.config.spatial_stride
    if not isinstance(config, GRNClassConfig):
        size = run.choose_size(source, num_frames=num_frames, image_size=image_size)
        module.latent_grid(*size)  # refuses what does not fit the strides
        return size
    only = ClipSize(1, config.grid_size[0] * stride, config.grid_size[1] * stride)
    size = run.choose_size({}, num_frames=num_frames or 1, image_size=image_size or only[1:])
    if size != only:
        raise ValueError(f"this generator draws {only} only, got {size}; leave the size out.")
    return only


@contextmanager
def step_bar(
    num_samples: int, config: RefineConfig, title: str
) -> Iterator[Callable[[StepInfo], None]]:
    """Show a bar over all steps of all samples; yields the observer that moves it."""
    with tqdm(total=num_samples * config.num_steps, desc=title, unit="step") as bar:

        def observe(step: StepInfo) -> None:
            bar.update(len(step.sample_index))
            bar.set_postfix_str(f"{bar.n // config.num_steps}/{num_samples} drawn", refresh=False)

        yield observe


def _seconds(device: torch.device) -> float:
    """Return the time at which the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def draw_parts(
    module: LitGenerator,
    wanted: Mapping[str, Sequence[Any]],
    sample_index: Tensor,
    *,
    size: ClipSize,
    config: RefineConfig,
    seed: int,
    batch_size: int,
    observer: Callable[[StepInfo], None] | None = None,
) -> Iterator[DrawnPart]:
    """Draw clips, at most `batch_size` at a time.

    Args:
        module: The generator, on its device.
        wanted: `captions` or `class_labels`, one per clip.
        sample_index: `(n,)` long; with `seed` it names the noise of each clip.
        size: Size of the clips.
        config: Steps, guidance, temperature.
        seed: Seed of the job.
        batch_size: Most clips at a time; it does not change them.
        observer: Called after every step.

    Yields:
        The parts in order.

    Raises:
        ValueError: If the size does not fit the tokenizer.
    """

    def condition(rows: slice) -> Condition:
        batch: dict[str, Any] = {name: values[rows] for name, values in wanted.items()}
        if "class_labels" in batch:
            batch["class_labels"] = torch.as_tensor(batch["class_labels"], device=module.device)
        return module.condition(batch)

    parts = refine_in_batches(
        module.generator,
        (module.generator_config.num_elements, *module.latent_grid(*size)),
        condition=condition,
        null_condition=module.null_condition(1),
        sample_index=sample_index.to(module.device),
        seed=seed,
        alphabet_size=module.generator_config.alphabet_size,
        config=config,
        max_batch=batch_size,
        observer=observer,
    )
    start = _seconds(module.device)
    for part in parts:
        # One by one: a batch rounds differently in the last bit, which can move a pixel by a
        # level, and the decoder needs by far the most memory.
        clips = torch.cat([module.detokenize(one) for one in part.result.codes.split(1)])
        end = _seconds(module.device)
        yield DrawnPart(
            rows=range(part.start, part.stop),
            clips=clips,
            elements=part.result.codes,
            num_forwards=part.result.num_forwards,
            seconds=end - start,
        )
        start = _seconds(module.device)
