"""`grn replay`: make a picture or clip again from what it says about itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from grn_lightning.lit.loading import open_coarse_to_fine
from grn_lightning.media.images import decode_image
from grn_lightning.media.video import decode_video
from grn_lightning.models.pretrained import is_export
from grn_lightning.pipelines import GeneratorPipeline
from grn_lightning.pipelines.coarse_to_fine import CoarseToFinePipeline
from grn_lightning.pipelines.recipes import (
    AnyRecipe,
    Recipe,
    StageRecipe,
    check_files,
    check_weights,
    follow,
    read_recipes,
)
from grn_lightning.scripts.opening import open_drawer
from grn_lightning.scripts.pictures import new_folder, write_clip
from grn_lightning.scripts.runs import choose_device

_REPLAYS = Path("runs/replays")


@dataclass(frozen=True)
class ReplayReport:
    """What was made again."""

    files: tuple[Path, ...]
    """The best file of every sample."""
    same: int
    """How many have the pixels of the file they are a replay of."""
    compared: int
    """How many could be compared: those whose file is still there."""
    device: str
    """Type of the device that was used."""
    made_on: str
    """Type of the device that they were made on."""

    def __str__(self) -> str:
        """Say whether it came out the same."""
        what = f"{len(self.files)} sample{'s' * (len(self.files) != 1)}"
        text = f"{what} made again, the first is '{self.files[0]}'\n"
        text += f"{self.same} of {self.compared} compared have the same pixels"
        if self.same < self.compared and self.device != self.made_on:
            text += f"; made on {self.made_on}, replayed on {self.device}, which rounds differently"
        return text


def _decoded(file: Path) -> Tensor:
    if file.suffix in (".mp4", ".gif"):
        return decode_video(file, fps=None, num_frames=None)
    return decode_image(file.read_bytes(), source=str(file)).unsqueeze(0)


def _place(given: Path | None, noted: str | None, option: str) -> Path | None:
    """Return where a part lies: where an option says, or else where it lay."""
    place = given or (None if noted is None else Path(noted))
    if place is not None and not place.exists() and not is_export(place):
        raise ValueError(
            f"it was made with '{place}', which is not there; name the {option} by `--{option}`."
        )
    return place


def _open_stages(
    recipe: StageRecipe, checkpoint: Path | None, fine: Path | None, tokenizer: Path | None
) -> CoarseToFinePipeline:
    first = _place(checkpoint, recipe.checkpoint, "checkpoint")
    second = _place(fine, recipe.fine, "fine")
    place = _place(tokenizer, recipe.tokenizer, "tokenizer")
    assert first is not None
    return open_coarse_to_fine(first, second, tokenizer=None if place is None else str(place))


def _open(recipe: Recipe, checkpoint: Path | None, tokenizer: Path | None) -> GeneratorPipeline:
    where = checkpoint or Path(recipe.checkpoint)
    place = tokenizer or (None if recipe.tokenizer is None else Path(recipe.tokenizer))
    if recipe.published is not None and checkpoint is None:
        folder = where.parent
        return open_drawer(None, recipe.published, folder=folder, tokenizer=place).pipeline
    _place(where, None, "checkpoint")
    return open_drawer(where, None, folder=where.parent, tokenizer=place).pipeline


def _opened(
    recipe: AnyRecipe, checkpoint: Path | None, fine: Path | None, tokenizer: Path | None
) -> GeneratorPipeline | CoarseToFinePipeline:
    if isinstance(recipe, StageRecipe):
        return _open_stages(recipe, checkpoint, fine, tokenizer)
    if fine is not None:
        raise ValueError("`--fine` must be left out: it was made by refinement, in one stage.")
    return _open(recipe, checkpoint, tokenizer)


def _is_same(original: Path, clip: Tensor, replayed: Sequence[Path]) -> bool | None:
    """Compare pixels; None where there is nothing to compare with.

    A file without loss holds the replay itself. Of others the file of the same kind is compared.
    """
    peers = [file for file in replayed if file.suffix == original.suffix]
    if not original.is_file() or not peers:
        return None
    first = _decoded(original)
    return torch.equal(first, clip) or torch.equal(first, _decoded(peers[0]))


def replay(
    file: Path,
    *,
    out: Path | None = None,
    checkpoint: Path | None = None,
    fine: Path | None = None,
    tokenizer: Path | None = None,
    device: str = "auto",
) -> ReplayReport:
    """Make a picture or clip again from what it says about itself, and compare.

    Every file of `grn sample` and `grn edit` carries its recipe: weights by hash, prompt, seed,
    number, size, steps. On the same type of device the pixels are the same, bit for bit. Other
    weights are refused.

    Args:
        file: PNG, MP4 or GIF that was written by a tool, or a list `samples.json`, all of which is
            then made again.
        out: Folder to write to, new or empty; by default the next free one in runs/replays.
        checkpoint: Where the generator, or stage 1, lies, if not where it lay.
        fine: Where stage 2 of coarse-to-fine prediction lies, if not where it lay.
        tokenizer: Where the tokenizer lies, if not where it lay.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: If the file says nothing, or weights or given files are gone or others.
    """
    recipes = read_recipes(file)
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"`out` must be new or an empty folder, '{out}' is not.")
    target = choose_device(device)
    first = next(iter(recipes.values()))
    pipeline = _opened(first, checkpoint, fine, tokenizer).to(target)
    for recipe in recipes.values():
        check_weights(recipe.weights, pipeline.hashes, where=f"'{checkpoint or recipe.checkpoint}'")
        check_files(recipe)
    folder = new_folder(_REPLAYS) if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    files, same = [], []
    for name, recipe in recipes.items():
        clip = follow(recipe, pipeline)
        stem = folder / Path(name).name.removesuffix(Path(name).suffix)
        written = write_clip(stem, clip, fps=recipe.fps, note=recipe.as_note())
        files.append(written[0])
        same.append(_is_same(file.with_name(name), clip, written))
    compared = [is_same for is_same in same if is_same is not None]
    return ReplayReport(tuple(files), sum(compared), len(compared), target.type, first.device)
