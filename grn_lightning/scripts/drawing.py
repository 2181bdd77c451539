"""Drawing many clips from a trained generator: what it can draw, in parts, with a progress bar."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from grn_lightning.lit.generator import LitGenerator
from grn_lightning.models.grn_class import GRNClassConfig
from grn_lightning.pipelines import Condition, GeneratorPipeline, with_first_frame
from grn_lightning.pipelines.coarse_to_fine import CoarseToFinePipeline
from grn_lightning.pipelines.queues import sample_queue
from grn_lightning.samplers import RefineConfig, StepInfo
from grn_lightning.scripts.runs import ClipSize, TrainedRun

_BATCHES_PER_QUEUE = 16  # a queue ends with batches that are not full; captions of so many wait

Drawer = LitGenerator | GeneratorPipeline
"""Who draws: a pipeline, or the module that trains one."""


def as_pipeline(drawer: Drawer) -> GeneratorPipeline:
    """Return the pipeline of whoever draws."""
    return drawer.pipeline if isinstance(drawer, LitGenerator) else drawer


@dataclass(frozen=True)
class DrawnPart:
    """Some of the clips that were asked for."""

    rows: range
    """Which ones."""
    clips: Tensor | None
    """`(b, 3, f, h, w)` in [-1, 1], on the generator's device; None if not decoded."""
    elements: Tensor
    """`(b, c, *grid)` long: what the generator has drawn, before decoding."""
    num_forwards: int
    """Rows that the generator was asked about."""
    seconds: float
    """Time for conditions, refinement and decoding."""
    num_steps: Tensor
    """`(b,)` long: steps of each clip."""


@dataclass(frozen=True)
class RefinedPart(DrawnPart):
    """The same, by refinement."""

    entropy: Tensor
    """`(num_steps, b)` in [0, 1]: mean normalized entropy of the conditional prediction."""


def conditions_for(
    drawer: Drawer, prompts: list[str] | None, class_labels: list[int] | None
) -> dict[str, list[Any]]:
    """Return what is asked for, under the name that the generator understands.

    Raises:
        ValueError: If it is something else than this generator draws.
    """
    config = drawer.generator.config
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
    drawer: Drawer,
    run: TrainedRun | None,
    source: dict[str, Any],
    *,
    num_frames: int | None,
    image_size: int | tuple[int, int] | None,
) -> ClipSize:
    """Return the size of samples: what is asked for, or else that of a source of the training.

    Raises:
        ValueError: If it is unknown, or another one than the generator or tokenizer can make.
    """
    config, stride = drawer.generator.config, drawer.tokenizer.config.spatial_stride
    if run is None:  # published weights have no training that is known here
        run = TrainedRun(Path(), stage="generator", step=0, samples_seen=0, data={})
    choose = run.choose_size
    if not isinstance(config, GRNClassConfig):
        size = choose(source, num_frames=num_frames, image_size=image_size)
        drawer.latent_grid(*size)  # refuses what does not fit the strides
        return size
    only = ClipSize(1, config.grid_size[0] * stride, config.grid_size[1] * stride)
    size = choose({}, num_frames=num_frames or 1, image_size=image_size or only[1:])
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


def seconds_on(device: torch.device) -> float:
    """Return the time at which the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def draw_parts(
    drawer: Drawer,
    wanted: Mapping[str, Sequence[Any]],
    sample_index: Tensor,
    *,
    size: ClipSize,
    config: RefineConfig,
    seed: int,
    batch_size: int,
    observer: Callable[[StepInfo], None] | None = None,
    negative_prompt: str = "",
    decode: bool = True,
) -> Iterator[RefinedPart]:
    """Draw clips, at most `batch_size` at a time.

    Args:
        drawer: The generator, on its device.
        wanted: `captions` or `class_labels`, one per clip; with captions also `first_frames`, clean
            elements `(n, c, 1, h, w)`.
        sample_index: `(n,)` long; with `seed` it names the noise of each clip.
        size: Size of the clips.
        config: Steps, guidance, temperature.
        seed: Seed of the job.
        batch_size: Most clips at a time; it does not change them.
        observer: Called after every step.
        negative_prompt: What guidance steers away from, where text is drawn from.
        decode: Whether to make clips of the elements; else their reader does it.

    Yields:
        The parts in order.

    Raises:
        ValueError: If the size does not fit the tokenizer.
    """
    pipeline = as_pipeline(drawer)
    jobs = _Jobs(
        pipeline=pipeline,
        wanted=wanted,
        sample_index=sample_index.to(pipeline.device),
        grid=pipeline.latent_grid(*size),
        config=config,
        seed=seed,
        null_condition=pipeline.null_condition(1, negative_prompt),
        observer=observer,
    )
    # A queue keeps all places at work; where all samples take as many steps, a batch does so too.
    is_queue = config.adaptive is not None and config.compact and "first_frames" not in wanted
    count, group = len(sample_index), batch_size * (_BATCHES_PER_QUEUE if is_queue else 1)
    for start in range(0, count, group):
        rows = range(start, min(start + group, count))
        yield from jobs.queue(rows, batch_size, decode) if is_queue else jobs.batch(rows, decode)


@dataclass(frozen=True)
class _Jobs:
    """What all parts have in common."""

    pipeline: GeneratorPipeline
    wanted: Mapping[str, Sequence[Any]]
    sample_index: Tensor
    grid: tuple[int, ...]
    config: RefineConfig
    seed: int
    null_condition: Condition
    observer: Callable[[StepInfo], None] | None

    def _options(self) -> dict[str, Any]:
        names = ("grid", "config", "seed", "null_condition", "observer")
        return {name: getattr(self, name) for name in names}

    def batch(self, rows: range, decode: bool) -> Iterator[RefinedPart]:
        """Draw one part as one batch."""
        start, part = seconds_on(self.pipeline.device), slice(rows.start, rows.stop)
        result = self.pipeline.sample(
            _condition(self.pipeline, self.wanted, part), self.sample_index[part], **self._options()
        )
        yield RefinedPart(
            rows=rows,
            clips=decoded(self.pipeline, result.codes) if decode else None,
            elements=result.codes,
            num_forwards=result.num_forwards.rows,
            seconds=seconds_on(self.pipeline.device) - start,
            num_steps=result.num_steps,
            entropy=result.entropy,
        )

    def queue(self, rows: range, batch_size: int, decode: bool) -> Iterator[RefinedPart]:
        """Draw parts of `batch_size`; the next samples do not wait for the slowest of a part."""
        part = slice(rows.start, rows.stop)
        samples = sample_queue(
            self.pipeline,
            {name: values[part] for name, values in self.wanted.items()},
            self.sample_index[part],
            max_batch=batch_size,
            **self._options(),
        )
        for start in range(rows.start, rows.stop, batch_size):
            begin = seconds_on(self.pipeline.device)
            done = list(islice(samples, min(batch_size, rows.stop - start)))
            codes = torch.stack([sample.codes for sample in done])
            clips = decoded(self.pipeline, codes) if decode else None
            yield RefinedPart(
                rows=range(start, start + len(done)),
                clips=clips,
                elements=codes,
                num_forwards=sum(sample.num_evaluations for sample in done),
                seconds=seconds_on(self.pipeline.device) - begin,
                num_steps=torch.tensor([sample.num_steps for sample in done], device=codes.device),
                entropy=pad_sequence([sample.entropy for sample in done]),
            )


def decoded(pipeline: GeneratorPipeline | CoarseToFinePipeline, elements: Tensor) -> Tensor:
    """Decode elements `(b, c, *grid)` one by one.

    A batch rounds differently in the last bit, which can move a pixel by a level, and the decoder
    needs by far the most memory.
    """
    return torch.cat([pipeline.detokenize(one) for one in elements.split(1)])


def _condition(
    pipeline: GeneratorPipeline, wanted: Mapping[str, Sequence[Any]], rows: slice
) -> Condition:
    some = {name: values[rows] for name, values in wanted.items()}
    condition = pipeline.condition(some)
    if "first_frames" not in some:
        return condition
    return with_first_frame(condition, some["first_frames"].to(pipeline.device))  # type: ignore[attr-defined]
