"""Published checkpoints into our exports and back, strictly.

Our modules carry the published tensor names and shapes, hence there is little to convert: the
wrappers around the weights differ from file to file, and sizes must be told from the tensors.

| layout | what the file holds |
|---|---|
| "ema", "vae" | tokenizer: the weights under that key, the average being "ema" |
| "model_ema1", "model_ema2", "model" | class-conditional: under that key, prefix `net.`, next to an `argparse.Namespace` |
| "model", "ema" | of LlamaGen, tokenizer and generator: under that key, without a prefix |
| "gpt_ema_fsdp", "gpt_fsdp" | text-conditional, of the trainer: under `trainer` and that key |
| "flat" | tensors by name and nothing else; also what safetensors files are |

Files are memory-mapped, so that only what is read of the tensors that are wanted costs memory.
"""  # noqa: E501 a table row is one line

import argparse
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from grn_lightning.functional.hbq import MAX_ROUNDS
from grn_lightning.models.code_transformer import CodeTransformerConfig
from grn_lightning.models.pretrained import (
    Pretrained,
    assign,
    clean_names,
    save_tensors,
    write_pretrained,
)
from grn_lightning.models.sizes import (
    FAMILIES,
    NETWORKS,
    VARIANTS,
    Family,
    SizeGuess,
    SizeHints,
    UnknownSizes,
    differences,
    expected_shapes,
    guess_sizes,
    misfit,
    nearest_variant,
    split_left_out,
    table_hints,
    was_attention_trained,
)
from grn_lightning.models.text_encoder import TextEncoderConfig
from grn_lightning.models.tokenizers import AnyTokenizerConfig
from grn_lightning.models.vq_tokenizer import VQTokenizerConfig

Layout = Literal[
    "ema", "vae", "model_ema1", "model_ema2", "model", "gpt_ema_fsdp", "gpt_fsdp", "flat"
]
LAYOUTS = get_args(Layout)
"""How weights lie in a file; of several in one file, the first of this list is taken."""
WRITTEN: dict[Family, tuple[Layout, ...]] = {
    "tokenizer": ("ema", "vae", "flat"),
    "class": ("model_ema1", "flat"),
    "text": ("flat", "gpt_fsdp", "gpt_ema_fsdp"),
    "vq": ("model", "ema", "flat"),
    "gpt": ("model", "flat"),
}
"""Layouts that can be written; the first is the one in which weights were published."""

_NET = "net."  # the class-conditional training wrapper
_GLOBAL = re.compile(r"GLOBAL (\S+)")


# --------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class OfficialFile:
    """A published checkpoint that was read."""

    path: Path
    """The file."""
    layout: Layout
    """Where in it the weights were."""
    tensors: dict[str, Tensor]
    """The weights, mapped into memory, under the names our modules have."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """What its training was called with, where the file says it."""
    left_out: tuple[str, ...] = ()
    """Names of tensors in it that are no weights: tables and memories of the moment."""


def read_official(path: str | Path, *, weights: Layout | None = None) -> OfficialFile:
    """Read a published checkpoint, safely: tensors, plain data and `argparse.Namespace` only.

    Args:
        path: A file of `torch.save` or safetensors.
        weights: Which of the weights in it; None takes the average where there is one.

    Raises:
        ValueError: If it is no such file, or holds no such weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file '{path}'; give the path of a published checkpoint.")
    contents = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    layout, found = _find_weights(path, contents, weights)
    tensors = _official_names(found)
    if not tensors:
        raise ValueError(f"'{path}' holds no tensors by name; its entries are {_names(contents)}.")
    arguments = contents.get("args", {})
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    return OfficialFile(path, layout, tensors, arguments if isinstance(arguments, dict) else {})


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged or unfinished: {error}.") from error


def _read_torch(path: Path) -> Mapping[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(
                path,
                map_location="cpu",
                weights_only=True,
                mmap=zipfile.is_zipfile(path),  # what torch wrote before 1.6 cannot be mapped
            )
    except Exception as error:
        if foreign := _GLOBAL.search(str(error)):
            raise ValueError(
                f"'{path}' holds a {foreign[1]}, which only its own code could unpickle, and that "
                "would run the code. Save tensors and plain data alone."
            ) from error
        raise ValueError(
            f"'{path}' cannot be read: it is damaged, unfinished, or no file of torch.save."
        ) from error
    if not isinstance(contents, Mapping):
        raise ValueError(f"'{path}' holds a {type(contents).__name__}, not tensors by name.")
    return contents


def _names(mapping: Mapping[str, Any]) -> str:
    names = [str(name) for name in mapping]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "none"


def _weights_at(contents: Mapping[str, Any], layout: Layout) -> Mapping[str, Any] | None:
    if layout.startswith("gpt_") and isinstance(contents.get("trainer"), Mapping):
        contents = contents["trainer"]
    found = contents if layout == "flat" else contents.get(layout)
    has_tensors = isinstance(found, Mapping) and any(isinstance(x, Tensor) for x in found.values())
    return found if has_tensors else None


def _find_weights(
    path: Path, contents: Mapping[str, Any], asked: Layout | None
) -> tuple[Layout, Mapping[str, Any]]:
    there = {
        layout: found for layout in LAYOUTS if (found := _weights_at(contents, layout)) is not None
    }
    if asked is not None:
        there = {asked: there[asked]} if asked in there else {}
    if not there:
        what = f"weights {asked!r}" if asked else f"weights under any of {', '.join(LAYOUTS)}"
        raise ValueError(f"'{path}' holds no {what}; its entries are {_names(contents)}.")
    return next(iter(there.items()))


def official_tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Find the tensors in the contents of a published file, under the names our modules have."""
    for layout in LAYOUTS:
        if (found := _weights_at(state_dict, layout)) is not None:
            return _official_names(found)
    return {}


def _official_names(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = clean_names({name: x for name, x in weights.items() if isinstance(x, Tensor)})
    if tensors and all(name.startswith(_NET) for name in tensors):
        tensors = {name.removeprefix(_NET): x for name, x in tensors.items()}
    return tensors


# --------------------------------------------------------------------------- which network


def hints_of(file: OfficialFile) -> SizeHints:
    """Return what the name of a file and the arguments of its training tell.

    Published names carry "ind" or "bit", and "FSA" for full attention; the class-conditional
    trainer was called with `method` ("GRN_ind") and `hbq_round`.
    """
    words = set(re.split(r"[^a-z0-9]+", file.path.stem.lower()))
    words |= set(re.split(r"[^a-z0-9]+", str(file.arguments.get("method", "")).lower()))
    rounds = file.arguments.get("hbq_round")
    is_index, is_bit = bool(words & {"ind", "index"}), "bit" in words
    return SizeHints(
        num_rounds=rounds if isinstance(rounds, int) and 1 <= rounds <= MAX_ROUNDS else None,
        target=None if is_index == is_bit else "index" if is_index else "bit",
        attention="full" if "fsa" in words else None,
    )


def identify(
    tensors: Mapping[str, Tensor], *, variant: str = "auto", hints: SizeHints | None = None
) -> SizeGuess:
    """Return the network that these tensors are all of, with its sizes.

    Args:
        tensors: Under their published names.
        variant: Row of a table of `models.variants` that they must be, or "auto".
        hints: What the tensors do not tell.

    Raises:
        ValueError: If they are not those of a published architecture, of that variant, or not all
            of them, or too many; with a table, and the nearest known variant.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if variant != "auto":
        guess = _of_variant(variant, tensors, hints or SizeHints())
    else:
        try:
            guess = guess_sizes(tensors, hints)
        except UnknownSizes as error:
            raise ValueError(_unknown(shapes, str(error))) from error
    rows = differences(shapes, expected_shapes(guess.family, guess.config))
    if rows:
        network = NETWORKS[guess.family].__name__
        what = f"{len(rows)} tensors do not fit "
        what += f"variant {variant!r}" if variant != "auto" else f"a {network} of their sizes"
        raise ValueError(misfit(shapes, rows, what))
    return guess


def _of_variant(variant: str, tensors: Mapping[str, Tensor], hints: SizeHints) -> SizeGuess:
    for family in FAMILIES:
        if variant in VARIANTS[family]:
            config = VARIANTS[family][variant]
            assumed: dict[str, Any] = {}
            if family == "tokenizer" and hints.use_mid_attention is None:
                assumed["use_mid_attention"] = was_attention_trained(tensors)
            given = {
                name: value
                for name, value in asdict(hints).items()
                if value is not None and hasattr(config, name)
            }
            return SizeGuess(family, replace(config, **(given | assumed)), assumed)
    known = ", ".join(repr(name) for family in FAMILIES for name in VARIANTS[family])
    raise ValueError(f"unknown variant {variant!r}; known are 'auto', {known}.")


def _unknown(shapes: Mapping[str, tuple[int, ...]], reason: str) -> str:
    near = nearest_variant(shapes)
    if near is None:
        rows = [f"{name} {shape}" for name, shape in list(shapes.items())[:10]]
        what = f"{len(shapes)} tensors are of no architecture known here"
        return misfit(shapes, [f"found        {row}" for row in rows], f"{what}: {reason}")
    family, config = next(
        (family, VARIANTS[family][near[0]]) for family in FAMILIES if near[0] in VARIANTS[family]
    )
    rows = differences(shapes, expected_shapes(family, config))
    return misfit(shapes, rows, f"the sizes cannot be told: {reason}")


def variant_name(guess: SizeGuess) -> str | None:
    """Return the row of a table that a network is, whatever its switches."""
    shapes = expected_shapes(guess.family, guess.config)
    table = VARIANTS[guess.family].items()
    return next((n for n, row in table if expected_shapes(guess.family, row) == shapes), None)


# --------------------------------------------------------------------------- converting


@dataclass(frozen=True)
class TokenizerReference:
    """The tokenizer whose codes a generator was trained on."""

    config: AnyTokenizerConfig
    """Its sizes."""
    weights_hash: str
    """The hash of its weights."""

    def hints(self, tensors: Mapping[str, Tensor]) -> SizeHints:
        """Return what it tells about a generator: rounds, and the form that fits its channels."""
        if isinstance(self.config, VQTokenizerConfig):
            return SizeHints()
        rounds, channels = self.config.num_rounds, self.config.latent_channels
        names = ("x_embedder.proj1.weight", "word_embed.weight")
        total = next((tensors[name].shape[1] for name in names if name in tensors), None)
        fits: dict[Literal["index", "bit"], bool] = {
            "index": total == channels * 2**rounds,
            "bit": total == channels * rounds * 2,
        }
        told = [target for target, is_fitting in fits.items() if is_fitting]
        return SizeHints(num_rounds=rounds, target=told[0] if len(told) == 1 else None)


@dataclass(frozen=True)
class Conversion:
    """What became of a published checkpoint."""

    source: OfficialFile
    """What was read."""
    guess: SizeGuess
    """What it is."""
    file: Path
    """JSON of the export."""


def convert_official(
    source: OfficialFile,
    out: str | Path,
    *,
    variant: str = "auto",
    hints: SizeHints | None = None,
    tokenizer: TokenizerReference | None = None,
    text_encoder: TextEncoderConfig | None = None,
) -> Conversion:
    """Write an export of a published checkpoint; tensors keep their type, bit by bit.

    Args:
        source: What was read.
        out: Name of the export.
        variant: See `identify`.
        hints: What the caller knows; goes before what the file's name and arguments tell.
        tokenizer: The tokenizer of a generator; its hash enters the export.
        text_encoder: The text encoder of a text-conditional generator; the export names it.

    Raises:
        ValueError: If the tensors do not fit, or `out` exists.
    """
    hints = (hints or SizeHints()).over(table_hints(source.tensors))
    tensors, left_out = split_left_out(source.tensors)
    source = replace(source, tensors=tensors, left_out=left_out)
    if tokenizer is not None:
        hints = hints.over(tokenizer.hints(source.tensors))
    try:
        guess = identify(source.tensors, variant=variant, hints=hints.over(hints_of(source)))
    except ValueError as error:
        raise ValueError(f"'{source.path}': {error}") from error
    kind = "tokenizer" if guess.family in ("tokenizer", "vq") else "generator"
    if isinstance(guess.config, CodeTransformerConfig) and tokenizer is not None:
        _check_codes(guess.config, tokenizer)
    network = assign(lambda: NETWORKS[guess.family](guess.config), source.tensors)
    info: dict[str, Any] = {"kind": kind, "config": {kind: guess.config}}
    if guess.family == "text":
        info["config"]["text_encoder"] = text_encoder
    if kind == "generator":
        info["tokenizer_hash"] = None if tokenizer is None else tokenizer.weights_hash
        info["tokenizer_config"] = None if tokenizer is None else tokenizer.config
    info["converted_from"] = {"file": source.path.name, "layout": source.layout}
    return Conversion(source, guess, write_pretrained(out, {kind: network}, info))


def _check_codes(config: CodeTransformerConfig, tokenizer: TokenizerReference) -> None:
    """Refuse a tokenizer whose codes a generator cannot have learned; coarse labels are fewer."""
    channels, size = tokenizer.config.code_channels, tokenizer.config.alphabet_size
    if channels != 1 or config.output_size > size:
        raise ValueError(
            f"the generator knows one code of {config.output_size} values per position, but the "
            f"tokenizer has {channels} of {size}; give the tokenizer of its training."
        )


def family_of(config: object) -> Family:
    """Return the published architecture that a configuration is of.

    Raises:
        ValueError: If it is of another one.
    """
    if isinstance(config, CodeTransformerConfig) and not (
        config.is_causal
        and config.input_channels == 1
        and config.num_classes > 0
        and config.prefix_rotation == "zero"
    ):
        raise ValueError(
            "a bidirectional, captioned or many-channelled CodeTransformer has no official layout."
        )
    for family, table in VARIANTS.items():
        if type(config) is type(next(iter(table.values()))):
            return family
    raise ValueError(f"a network of {type(config).__name__} has no official layout.")


def write_official(
    pretrained: Pretrained, out: str | Path, *, layout: Layout | None = None
) -> Layout:
    """Write the network of an export as a published checkpoint.

    Args:
        pretrained: What was read.
        out: A new file; safetensors if it ends so, else one of `torch.save`.
        layout: How the weights lie in it; None takes the published one.

    Returns:
        The layout that was written.

    Raises:
        ValueError: If the file exists, or the architecture was not published in that layout.
    """
    out, family = Path(out), family_of(pretrained.config())
    if out.exists():
        raise ValueError(f"'{out}' exists and is not overwritten; choose another name.")
    is_safetensors = out.suffix == ".safetensors"
    layout = layout or ("flat" if is_safetensors else WRITTEN[family][0])
    if layout not in WRITTEN[family] or (is_safetensors and layout != "flat"):
        known = ("flat",) if is_safetensors else WRITTEN[family]
        raise ValueError(
            f"`layout` must be one of {', '.join(map(repr, known))} for a {family} network in "
            f"'{out.name}', got {layout!r}."
        )
    tensors = dict(pretrained.network().state_dict())
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    if is_safetensors:
        save_tensors(tensors, part)
    else:
        torch.save(_wrap(tensors, layout), part)
    os.replace(part, out)
    return layout


def _wrap(tensors: dict[str, Tensor], layout: Layout) -> dict[str, Any]:
    if layout == "flat":
        return dict(tensors)
    if layout == "model_ema1":  # all three, since the published trainer asks for them
        named = {f"{_NET}{name}": x for name, x in tensors.items()}
        return {"model": named, "model_ema1": named, "model_ema2": named, "epoch": 0}
    if layout.startswith("gpt_"):
        weights = {"gpt_fsdp": tensors, layout: tensors}
        return {"trainer": {"config": {}, **weights, "gpt_fsdp_opt": None}, "epoch": 0, "iter": 0}
    return {layout: dict(tensors)}


def load_official(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load a published checkpoint into `module`; every tensor must find its place.

    Args:
        module: A model of ours, built with the sizes of the checkpoint.
        state_dict: Contents of the file: tensors by name, or a dictionary that holds them.

    Raises:
        ValueError: If a tensor is missing, left over or of another shape; the message lists them,
            and nothing has been loaded.
    """
    tensors, own = official_tensors(state_dict), module.state_dict()
    shapes, expected = (
        {name: tuple(tensor.shape) for name, tensor in state.items()} for state in (tensors, own)
    )
    if rows := differences(shapes, expected):
        what = (
            f"the checkpoint does not fit {type(module).__name__}: {len(rows)} tensors differ; "
            "build the model with the sizes of the checkpoint"
        )
        raise ValueError(misfit(shapes, rows, what))
    module.load_state_dict(tensors)
