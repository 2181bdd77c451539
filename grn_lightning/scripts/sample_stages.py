"""`grn sample` for the stages of coarse-to-fine prediction, or their plain baseline."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from grn_lightning import __version__
from grn_lightning.datasets.manifest import write_json
from grn_lightning.media.images import encode_png, to_uint8
from grn_lightning.pipelines.coarse_to_fine import CoarseToFinePipeline
from grn_lightning.pipelines.recipes import StageRecipe
from grn_lightning.scripts.drawing import decoded
from grn_lightning.scripts.pictures import shrink, slug

_KNOWN = (
    "checkpoint",
    "fine",
    "draw",
    "prompts",
    "class_labels",
    "num_samples",
    "out",
    "seed",
    "first_index",
    "batch_size",
    "tokenizer",
    "device",
    "weights_folder",
)
_SHOWN_SIDE = 256  # pixels of the shorter side on a sheet


@dataclass(frozen=True)
class StageSamples:
    """What was drawn, and what it cost."""

    files: tuple[Path, ...]
    """A PNG per sample."""
    shown: Tensor
    """uint8 `(n, 1, 3, h, w)`, small, for a sheet."""
    labels: tuple[str, ...]
    """Their captions."""
    seconds: float
    """Time for all."""
    num_rows: int
    """Rows that both networks were asked for."""


def refuse_options(
    command: Any, given: Mapping[str, Any], known: Sequence[str] = _KNOWN, *, what: str
) -> None:
    """Refuse options that were set and have no effect.

    Args:
        command: The function whose options they are.
        given: Its arguments.
        known: Options that have an effect.
        what: For whom the others have none.

    Raises:
        ValueError: If there are any.
    """
    parameters = signature(command).parameters.items()
    defaults = {name: p.default for name, p in parameters if p.default is not Parameter.empty}
    refuse_unused(given, defaults, known, what=what)


def refuse_unused(
    given: Mapping[str, Any], defaults: Mapping[str, Any], known: Sequence[str], *, what: str
) -> None:
    """Refuse what differs from its default and has no effect; see `refuse_options`.

    Raises:
        ValueError: If there is something.
    """
    unused = [
        name for name, default in defaults.items() if name not in known and given[name] != default
    ]
    if unused:
        names = ", ".join(f"`--{name}`" for name in unused)
        raise ValueError(f"{names} must be left out for {what}.")


def conditions_of(
    pipeline: CoarseToFinePipeline, prompts: list[str] | None, class_labels: list[int] | None
) -> dict[str, list[Any]]:
    """Return what is asked for, under the name that the networks understand.

    Raises:
        ValueError: If it is something else than they draw.
    """
    if pipeline.is_text:
        if class_labels is not None or not prompts:
            raise ValueError(
                "these networks draw from text: give `--prompts` and no `--class_labels`."
            )
        return {"captions": prompts}
    count = pipeline.coarse.config.num_classes
    if prompts is not None or not class_labels:
        raise ValueError(
            f"these networks draw {count} classes: give `--class_labels` and no `--prompts`, for "
            "example --class_labels '[0, 1]'."
        )
    wrong = [label for label in class_labels if not 0 <= label < count]
    if wrong:
        raise ValueError(f"`class_labels` must be in [0, {count}), got {wrong}.")
    return {"class_labels": class_labels}


def draw_stages(
    pipeline: CoarseToFinePipeline,
    wanted: Mapping[str, Sequence[Any]],
    folder: Path,
    *,
    first: StageRecipe,
    batch_size: int,
    facts: Mapping[str, Any],
) -> StageSamples:
    """Draw pictures, write each as PNG, and after each part the list of all so far.

    Args:
        pipeline: On its device.
        wanted: `captions` or `class_labels`, one per sample.
        folder: Where to.
        first: Recipe of the first sample, which shows nothing yet.
        batch_size: Most samples at a time; it does not change them.
        facts: What `samples.json` says of all of them.
    """
    (field, values), *_ = wanted.items()
    labels = [f"class {value}" if field == "class_labels" else value for value in values]
    job = {**facts, "version": __version__, "seed": first.seed, "draw": asdict(first.draw)}
    rows: list[dict[str, Any]] = []
    shown, num_rows, start = [], 0, time.perf_counter()
    for part in tqdm(torch.arange(len(values)).split(batch_size), desc="sample", unit="part"):
        index = (part + first.sample_index).to(pipeline.device)
        condition = pipeline.condition({field: [values[n] for n in part.tolist()]})
        drawn = pipeline.draw_codes(condition, index, config=first.draw, seed=first.seed)
        num_rows += drawn.num_rows
        pictures = to_uint8(decoded(pipeline, drawn.codes)[:, :, 0]).cpu()
        for n, picture, leak in zip(part.tolist(), pictures, drawn.leak_rate.tolist(), strict=True):
            number = first.sample_index + n
            recipe = replace(first, sample_index=number, condition={field: values[n]})
            file = folder / f"{number:05d}-{slug(labels[n])}.png"
            with file.open("xb") as stream:
                stream.write(encode_png(picture, note=recipe.as_note()))
            row = {"prompt": labels[n], "sample_index": number, "files": [file.name]}
            rows.append(row | {"leak_rate": leak, "recipe": recipe.as_plain()})
        shown.append(shrink(pictures, short_side=_SHOWN_SIDE)[:, None])
        write_json(folder / "samples.json", job | {"samples": rows})
    return StageSamples(
        files=tuple(folder / row["files"][0] for row in rows),
        shown=torch.cat(shown),
        labels=tuple(labels),
        seconds=time.perf_counter() - start,
        num_rows=num_rows,
    )
