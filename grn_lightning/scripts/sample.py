"""`grn sample`: draw pictures or clips from a trained generator."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from grn_lightning import __version__
from grn_lightning.datasets.manifest import write_json
from grn_lightning.lit.loading import is_stage, open_coarse_to_fine
from grn_lightning.pipelines import GeneratorPipeline
from grn_lightning.pipelines.recipes import Recipe, StageRecipe, file_hash
from grn_lightning.pipelines.registry import DEFAULT_FOLDER
from grn_lightning.pipelines.resolutions import FPS
from grn_lightning.samplers import RefineConfig, Trace, observers
from grn_lightning.samplers.coarse_to_fine import CoarseToFineConfig
from grn_lightning.scripts.drawing import RefinedPart, conditions_for, draw_parts, step_bar
from grn_lightning.scripts.frames import write_sample
from grn_lightning.scripts.opening import AUTO, Opened, open_drawer
from grn_lightning.scripts.pictures import new_folder, slug, write_sheet
from grn_lightning.scripts.records import command_line, environment, now
from grn_lightning.scripts.requests import SizeRequest, as_asked, read_picture, style_and_task
from grn_lightning.scripts.runs import choose_device, open_run
from grn_lightning.scripts.sample_stages import conditions_of, draw_stages, refuse_options
from grn_lightning.scripts.traces import write_traces

_SAMPLES = Path("runs/samples")
_REFINE = RefineConfig()
_DRAW = CoarseToFineConfig()
_FPS = 8.0  # of clips where no published weights say another
_MAX_ON_SHEET = 64  # more are too many for one look


@dataclass(frozen=True)
class SampleReport:
    """What was drawn, and where it lies."""

    folder: Path
    """Folder of the pictures and of `samples.json`."""
    sheet: Path
    """The captioned sheet."""
    files: tuple[Path, ...]
    """The best file of every sample, in order."""
    seconds_per_sample: float
    """Time for one sample, its share of a batch."""
    forwards_per_sample: float
    """Rows that the generator was asked for per sample."""

    def __str__(self) -> str:
        """Say where to look first."""
        count = len(self.files)
        return (
            f"{count} sample{'s' * (count != 1)} in '{self.folder}'; look at '{self.sheet}'\n"
            f"{self.forwards_per_sample:g} forwards and {self.seconds_per_sample:.2f} s each; "
            "samples.json tells how each was made"
        )


def _as_list(values: Any) -> list[Any] | None:
    return values if values is None or isinstance(values, list) else [values]


def _check(
    num_samples: int,
    first_index: int,
    seed: int,
    fps: float | None,
    batch_size: int,
    out: Path | None,
) -> None:
    issues = [
        f"`{name}` must be at least {low}, got {value}"
        for name, value, low in (
            ("num_samples", num_samples, 1),
            ("first_index", first_index, 0),
            ("seed", seed, 0),
            ("batch_size", batch_size, 1),
        )
        if value < low
    ]
    if fps is not None and fps <= 0:
        issues.append(f"`fps` must be positive, got {fps}")
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        issues.append(f"`out` must be new or an empty folder, '{out}' is not")
    if issues:
        raise ValueError("; ".join(issues) + ".")


def _folder(out: Path | None) -> Path:
    if out is None:
        return new_folder(_SAMPLES)
    out.mkdir(parents=True, exist_ok=True)
    return out


def _repeated(conditions: Mapping[str, list[Any]], times: int) -> dict[str, list[Any]]:
    """Ask for everything so many times, one after the other."""
    return {
        field: [value for value in values for _ in range(times)]
        for field, values in conditions.items()
    }


def _labels(wanted: dict[str, list[Any]]) -> list[str]:
    classes = [f"class {label}" for label in wanted.get("class_labels", [])]
    return classes or wanted["captions"]


def _job(
    command: str, opened: Opened, first: Recipe, asked: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    """Return what all samples have in common, for their list."""
    return {
        "command": command,
        **opened.facts(),
        "date": now(),
        "environment": environment(opened.pipeline.device),
        "refine": asdict(first.refine),
        "prompts": list(dict.fromkeys(asked.get("captions", []))),
        "negative_prompt": first.negative_prompt,
        "precision": first.precision,
        "seed": first.seed,
        "size": list(first.size),
        "fps": first.fps,
    }


def _recipes(first: Recipe, asked: Mapping[str, Sequence[Any]]) -> list[Recipe]:
    """Return the recipe of every sample."""
    field = "captions" if "captions" in asked else "class_labels"
    return [
        replace(first, condition={field: value}, sample_index=first.sample_index + n)
        for n, value in enumerate(asked[field])
    ]


class _Writer:
    """Writes samples as they come, and after each part the list of all so far."""

    def __init__(
        self,
        folder: Path,
        labels: Sequence[str],
        first_index: int,
        recipes: Sequence[Recipe],
        job: dict[str, Any],
    ):
        self.folder, self.labels, self.first_index = folder, labels, first_index
        self.fps, self.recipes, self.job = recipes[0].fps, recipes, job
        self.rows: list[dict[str, Any]] = []
        self.shown: list[Tensor] = []
        self.seconds = 0.0
        self.num_forwards = 0

    def write(self, part: RefinedPart, pipeline: GeneratorPipeline) -> None:
        """Decode and write the samples of a part."""
        start = time.perf_counter()
        columns = zip(part.rows, part.elements.split(1), part.num_steps.tolist(), strict=True)
        for n, (row, elements, num_steps) in enumerate(columns):
            index, label = self.first_index + row, self.labels[row]
            stem = self.folder / f"{index:05d}-{slug(label)}".rstrip("-")
            recipe = replace(self.recipes[row], num_steps=num_steps)
            written = write_sample(stem, elements, pipeline, fps=self.fps, note=recipe.as_note())
            self.rows.append(
                self._facts(index, label)
                | {"num_steps": num_steps, "files": [file.name for file in written.files]}
                | {"entropy": [round(h, 4) for h in part.entropy[:num_steps, n].tolist()]}
                | {"recipe": recipe.as_plain()}
            )
            if len(self.shown) < _MAX_ON_SHEET:
                self.shown.append(written.preview)
        self.seconds += time.perf_counter() - start
        self.seconds += part.seconds
        self.num_forwards += part.num_forwards
        write_json(self.folder / "samples.json", self.job | {"samples": self.rows})

    def _facts(self, index: int, label: str) -> dict[str, Any]:
        refine = self.job["refine"]
        return {
            "prompt": label,
            "sample_index": index,
            "seed": self.job["seed"],
            "guidance_scale": refine["guidance_scale"],
            "checkpoint": self.job["checkpoint"],
            "version": __version__,
        }

    def finish(self) -> SampleReport:
        """Write the sheet and say what there is."""
        clips = torch.stack(self.shown)
        labels = self.labels[: len(clips)]
        return SampleReport(
            folder=self.folder,
            sheet=write_sheet(self.folder / "sheet", clips, labels, fps=self.fps),
            files=tuple(self.folder / row["files"][0] for row in self.rows),
            seconds_per_sample=self.seconds / len(self.rows),
            forwards_per_sample=self.num_forwards / len(self.rows),
        )


def _are_stages(given: dict[str, Any]) -> bool:
    """Whether to draw from coarse-to-fine prediction; if not, refuse what only that knows."""
    if (
        given["checkpoint"] is not None
        and given["weights"] is None
        and is_stage(given["checkpoint"])
    ):
        return True
    known = [name for name in given if name not in ("fine", "draw")]
    refuse_options(sample, given, known, what="generators that refine")
    return False


def _sample_stages(given: dict[str, Any]) -> SampleReport:
    """Draw from stage 1 and stage 2 of coarse-to-fine prediction, or from their baseline."""
    prompts, class_labels = _as_list(given["prompts"]), _as_list(given["class_labels"])
    refuse_options(sample, given, what="coarse-to-fine prediction and its baseline")
    tokenizer, fine = given["tokenizer"], given["fine"]
    place = None if tokenizer is None else str(tokenizer)
    pipeline = open_coarse_to_fine(given["checkpoint"], fine, tokenizer=place)
    pipeline.to(choose_device(given["device"]))
    first = StageRecipe(
        checkpoint=str(open_run(given["checkpoint"]).checkpoint),
        fine=None if fine is None else str(open_run(fine).checkpoint),
        tokenizer=place,
        weights=pipeline.hashes,
        condition={},
        sample_index=given["first_index"],
        seed=given["seed"],
        draw=given["draw"],
        device=pipeline.device.type,
    )
    wanted = _repeated(conditions_of(pipeline, prompts, class_labels), given["num_samples"])
    folder = _folder(given["out"])
    drawn = draw_stages(
        pipeline,
        wanted,
        folder,
        first=first,
        batch_size=given["batch_size"],
        facts={
            "command": command_line(sample, given),
            "checkpoint": first.checkpoint,
            "fine": first.fine,
            "weights": first.weights,
            "date": now(),
            "environment": environment(pipeline.device),
        },
    )
    shown = drawn.shown[:_MAX_ON_SHEET]
    return SampleReport(
        folder=folder,
        sheet=write_sheet(folder / "sheet", shown, drawn.labels[: len(shown)], fps=_FPS),
        files=drawn.files,
        seconds_per_sample=drawn.seconds / len(drawn.files),
        forwards_per_sample=drawn.num_rows / len(drawn.files),
    )


def sample(
    checkpoint: Path | None = None,
    *,
    fine: Path | None = None,
    weights: str | None = None,
    weights_folder: Path = DEFAULT_FOLDER,
    prompts: list[str] | str | None = None,
    negative_prompt: str | None = None,
    first_frame: Path | None = None,
    class_labels: list[int] | int | None = None,
    num_samples: int = 1,
    out: Path | None = None,
    seed: int = 0,
    first_index: int = 0,
    preset: str | None = None,
    aspect: str | None = None,
    seconds: float | None = None,
    num_frames: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    fps: float | None = None,
    sampling: str = AUTO,
    refine: RefineConfig = _REFINE,
    draw: CoarseToFineConfig = _DRAW,
    precision: Literal["fp32", "bf16"] = "fp32",
    trace: int = 0,
    batch_size: int = 16,
    tokenizer: Path | None = None,
    device: str = "auto",
) -> SampleReport:
    """Draw pictures or clips from a trained generator, with averaged weights.

    Writes one PNG per picture, or one MP4 and GIF per clip, a captioned sheet of the first 64, and
    `samples.json`. The samples are numbered prompt by prompt; number and seed fix the noise of a
    sample, whatever the batch size and whatever else is drawn. One sample is drawn again by its
    prompt and `--first_index`.

    Args:
        checkpoint: Checkpoint of a generator, the folder of its run, or an export.
        fine: Stage 2 of coarse-to-fine prediction likewise, if `checkpoint` is its stage 1.
        weights: Name of published weights instead; `grn weights` lists them.
        weights_folder: Where published weights lie, or are downloaded to.
        prompts: Captions, for a text-conditional generator.
        negative_prompt: What guidance steers away from; by default nothing, or what published
            weights are used with.
        first_frame: Picture that clips start from, scaled and cropped to their size.
        class_labels: Classes, for a class-conditional generator.
        num_samples: Samples per prompt or class.
        out: Folder to write to, new or empty; by default the next free one in runs/samples.
        seed: Seed of all noise; another one gives other samples.
        first_index: Number of the first sample.
        preset: Resolution: 0.06M, 0.25M, 0.41M, 0.92M, 1M or 2M (nominal pixels of a frame).
        aspect: Width to height, such as 16:9; the nearest published template is taken.
        seconds: Duration of a clip, rounded to frames that the tokenizer knows.
        num_frames: Frames of a clip, 1 for a picture; by default as in training.
        image_size: Height and width in pixels, or one number for both; by default as in training.
        fps: Frames per second of clips; by default 16 for published weights, else 8.
        sampling: Published settings of sampling by name, such as c2i-b; "auto" takes those that
            came with the weights. Fields of `refine` that differ from their defaults beat them.
        refine: Steps, guidance and temperature of generators that refine.
        draw: Guidance, temperature and truncation of both stages of coarse-to-fine prediction; the
            plain baseline is drawn as `draw.coarse`.
        precision: "bf16" computes the generator in bfloat16, as published; pictures are decoded in
            float32.
        trace: So many samples are shown step by step too: an animation of what is filled, kept
            and erased, and curves.
        batch_size: Samples drawn at a time; more need more memory.
        tokenizer: Where the tokenizer lies, if not where it lay in training.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: If the generator cannot draw what is asked for, or `out` is not empty.
    """
    given = dict(locals())
    _check(num_samples, first_index, seed, fps, batch_size, out)
    if _are_stages(given):
        return _sample_stages(given)
    opened = open_drawer(checkpoint, weights, folder=weights_folder, tokenizer=tokenizer)
    pipeline = opened.pipeline.to(choose_device(device))
    conditions = conditions_for(pipeline, _as_list(prompts), _as_list(class_labels))
    picture = None if first_frame is None else read_picture(first_frame)
    fps = fps or (_FPS if weights is None else FPS)
    request = SizeRequest(preset, aspect, seconds, num_frames, image_size)
    size = request.resolve(opened, fps=fps, picture=picture)
    style, task = style_and_task(pipeline, size, has_first_frame=picture is not None)
    refine = opened.sampling(sampling, refine, task)
    wanted = _repeated(conditions, num_samples)
    labels = _labels(wanted)
    asked = as_asked(wanted, pipeline, style=style, picture=picture, size=size)
    pipeline.autocast = torch.bfloat16 if precision == "bf16" else None
    first = Recipe(
        **opened.recipe(tokenizer),
        condition={},
        negative_prompt=style.negative if negative_prompt is None else negative_prompt,
        sample_index=first_index,
        seed=seed,
        size=size,
        fps=fps,
        refine=refine,
        num_steps=refine.num_steps,
        precision=precision,
        first_frame=None if first_frame is None else str(first_frame),
        files={} if first_frame is None else {"first_frame": file_hash(first_frame)},
        device=pipeline.device.type,
    )
    job = _job(command_line(sample, given), opened, first, asked)
    writer = _Writer(_folder(out), labels, first_index, _recipes(first, asked), job)
    steps = Trace(range(first_index, first_index + trace))
    with step_bar(len(labels), refine, "sample") as bar:
        for part in draw_parts(
            pipeline,
            asked,
            torch.arange(len(labels)) + first_index,
            size=size,
            config=refine,
            seed=seed,
            batch_size=batch_size,
            observer=observers(bar, steps) if trace else bar,
            negative_prompt=first.negative_prompt,
            decode=False,
        ):
            writer.write(part, pipeline)
    write_traces(writer.folder, steps, pipeline, labels)
    return writer.finish()
