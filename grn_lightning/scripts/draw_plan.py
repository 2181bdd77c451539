"""Samples for judges, as a plan: all that decides them, so that any process can draw some of them.

A plan is plain data. It names the weights by file and by hash; a process that opens other weights
is refused. What is equal in two plans is equal in their samples, whoever draws them.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch

from grn_lightning.pipelines import GeneratorPipeline, PromptStyle
from grn_lightning.pipelines.recipes import AnyRecipe, Recipe, check_weights
from grn_lightning.pipelines.registry import DEFAULT_FOLDER
from grn_lightning.pipelines.resolutions import FPS
from grn_lightning.samplers import RefineConfig, StepInfo
from grn_lightning.samplers.coarse_to_fine import CoarseToFineConfig
from grn_lightning.scripts.drawing import DrawnPart, draw_parts
from grn_lightning.scripts.opening import AUTO, Opened, open_drawer
from grn_lightning.scripts.requests import SizeRequest, style_and_task
from grn_lightning.scripts.runs import ClipSize

_FPS = 8.0  # of clips where no published weights say another
_NOT_THE_PICTURE = (
    "checkpoint",
    "tokenizer",
    "fine",
    "published",
    "condition",
    "sample_index",
    "num_steps",
)
_RECORDED = ("checkpoint", "fine", "weights", "seed", "refine", "draw")


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How samples for judges are drawn."""

    fine: Path | None = None
    """Stage 2 of coarse-to-fine prediction, if the checkpoint is its stage 1."""
    draw: CoarseToFineConfig = field(default_factory=CoarseToFineConfig)
    """Guidance, temperature and truncation of coarse-to-fine prediction and its baseline."""
    weights: str | None = None
    """Name of published weights instead of a checkpoint; `grn weights` lists them."""
    weights_folder: Path = DEFAULT_FOLDER
    """Where published weights lie, or are downloaded to."""
    tokenizer: Path | None = None
    """Where the tokenizer lies, if not where it lay in training."""
    negative_prompt: str | None = None
    """What guidance steers away from; by default nothing, or what published weights are used with.
    """
    preset: str | None = None
    """Resolution: 0.06M, 0.25M, 0.41M, 0.92M, 1M or 2M (nominal pixels of a frame)."""
    aspect: str | None = None
    """Width to height, such as 16:9; the nearest published template is taken."""
    seconds: float | None = None
    """Duration of a clip, rounded to frames that the tokenizer knows."""
    num_frames: int | None = None
    """Frames of a clip, 1 for a picture; by default as in training."""
    image_size: int | tuple[int, int] | None = None
    """Height and width in pixels, or one number for both; by default as in training."""
    fps: float | None = None
    """Frames per second of clips; by default 16 for published weights, else 8."""
    sampling: str = AUTO
    """Published settings of sampling by name, such as c2i-b; "auto" takes those of the weights."""
    refine: RefineConfig = field(default_factory=RefineConfig)
    """Steps, guidance and temperature; what differs from its default beats `sampling`."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the generator computes in; pictures are decoded in float32."""
    seed: int = 0
    """Seed of all noise; with the number of a sample it fixes that sample."""
    batch_size: int = 16
    """Samples drawn at a time; more need more memory."""
    devices: int = 1
    """Processes to start, each on a GPU of its own if there are GPUs. They change no number."""
    device: str = "auto"
    """"auto", "cpu" or "cuda"."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name in ("batch_size", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.seed < 0:
            raise ValueError(f"`seed` must be at least 0, got {self.seed}.")
        if self.fps is not None and self.fps <= 0:
            raise ValueError(f"`fps` must be positive, got {self.fps}.")


class SamplePlan(ABC):
    """Who draws what size how; what the samples show is said sample by sample."""

    recipe: AnyRecipe
    """What all samples have in common; its condition is empty."""
    batch_size: int
    """Samples drawn at a time."""

    @property
    @abstractmethod
    def size(self) -> ClipSize:
        """Size of the samples."""

    @property
    @abstractmethod
    def walk(self) -> tuple[str, ...]:
        """What decides the cost of a sample, for tags."""

    @abstractmethod
    def rest(self) -> dict[str, Any]:
        """Return what decides the samples, besides their recipes and the batch, as plain data."""

    def described(self) -> dict[str, Any]:
        """Return what a record says of the drawing, checkpoint and seed included."""
        plain = asdict(self.recipe)
        return {name: plain[name] for name in _RECORDED if name in plain}

    def facts(self) -> dict[str, Any]:
        """Return what decides the samples, besides what they are asked to show, as plain data.

        Folders are no part of it: the weights are named by their hashes.
        """
        plain = self.recipe.as_plain()
        kept = {name: value for name, value in plain.items() if name not in _NOT_THE_PICTURE}
        return json.loads(json.dumps(kept | self.rest() | {"batch": self.batch_size}))

    @abstractmethod
    def open(self, device: torch.device) -> Any:
        """Load the weights into a pipeline.

        Raises:
            ValueError: If they are others by now.
        """

    @abstractmethod
    def draw(
        self,
        pipeline: Any,
        wanted: Mapping[str, Sequence[Any]],
        numbers: Sequence[int],
        *,
        progress: Callable[[float], None],
        decode: bool = True,
    ) -> Iterator[DrawnPart]:
        """Draw some samples.

        Args:
            pipeline: From `open`.
            wanted: `captions` or `class_labels`, one per sample.
            numbers: Numbers of the samples.
            progress: Told now and then how many samples more are done, in fractions.
            decode: Whether to make clips of the elements; else their reader does it.
        """

    @abstractmethod
    def note_of(self, field: str, value: Any, *, number: int, num_steps: int) -> str:
        """Return the recipe that travels in the file of a sample, for `grn replay`."""

    @abstractmethod
    def shown(self, prompt: str) -> str:
        """Return what the networks read of a prompt."""


@dataclass(frozen=True)
class DrawPlan(SamplePlan):
    """Who draws what size how; what the samples show is said sample by sample."""

    recipe: Recipe
    """What all samples have in common; its condition is empty."""
    style: PromptStyle
    """What is put around prompts."""
    batch_size: int
    """Samples drawn at a time."""
    weights_folder: Path
    """Where published weights lie."""

    @classmethod
    def make(cls, opened: Opened, options: DrawOptions, *, device: torch.device) -> Self:
        """Settle what options leave open.

        Args:
            opened: Who draws.
            options: How.
            device: Where samples will be drawn.

        Raises:
            ValueError: If the generator cannot draw that.
        """
        pipeline = opened.pipeline
        fps = options.fps or (_FPS if opened.weights is None else FPS)
        request = SizeRequest(
            options.preset, options.aspect, options.seconds, options.num_frames, options.image_size
        )
        size = request.resolve(opened, fps=fps, picture=None)
        style, task = style_and_task(pipeline, size, has_first_frame=False)
        refine = opened.sampling(options.sampling, options.refine, task)
        negative = style.negative if options.negative_prompt is None else options.negative_prompt
        recipe = Recipe(
            **opened.recipe(options.tokenizer),
            condition={},
            negative_prompt=negative if pipeline.is_text else "",
            sample_index=0,
            seed=options.seed,
            size=(size.num_frames, size.height, size.width),
            fps=fps,
            refine=refine,
            num_steps=refine.num_steps,
            precision=options.precision,
            device=device.type,
        )
        return cls(recipe, style, options.batch_size, options.weights_folder)

    @property
    def size(self) -> ClipSize:
        """Size of the samples."""
        return ClipSize(*self.recipe.size)

    @property
    def walk(self) -> tuple[str, ...]:
        """What decides the cost of a sample, for tags."""
        refine = self.recipe.refine
        steps = f"{refine.num_steps} steps"
        at_most = steps if refine.adaptive is None else f"at most {steps}"
        return at_most, f"scale {refine.guidance_scale:g}"

    def rest(self) -> dict[str, Any]:
        """Return what is put around prompts."""
        return {"style": vars(self.style)}

    def open(self, device: torch.device) -> GeneratorPipeline:
        """Load the weights.

        Raises:
            ValueError: If they are others by now.
        """
        recipe = self.recipe
        opened = open_drawer(
            None if recipe.published else Path(recipe.checkpoint),
            recipe.published,
            folder=self.weights_folder,
            tokenizer=None if recipe.tokenizer is None else Path(recipe.tokenizer),
        )
        check_weights(recipe.weights, opened.pipeline.hashes, where=f"'{recipe.checkpoint}'")
        pipeline = opened.pipeline.to(device)
        pipeline.autocast = torch.bfloat16 if recipe.precision == "bf16" else None
        return pipeline

    def draw(
        self,
        pipeline: GeneratorPipeline,
        wanted: Mapping[str, Sequence[Any]],
        numbers: Sequence[int],
        *,
        progress: Callable[[float], None],
        decode: bool = True,
    ) -> Iterator[DrawnPart]:
        """Draw some samples; `progress` is told after every step."""
        asked = dict(wanted)
        if "captions" in asked:
            asked["captions"] = [self.shown(text) for text in asked["captions"]]
        share = _Share(self.recipe.refine.num_steps, progress)
        for part in draw_parts(
            pipeline,
            asked,
            torch.tensor(numbers),
            size=self.size,
            config=self.recipe.refine,
            seed=self.recipe.seed,
            batch_size=self.batch_size,
            observer=share.observe,
            negative_prompt=self.recipe.negative_prompt,
            decode=decode,
        ):
            share.settle(len(part.rows))
            yield part

    def note_of(self, field: str, value: Any, *, number: int, num_steps: int) -> str:
        """Return the recipe that travels in the file of a sample, for `grn replay`."""
        shown = self.shown(value) if field == "captions" else value
        return replace(
            self.recipe, condition={field: shown}, sample_index=number, num_steps=num_steps
        ).as_note()

    def shown(self, prompt: str) -> str:
        """Return what the network reads of a prompt."""
        return self.style.apply(prompt)


class _Share:
    """Tells steps as fractions of samples; what a sample did not need is made up for in the end."""

    def __init__(self, num_steps: int, progress: Callable[[float], None]) -> None:
        self.num_steps, self.progress = num_steps, progress
        self.told = self.settled = 0.0

    def observe(self, step: StepInfo) -> None:
        share = len(step.sample_index) / self.num_steps
        self.told += share
        self.progress(share)

    def settle(self, count: int) -> None:
        self.settled += count
        if self.told < self.settled:
            self.progress(self.settled - self.told)
            self.told = self.settled


def fingerprint(facts: Any) -> str:
    """Return a short hash of plain data."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
