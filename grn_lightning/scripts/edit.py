"""`grn edit`: change given pictures and clips, or drawn ones, by refinement."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from grn_lightning.datasets.manifest import write_json
from grn_lightning.media.images import to_uint8
from grn_lightning.media.video import probe_video
from grn_lightning.pipelines import GeneratorPipeline
from grn_lightning.pipelines.editing import Edited, InpaintConfig
from grn_lightning.pipelines.plans import EditPlan, Task
from grn_lightning.pipelines.recipes import LIST_FILE, Recipe, file_hash, follow_edit
from grn_lightning.samplers import EditConfig, RefineConfig
from grn_lightning.scripts.drawing import conditions_for, size_for
from grn_lightning.scripts.opening import AUTO, Opened, open_drawer
from grn_lightning.scripts.pictures import new_folder, slug, write_clip, write_sheet
from grn_lightning.scripts.records import command_line, environment, now
from grn_lightning.scripts.runs import choose_device

_EDITS = Path("runs/edits")
_REFINE = RefineConfig()
_EDGES = InpaintConfig()
_RULES = EditConfig()
_DEFAULT_FPS = 8.0
_MAX_ON_SHEET = 16  # results; more are too many for one look


@dataclass(frozen=True)
class EditReport:
    """What was made, and where it lies."""

    folder: Path
    """Folder of the results and of `samples.json`."""
    sheet: Path
    """Before and after, side by side."""
    files: tuple[Path, ...]
    """The best file of every result, in order."""

    def __str__(self) -> str:
        """Say where to look first."""
        count = len(self.files)
        return (
            f"{count} result{'s' * (count != 1)} in '{self.folder}'; look at '{self.sheet}'\n"
            "`grn replay FILE` makes each again"
        )


def _check(num_samples: int, first_index: int, fps: float | None, out: Path | None) -> None:
    issues = []
    if num_samples < 1:
        issues.append(f"`num_samples` must be at least 1, got {num_samples}")
    if first_index < 0:
        issues.append(f"`first_index` must be at least 0, got {first_index}")
    if fps is not None and fps <= 0:
        issues.append(f"`fps` must be positive, got {fps}")
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        issues.append(f"`out` must be new or an empty folder, '{out}' is not")
    if issues:
        raise ValueError("; ".join(issues) + ".")


def _wanted(pipeline: GeneratorPipeline, prompt: str | None, label: int | None) -> dict[str, Any]:
    """Return what is asked for, one value, under the name that the generator understands."""
    if pipeline.is_text and prompt is None and label is None:
        return {"captions": ""}  # whatever fits
    asked = conditions_for(
        pipeline, None if prompt is None else [prompt], None if label is None else [label]
    )
    return {name: values[0] for name, values in asked.items()}


def _clip_facts(file: Path | None) -> tuple[int, float | None]:
    """Return frames and rate of a clip; a picture has one frame."""
    if file is None or file.suffix.lower() not in (".mp4", ".webm", ".mov", ".mkv", ".avi"):
        return 1, None
    info = probe_video(file)
    return info.num_frames, info.fps


def _plan(opened: Opened, given: dict[str, Any]) -> EditPlan:
    """Return what the options of `edit` say is to be done."""
    pipeline = opened.pipeline
    task, source = given["task"], given["source"]
    is_extended = task == "extend"
    asked = size_for(
        pipeline,
        opened.run,
        {} if opened.run is None else opened.run.source(),
        num_frames=None if is_extended else given["num_frames"],
        image_size=given["image_size"],
    )
    frames, source_condition = asked.num_frames, None
    if source is not None and not is_extended:
        stride = pipeline.tokenizer.config.temporal_stride
        frames = 1 + (min(frames, _clip_facts(source)[0]) - 1) // stride * stride
    told = given["source_prompt"], given["source_class"]
    if any(one is not None for one in told):
        source_condition = _wanted(pipeline, *told)
    names = ("task", "box", "borders", "overlap", "start_time", "edges", "rules")
    values: dict[str, Any] = {name: given[name] for name in names}
    files = {role: given[role] for role in ("source", "mask", "first", "last")}
    values |= {role: str(file) for role, file in files.items() if file is not None}
    return EditPlan(
        size=(frames, asked.height, asked.width),
        num_frames=given["num_frames"] if is_extended else None,
        source_condition=source_condition,
        **values,
    )


def _recipe(opened: Opened, given: dict[str, Any]) -> Recipe:
    """Return the recipe of the first result."""
    plan, pipeline = _plan(opened, given), opened.pipeline
    refine = opened.sampling(AUTO, given["refine"], "image" if plan.size[0] == 1 else "video")
    for role, file in plan.files.items():
        if not file.is_file():
            raise ValueError(f"`--{role}`: there is no file '{file}'.")
    return Recipe(
        **opened.recipe(given["tokenizer"]),
        condition=_wanted(pipeline, given["prompt"], given["class_label"]),
        negative_prompt=given["negative_prompt"],
        sample_index=given["first_index"],
        seed=given["seed"],
        size=plan.size,
        fps=given["fps"] or _clip_facts(given["source"])[1] or _DEFAULT_FPS,
        refine=refine,
        num_steps=refine.num_steps,
        edit=plan,
        files={role: file_hash(file) for role, file in plan.files.items()},
        device=pipeline.device.type,
    )


def _results(
    pipeline: GeneratorPipeline, recipe: Recipe, num_samples: int
) -> Iterator[tuple[Recipe, Edited]]:
    """Follow the recipe for one sample after the other, so that each can be made again alone."""
    for number in tqdm(range(num_samples), desc="edit", unit="result"):
        one = replace(recipe, sample_index=recipe.sample_index + number)
        edited = follow_edit(one, pipeline)
        yield replace(one, num_steps=int(edited.num_steps)), edited


def _write(
    folder: Path, results: Iterable[tuple[Recipe, Edited]], job: dict[str, Any], label: str
) -> EditReport:
    """Write results with their recipes as they come, a list of them, and a sheet of the first."""
    rows, files, cells, captions = [], list[Path](), list[Tensor](), list[str]()
    for recipe, edited in results:
        folder.mkdir(parents=True, exist_ok=True)
        assert recipe.edit is not None
        stem = folder / f"{recipe.sample_index:05d}-{recipe.edit.task}-{slug(label)}".rstrip("-")
        before, after = (
            to_uint8(clips[0].cpu()).transpose(0, 1) for clips in (edited.before, edited.clips)
        )
        names = write_clip(stem, after, fps=recipe.fps, note=recipe.as_note())
        files.append(names[0])
        if len(files) <= _MAX_ON_SHEET:
            cells += [before, after]
            captions += ["given" if recipe.edit.files else "source", label or recipe.edit.task]
        rows.append({"files": [name.name for name in names], "recipe": recipe.as_plain()})
        write_json(folder / LIST_FILE, job | {"samples": rows})
    clips = torch.stack(cells)
    sheet = write_sheet(folder / "sheet", clips, captions, fps=recipe.fps, columns=2)
    return EditReport(folder, sheet, tuple(files))


def edit(
    checkpoint: Path,
    task: Task,
    *,
    source: Path | None = None,
    prompt: str | None = None,
    class_label: int | None = None,
    source_prompt: str | None = None,
    source_class: int | None = None,
    mask: Path | None = None,
    box: tuple[int, int, int, int] | None = None,
    borders: tuple[int, int, int, int] | None = None,
    first: Path | None = None,
    last: Path | None = None,
    num_frames: int | None = None,
    overlap: int | None = None,
    start_time: float | None = None,
    edges: InpaintConfig = _EDGES,
    rules: EditConfig = _RULES,
    num_samples: int = 1,
    out: Path | None = None,
    seed: int = 0,
    first_index: int = 0,
    image_size: int | tuple[int, int] | None = None,
    fps: float | None = None,
    negative_prompt: str = "",
    refine: RefineConfig = _REFINE,
    tokenizer: Path | None = None,
    device: str = "auto",
) -> EditReport:
    """Change pictures and clips with a trained generator.

    The tasks: "inpaint" draws what a mask or box covers; "outpaint" what lies around; "frames" the
    clip that begins with `--first` or ends with `--last`; "extend" what comes after a clip; "vary"
    starts from the source, noised to a time; "swap" turns `--source_prompt` into `--prompt`, in
    `--source` or in what is drawn. Writes PNG, or MP4 and GIF, a sheet of before and after, and
    `samples.json`.

    Args:
        checkpoint: Checkpoint of a generator, the folder of its run, or an export.
        task: What to do.
        source: Picture or clip to change, scaled and cropped to the size that is drawn.
        prompt: What the result shall show, for a text-conditional generator; nothing fits all.
        class_label: The same for a class-conditional one.
        source_prompt: What the source of a swap shows.
        source_class: The same for a class-conditional generator.
        mask: Picture, white where pixels are drawn anew; scaled and cropped like the source.
        box: Pixels that are drawn anew: top, left, height, width.
        borders: Pixels that outpainting adds: left, right, above, below.
        first: First frame of a clip.
        last: Last frame of a clip.
        num_frames: Frames of the result; by default as in training, for "extend" a window more.
        overlap: Known frames of a window of "extend", 1 + stride k.
        start_time: Share of the source that "vary" starts with, in [0, 1); 0.5 by default.
        edges: How what is drawn meets what is given.
        rules: Which elements a swap may change.
        num_samples: Results to draw.
        out: Folder to write to, new or empty; by default the next free one in runs/edits.
        seed: Seed of all noise.
        first_index: Number of the first result.
        image_size: Height and width in pixels, or one number for both; by default as in training.
        fps: Frames per second; by default the source's, or 8.
        negative_prompt: What guidance steers away from, for text.
        refine: Steps, guidance and temperature.
        tokenizer: Where the tokenizer lies, if not where it lay in training.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: If the generator cannot do what is asked for, or `out` is not empty.
    """
    given = dict(locals())
    _check(num_samples, first_index, fps, out)
    opened = open_drawer(checkpoint, None, folder=checkpoint, tokenizer=tokenizer)
    pipeline = opened.pipeline.to(choose_device(device))
    recipe = _recipe(opened, given)
    facts = {
        "command": command_line(edit, given),
        "date": now(),
        "environment": environment(pipeline.device),
    }
    folder = new_folder(_EDITS) if out is None else out
    label = str(prompt or ("" if class_label is None else f"class {class_label}"))
    return _write(folder, _results(pipeline, recipe, num_samples), facts, label)
