"""What a training's YAML files say, read as `grn fit` reads them, with nothing built."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningCLI

from grn_lightning.datasets.samples import holds_codes
from grn_lightning.datasets.shards import ShardSet
from grn_lightning.lit.callbacks import Preflight
from grn_lightning.lit.checkpoints import read_checkpoint
from grn_lightning.lit.rehearsal import TEXT_TOKENS, BatchSizes, StepSettings
from grn_lightning.media.resolutions import PRESETS, STRIDE
from grn_lightning.models.pretrained import is_export, read_pretrained
from grn_lightning.models.tokenizer import TokenizerConfig
from grn_lightning.models.tokenizers import as_tokenizer_config
from grn_lightning.scripts.plan_strategies import strategy_name


class _Reader(LightningCLI):
    """LightningCLI that parses and stops."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Know what `grn fit` knows."""
        parser.add_lightning_class_args(Preflight, "preflight")
        parser.add_argument("--resume", type=str | None, default=None)

    def _set_seed(self) -> None:
        """Draw nothing."""

    def instantiate_classes(self) -> None:
        """Build nothing: neither devices nor data need be there."""


def read_settings(words: Sequence[str]) -> dict[str, Any]:
    """Resolve YAML files and overrides as `grn fit` does.

    Args:
        words: Files, later ones over earlier ones, and overrides such as `trainer.max_steps=10`.

    Raises:
        ValueError: If there is no file.
        ArgumentError: If a file has an unknown key, or none has a model.
    """
    files = [word for word in words if "=" not in word]
    if not files:
        raise ValueError("give the YAML files of the training, as after `-c` of `grn fit`.")
    args = [part for file in files for part in ("--config", str(file))]
    args += [f"--{word.lstrip('-')}" for word in words if "=" in word]
    for file in files:
        if not Path(file).is_file():
            what = "is a folder" if Path(file).is_dir() else "is not there"
            raise ValueError(
                f"'{file}' {what}; give the YAML files of a training, as after `-c` of `grn fit`."
            )
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    with warnings.catch_warnings():
        # The words of the command line are those of a tool, not of LightningCLI.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        reader = _read(args)
    return yaml.safe_load(reader.parser.dump(reader.config, skip_link_targets=False))


def _read(args: list[str]) -> _Reader:
    return _Reader(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        parser_kwargs={
            "parser_mode": "omegaconf+",
            "exit_on_error": False,
            "allow_abbrev": False,
        },
        args=args,
        run=False,
    )


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of a training, as far as a plan needs it."""

    title: str
    """Its name."""
    weight: float
    """Share of the steps, or of the documents of packs, relative to the others."""
    sizes: BatchSizes
    """Its micro-batch on one device."""
    num_samples: int | None
    """Samples of its shards, if they are there."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training, as far as a plan needs it."""

    model: dict[str, Any]
    """Its arguments."""
    sources: tuple[Source, ...]
    """Where batches come from."""
    token_budget: int | None
    """Tokens of a pack; None for batches of one size."""
    step: StepSettings
    """How a step is taken."""
    strategy: str
    """As the trainer is told."""
    world_size: int | None
    """Devices, if the files say how many."""
    max_steps: int
    """Steps of the optimizer; -1 for no end."""


def _sources(
    data: dict[str, Any], tokenizer: TokenizerConfig, text_tokens: int
) -> tuple[Source, ...]:
    budget = data.get("token_budget")
    found = []
    for entry in data["sources"]:
        shards = _shards(entry["path"], entry.get("split_train", "train"))
        is_coded = shards is not None and holds_codes(shards, entry.get("media", "image"))
        size = (entry.get("num_frames", 1), *_picture(entry, data))
        number = entry["batch_size"]
        if budget is not None:
            positions = math.prod(tokenizer.latent_shape(*size)[1:])
            number = max(1, budget // (positions + text_tokens + 1))
        sizes = BatchSizes(
            samples=number,
            size=size,
            is_coded=is_coded,
            has_text_features=bool(data.get("with_text_features")),
            text_tokens=text_tokens,
        )
        found.append(
            Source(
                title=entry.get("name") or Path(entry["path"]).name,
                weight=entry.get("weight", 1.0),
                sizes=sizes,
                num_samples=None if shards is None else sum(shards.shard_sizes),
            )
        )
    return tuple(found)


def _picture(entry: dict[str, Any], data: dict[str, Any]) -> tuple[int, int]:
    """Height and width in pixels, of packs those of the largest preset."""
    if presets := entry.get("presets"):
        side = max(PRESETS[name] for name in presets)
        return side * STRIDE, side * STRIDE
    side = entry.get("image_size") or data["image_size"]
    return (side, side) if isinstance(side, int) else (side[0], side[1])


def _shards(path: str, split: str) -> ShardSet | None:
    """The shards, if they are there already."""
    try:
        return ShardSet.open(path, split)
    except (ValueError, OSError):
        return None


def model_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the generator stage.

    Raises:
        ValueError: If model or data are of another kind.
    """
    model, data = settings["model"], settings["data"]
    stage = model["class_path"].rpartition(".")[2]
    if stage != "LitGenerator":
        raise ValueError(
            f"`grn plan` knows trainings of LitGenerator, got one of {stage}"
            + ("; docs/tokenizer.md has what was measured." if "Tokenizer" in stage else ".")
        )
    if "sources" not in data["init_args"]:
        raise ValueError(f"data must be a ShardData, got {data['class_path']}.")
    return model["init_args"]


def as_training(
    settings: dict[str, Any], tokenizer: TokenizerConfig, *, text_tokens: int = TEXT_TOKENS
) -> Training:
    """Pick out what a plan needs.

    Args:
        settings: Resolved settings of a generator's training.
        tokenizer: Sizes of its tokenizer.
        text_tokens: Tokens of a caption, where nothing tells.
    """
    model, data, trainer = settings["model"], settings["data"], settings["trainer"]
    encoder = model["init_args"].get("text_encoder") or {}
    length = encoder.get("context_length") or text_tokens
    callbacks = [entry["class_path"] for entry in trainer.get("callbacks") or []]
    step = StepSettings(
        precision=str(trainer.get("precision") or "32-true"),
        clip=float(trainer.get("gradient_clip_val") or 0.0),
        micro_batches=int(trainer.get("accumulate_grad_batches") or 1),
        has_average=any(name.endswith(".EMA") for name in callbacks),
        is_checkpointed=bool(model["init_args"].get("activation_checkpointing")),
    )
    return Training(
        model=model["init_args"],
        sources=_sources(data["init_args"], tokenizer, length),
        token_budget=data["init_args"].get("token_budget"),
        step=step,
        strategy=strategy_name(trainer.get("strategy")),
        world_size=_world_size(trainer),
        max_steps=int(trainer.get("max_steps") or -1),
    )


def _world_size(trainer: dict[str, Any]) -> int | None:
    """Processes over all machines; None if they are to be counted where it runs."""
    devices = trainer.get("devices")
    if isinstance(devices, list):
        number = len(devices)
    elif str(devices).isdigit():  # the parser leaves a number of the command line a text
        number = int(str(devices))
    else:
        return None
    return number * int(trainer.get("num_nodes") or 1)


def trained_tokenizer(path: str) -> TokenizerConfig | None:
    """Return the sizes of the tokenizer at a path; None if nobody has trained it yet."""
    if not Path(path).exists():
        return None
    found: Any
    if is_export(path):
        found = read_pretrained(path, check=False).config()
    else:
        found = as_tokenizer_config(read_checkpoint(path)["hyper_parameters"]["tokenizer"])
    return found if isinstance(found, TokenizerConfig) else None
