"""Recipes: all that decides a picture or clip, kept in the file itself.

A recipe names the weights by their hashes, and holds prompt, seed, number, size, steps and, for an
edit, the files it was made from with theirs. It says nothing of batches, dates or folders, so that
equal pictures have equal recipes, and equal files. `grn replay` follows it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from grn_lightning.media.images import decode_image, to_uint8
from grn_lightning.media.notes import read_note
from grn_lightning.pipelines.coarse_to_fine import CoarseToFinePipeline
from grn_lightning.pipelines.conditions import with_first_frame
from grn_lightning.pipelines.editing import DrawJob, Edited
from grn_lightning.pipelines.generator import GeneratorPipeline
from grn_lightning.pipelines.plans import EditPlan, carry_out
from grn_lightning.samplers import RefineConfig
from grn_lightning.samplers.coarse_to_fine import CoarseToFineConfig, DrawConfig
from grn_lightning.samplers.stopping import AdaptiveSteps

FORMAT = 1
_KEY = "grn"  # of the format; tells a recipe from any other note
LIST_FILE = "samples.json"
"""Name of the list that tools write beside their samples."""


@dataclass(frozen=True, kw_only=True)
class Making:
    """What recipes of all kinds say."""

    checkpoint: str
    """Where the generator lay; of coarse-to-fine prediction, stage 1."""
    tokenizer: str | None = None
    """Where the tokenizer lay, if not where the generator says."""
    weights: dict[str, str]
    """Hashes of the weights of all parts, by name."""
    condition: dict[str, Any]
    """What was asked for: `captions` or `class_labels`, one value."""
    sample_index: int
    """Number of the sample: with the seed it names the noise."""
    seed: int
    """Seed of the job."""
    device: str = "cpu"
    """Type of the device; others round differently."""
    version: str = field(default_factory=lambda: version("grn-lightning"))
    """Version of this package."""

    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the given files, by role."""

    @property
    def given_files(self) -> dict[str, Path]:
        """The files that it reads, by role."""
        return {}

    def as_plain(self) -> dict[str, Any]:
        """Return it as plain data, with the number of its format."""
        return {
            _KEY: FORMAT,
            **{k: v for k, v in asdict(self).items() if v is not None and v != {}},
        }

    def as_note(self) -> str:
        """Return it as the text that travels in a file."""
        return json.dumps(self.as_plain(), ensure_ascii=False)


@dataclass(frozen=True, kw_only=True)
class StageRecipe(Making):
    """How one picture was made by coarse-to-fine prediction, or by its plain baseline."""

    draw: CoarseToFineConfig
    """Guidance, temperature and truncation of both stages."""
    fine: str | None = None
    """Where stage 2 lay; None for the baseline."""

    @property
    def fps(self) -> float:
        """Of clips, which these are not."""
        return 1.0

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> Self:
        stages = {}
        for name, plain in values["draw"].items():
            low, high = plain["guidance_interval"]
            stages[name] = DrawConfig(**dict(plain) | {"guidance_interval": (low, high)})
        return cls(**values | {"draw": CoarseToFineConfig(**stages)})


@dataclass(frozen=True, kw_only=True)
class Recipe(Making):
    """How one picture or clip was made by refinement."""

    published: str | None = None
    """Name of published weights, which `checkpoint` was then a file of."""
    negative_prompt: str = ""
    """What guidance steered away from, for text."""
    size: tuple[int, int, int]
    """Frames, height and width of what was drawn at a time."""
    fps: float
    """Frames per second of clips."""
    refine: RefineConfig
    """Steps, guidance, temperature."""
    num_steps: int
    """Steps that the sample took."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the generator computed in."""
    first_frame: str | None = None
    """File of the picture that a plain draw started from."""
    edit: EditPlan | None = None
    """What was done to given files; None for a plain draw."""

    @property
    def given_files(self) -> dict[str, Path]:
        """The files that it reads, by role."""
        if self.edit is not None:
            return self.edit.files
        return {} if self.first_frame is None else {"first_frame": Path(self.first_frame)}

    def as_plain(self) -> dict[str, Any]:
        """Return it as plain data, with the number of its format."""
        edit = {} if self.edit is None else {"edit": self.edit.as_plain()}
        return super().as_plain() | edit

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> Self:
        values["size"] = tuple(values["size"])
        values["refine"] = _refine_config(values["refine"])
        if values.get("edit") is not None:
            values["edit"] = EditPlan.from_plain(values["edit"])
        return cls(**values)


AnyRecipe = Recipe | StageRecipe


def recipe_of(plain: Mapping[str, Any], *, where: str) -> AnyRecipe:
    """Return the recipe of plain data.

    Args:
        plain: What `as_plain` has returned, perhaps read from JSON.
        where: What to call it in an error.

    Raises:
        ValueError: If it is of another format or version.
    """
    values = dict(plain)
    found = values.pop(_KEY, None)
    if found != FORMAT:
        raise ValueError(
            f"{where} holds a recipe of format {found}, this version reads {FORMAT}; replay it "
            f"with grn-lightning {values.get('version', 'of its time')}."
        )
    kind = StageRecipe if "draw" in values else Recipe
    try:
        return kind._from_values(values)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where} holds a recipe that this version cannot follow ({error}); replay it with "
            f"grn-lightning {values.get('version', 'of its time')}."
        ) from error


def _refine_config(plain: Mapping[str, Any]) -> RefineConfig:
    values = dict(plain) | {"guidance_interval": tuple(plain["guidance_interval"])}
    if values.get("adaptive") is not None:
        values["adaptive"] = AdaptiveSteps(**values["adaptive"])
    return RefineConfig(**values)


def file_hash(file: Path) -> str:
    """Return the SHA-256 of a file, as `sha256sum` prints it."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- reading --------------------------------------------------------------------------------------


def _parsed(text: str | None) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError:
        return None


def _from_list(file: Path) -> dict[str, AnyRecipe]:
    """Return the recipes of a list, by the name of the best file of each sample."""
    content = _parsed(file.read_text(encoding="utf-8"))
    if isinstance(content, dict) and _KEY in content:  # a recipe on its own
        return {file.stem: recipe_of(content, where=f"'{file}'")}
    rows = content.get("samples", []) if isinstance(content, dict) else []
    return {
        row["files"][0]: recipe_of(row["recipe"], where=f"'{file}'")
        for row in rows
        if isinstance(row, dict) and "recipe" in row
    }


def read_recipes(file: Path) -> dict[str, AnyRecipe]:
    """Return what a picture, clip or list says about how it was made, by names of files.

    A picture that has lost its note (a program has saved it anew) is looked up in the list beside
    it.

    Raises:
        ValueError: If there is no such file, or it says nothing.
    """
    if not file.is_file():
        raise ValueError(f"there is no file '{file}'.")
    if file.suffix == ".json":
        found = _from_list(file)
    else:
        content = _parsed(read_note(file))
        if isinstance(content, dict) and _KEY in content:
            return {file.name: recipe_of(content, where=f"'{file}'")}
        beside = file.with_name(LIST_FILE)
        listed = _from_list(beside) if beside.is_file() else {}
        found = {name: one for name, one in listed.items() if Path(name).stem == file.stem}
    if not found:
        raise ValueError(
            f"'{file}' does not say how it was made: it was not written by `grn sample` or `grn "
            "edit`, or a program has saved it anew."
        )
    return found


# --- following ------------------------------------------------------------------------------------


_OPTION_OF = {"tokenizer": "tokenizer", "fine": "fine", "split": "fine", "fine_mask": "fine"}


def check_weights(weights: Mapping[str, str], present: Mapping[str, str], *, where: str) -> None:
    """Refuse other weights than those that samples were, or are to be, made with.

    Args:
        weights: Hashes of a recipe, by part.
        present: Those of a pipeline.
        where: Where that comes from, for the message.

    Raises:
        ValueError: If they differ; it names both.
    """
    for part in sorted(weights.keys() | present.keys()):
        wanted, found = weights.get(part, "none"), present.get(part, "none")
        if wanted != found:
            option = _OPTION_OF.get(part, "checkpoint")
            raise ValueError(
                f"it was made with {part.replace('_', ' ')} {wanted}, but what is there ({where}) "
                f"has {found}; name the right one by `--{option}`."
            )


def check_files(recipe: AnyRecipe) -> None:
    """Refuse given files that are gone or others than those of a recipe.

    Raises:
        ValueError: If one is; it names both hashes.
    """
    for role, file in recipe.given_files.items():
        wanted = recipe.files.get(role)
        if not file.is_file():
            raise ValueError(f"its {role} '{file}' is gone; put it back to replay it.")
        if (found := file_hash(file)) != wanted:
            raise ValueError(
                f"its {role} '{file}' is another file now: {found[:16]} instead of "
                f"{str(wanted)[:16]}."
            )


def draw_job(recipe: Recipe, pipeline: GeneratorPipeline) -> DrawJob:
    """Return noise, steps and guidance of a recipe, for a batch of one."""
    return DrawJob(
        sample_index=torch.tensor([recipe.sample_index], device=pipeline.device),
        seed=recipe.seed,
        config=recipe.refine,
        null_condition=pipeline.null_condition(1, recipe.negative_prompt),
    )


def follow_edit(recipe: Recipe, pipeline: GeneratorPipeline) -> Edited:
    """Do what the recipe of an edit says, for a batch of one."""
    assert recipe.edit is not None
    condition = pipeline.condition({name: [value] for name, value in recipe.condition.items()})
    return carry_out(pipeline, recipe.edit, condition, draw_job(recipe, pipeline))


def follow(recipe: AnyRecipe, pipeline: GeneratorPipeline | CoarseToFinePipeline) -> Tensor:
    """Make a picture or clip again.

    Args:
        recipe: How it was made.
        pipeline: The networks it was made with.

    Returns:
        uint8 `(f, 3, h, w)`.
    """
    if isinstance(recipe, StageRecipe):
        assert isinstance(pipeline, CoarseToFinePipeline)
        clips = _follow_stages(recipe, pipeline)
    else:
        assert isinstance(pipeline, GeneratorPipeline)
        clips = _follow_refinement(recipe, pipeline)
    return to_uint8(clips[0].cpu()).transpose(0, 1)


def _follow_stages(recipe: StageRecipe, pipeline: CoarseToFinePipeline) -> Tensor:
    condition = pipeline.condition({name: [value] for name, value in recipe.condition.items()})
    index = torch.tensor([recipe.sample_index], device=pipeline.device)
    return pipeline.draw(condition, index, config=recipe.draw, seed=recipe.seed).clips


def _follow_refinement(recipe: Recipe, pipeline: GeneratorPipeline) -> Tensor:
    pipeline.autocast = torch.bfloat16 if recipe.precision == "bf16" else None
    if recipe.edit is not None:
        return follow_edit(recipe, pipeline).clips
    condition = pipeline.condition({name: [value] for name, value in recipe.condition.items()})
    if recipe.first_frame is not None:
        picture = decode_image(Path(recipe.first_frame).read_bytes(), source=recipe.first_frame)
        first = pipeline.first_frame([picture], size=recipe.size[1:])
        condition = with_first_frame(condition, first)
    job = draw_job(recipe, pipeline)
    index = job.sample_index
    return pipeline.draw(condition, index, size=recipe.size, **job.arguments()).clips
