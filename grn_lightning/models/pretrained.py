"""Exports: trained networks as one safetensors file and one JSON, for good.

`NAME.safetensors` holds the tensors under the names of their module (`tokenizer.`, `generator.`,
`text_encoder.`); `NAME.json` says what they are::

    {"format_version": 1, "kind": "generator", "created_by": "grn_lightning 0.1.0",
     "architecture": "GRNText", "config": {"generator": {...}, "text_encoder": {...}},
     "tokenizer_hash": "0123456789abcdef",
     "weights_hash": {"generator": "...", "text_encoder": "..."}, "sampling": {...}, ...}

A generator refers to its tokenizer by hash and does not contain it. Reading maps the file into
memory, and networks are built without weights that would be thrown away: a loaded network costs
the size of its file once.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from grn_lightning.models.code_transformer import CodeTransformer, CodeTransformerConfig
from grn_lightning.models.grn_class import GRNClass, GRNClassConfig
from grn_lightning.models.grn_text import GRNText, GRNTextConfig
from grn_lightning.models.hashes import tensors_hash, weights_hash
from grn_lightning.models.text_encoder import (
    TextEncoder,
    TextEncoderConfig,
    build_text_encoder,
)
from grn_lightning.models.tokenizer import HBQTokenizer, TokenizerConfig
from grn_lightning.models.tokenizers import Tokenizer
from grn_lightning.models.vq_tokenizer import VQTokenizer, VQTokenizerConfig

FORMAT_VERSION = 1
"""Format that is written; older ones are read, newer ones are refused."""

Kind = Literal["tokenizer", "generator"]
KINDS = get_args(Kind)
Network = Tokenizer | GRNClass | GRNText | CodeTransformer
AnyConfig = (
    TokenizerConfig | VQTokenizerConfig | GRNClassConfig | GRNTextConfig | CodeTransformerConfig
)
ModuleT = TypeVar("ModuleT", bound=nn.Module)
ConfigT = TypeVar("ConfigT")

ARCHITECTURES: dict[str, tuple[type[Network], type[AnyConfig]]] = {
    "HBQTokenizer": (HBQTokenizer, TokenizerConfig),
    "VQTokenizer": (VQTokenizer, VQTokenizerConfig),
    "GRNClass": (GRNClass, GRNClassConfig),
    "GRNText": (GRNText, GRNTextConfig),
    "CodeTransformer": (CodeTransformer, CodeTransformerConfig),
}
"""What an export may hold, and what its sizes are."""

# What torch.compile, FSDP and activation checkpointing put into names, wherever they wrap, and what
# DDP and DeepSpeed put in front. (`.module.` within a name may be ours.)
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_FRONT = re.compile(r"^((_forward_module|module)\.)+")


# --------------------------------------------------------------------------- tensors


def clean_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off what compilers and strategies put into the names of tensors."""
    return {_WRAPPERS.sub("", _FRONT.sub("", name)): x for name, x in tensors.items()}


def assign(make: Callable[[], ModuleT], tensors: Mapping[str, Tensor]) -> ModuleT:
    """Build a module around tensors, without weights of its own in between.

    Args:
        make: Builds the module; called on the meta device.
        tensors: Its whole state, by name; they are not copied, and keep their type.

    Returns:
        The module, frozen and in eval mode.
    """
    with torch.device("meta"):
        module = make()
    module.load_state_dict(dict(tensors), assign=True)
    if any(buffer.is_meta for buffer in module.buffers()):  # computed when built, stored nowhere
        module = make()
        module.load_state_dict(dict(tensors))
    return module.eval().requires_grad_(False)


def select(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors below `prefix.`, without it."""
    start = prefix + "."
    return {name[len(start) :]: x for name, x in tensors.items() if name.startswith(start)}


# --------------------------------------------------------------------------- files


class ExportFiles(NamedTuple):
    """The two files of an export."""

    info: Path
    """`NAME.json`."""
    tensors: Path
    """`NAME.safetensors`."""


def export_files(path: str | Path) -> ExportFiles:
    """Return the files that a name, or either of the two files, stands for."""
    stem = str(path)
    for suffix in (".json", ".safetensors"):
        stem = stem.removesuffix(suffix)
    return ExportFiles(Path(f"{stem}.json"), Path(f"{stem}.safetensors"))


def is_export(path: str | Path) -> bool:
    """Whether an export lies there: both of its files."""
    return all(file.is_file() for file in export_files(path))


def save_tensors(
    tensors: dict[str, Tensor], file: Path, *, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors, readable by whom the user's settings say.

    The library would make a file that only its owner can read.
    """
    file.touch()
    mode = file.stat().st_mode
    save_file(_apart(tensors), file, metadata={"format": "pt"} | (metadata or {}))
    file.chmod(mode)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that are another one under a second name, which the format does not know."""
    apart, seen = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        place = tensor.data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart


def write_pretrained(path: str | Path, modules: Mapping[str, nn.Module], info: Any) -> Path:
    """Write an export.

    Tensors go to the disk one by one, from wherever they lie.

    Args:
        path: Name of the export, with or without one of its suffixes; a new one.
        modules: What to store, by the name it has in `info["config"]`.
        info: What the JSON says, from `kind` on; format, version and hashes are filled in.

    Returns:
        The JSON.

    Raises:
        ValueError: If there is such an export already.
    """
    files = export_files(path)
    if taken := next((str(file) for file in files if file.exists()), None):
        raise ValueError(f"'{taken}' exists and is not overwritten; choose another name.")
    files.info.parent.mkdir(parents=True, exist_ok=True)
    states = {name: clean_names(module.state_dict()) for name, module in modules.items()}
    tensors = {
        f"{name}.{key}": tensor.detach().cpu().contiguous()
        for name, state in states.items()
        for key, tensor in state.items()
    }
    stated = {
        "format_version": FORMAT_VERSION,
        "kind": info["kind"],
        "created_by": f"grn_lightning {version('grn-lightning')}",
        "architecture": type(modules[info["kind"]]).__name__,
        **info,
        "weights_hash": {name: tensors_hash(state) for name, state in states.items()},
    }
    if stated["kind"] == "tokenizer":
        stated["tokenizer_hash"] = stated["weights_hash"]["tokenizer"]
    text = json.dumps(stated, indent=1, default=_plain) + "\n"
    for file, write in (
        (files.tensors, lambda part: save_tensors(tensors, part)),
        (files.info, lambda part: part.write_text(text, encoding="utf-8")),
    ):  # both appear under their names only when they are complete, the JSON last
        part = file.with_name(f".{file.name}.part")
        write(part)
        os.replace(part, file)
    return files.info


def _plain(value: Any) -> Any:
    """Turn a configuration into what JSON knows."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)


def read_pretrained(path: str | Path, *, check: bool = True) -> "Pretrained":
    """Read an export; its tensors are mapped into memory, not copied.

    Args:
        path: Name of the export, or either of its files.
        check: Whether to compare the tensors with the hashes, which reads all of them.

    Raises:
        ValueError: If there is no export, it is damaged, or of a newer format.
    """
    files = export_files(path)
    for file in files:
        if not file.is_file():
            raise ValueError(
                f"no export at '{path}': there is no '{file}'. An export is two files, which "
                "`grn export` writes for a run and `grn convert` for official weights."
            )
    info = _read_info(files.info)
    try:
        with safe_open(files.tensors, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"'{files.tensors}' is damaged or unfinished: {error}.") from error
    pretrained = Pretrained(files.info, info, tensors)
    if check:
        pretrained.check_hashes()
    return pretrained


def _read_info(file: Path) -> dict[str, Any]:
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        found = info["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"'{file}' is not the JSON of an export, or damaged: {type(error).__name__}: {error}."
        ) from error
    if not isinstance(found, int) or found < 1:
        raise ValueError(f"'{file}' is not the JSON of an export: it has format {found!r}.")
    if found > FORMAT_VERSION:
        raise ValueError(
            f"'{file}' has format {found}, written by {info.get('created_by')}; this version of "
            f"grn_lightning reads formats up to {FORMAT_VERSION}. Install a newer one."
        )
    kind = info.get("kind")
    parts = (info.get("config"), info.get("weights_hash"))
    sizes = parts[0].get(kind) if kind in KINDS and isinstance(parts[0], dict) else None
    if not isinstance(sizes, dict) or not isinstance(parts[1], dict) or kind not in parts[1]:
        raise ValueError(f"'{file}' is not the JSON of an export: it describes no network.")
    return info


# --------------------------------------------------------------------------- what was read


@dataclass(frozen=True)
class Pretrained:
    """An export that was read."""

    file: Path
    """The JSON."""
    info: dict[str, Any]
    """What it says."""
    tensors: dict[str, Tensor]
    """All tensors, mapped into memory, under the names of their module."""

    @property
    def kind(self) -> Kind:
        """What it is."""
        return self.info["kind"]

    @property
    def tokenizer_hash(self) -> str | None:
        """Hash of the tokenizer it is or belongs to; None where nobody knows."""
        return self.info.get("tokenizer_hash")

    def check_hashes(self) -> None:
        """Compare the tensors with the hashes in the JSON.

        Raises:
            ValueError: If they are not those that were written.
        """
        for name, expected in self.info["weights_hash"].items():
            found = tensors_hash(select(self.tensors, name))
            if found != expected:
                raise ValueError(
                    f"'{export_files(self.file).tensors}' is damaged, or belongs to another JSON: "
                    f"its {name} has hash {found}, '{self.file}' says {expected}. Copy both files "
                    "again."
                )

    @property
    def architecture(self) -> str:
        """Name of the network, one of `ARCHITECTURES`.

        Raises:
            ValueError: If this version knows none of that name.
        """
        name = self.info.get("architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"'{self.file}': unknown architecture {name!r}; known are {known}.")
        return name

    def config(self) -> AnyConfig:
        """Return the sizes of the network.

        Raises:
            ValueError: If they are none that this version knows.
        """
        return self._config(ARCHITECTURES[self.architecture][1], self.info["config"][self.kind])

    def _config(self, kind: type[ConfigT], data: dict[str, Any]) -> ConfigT:
        # JSON has lists where configurations have tuples.
        if not isinstance(data, dict):
            raise ValueError(f"'{self.file}': no {kind.__name__}: {data!r}.")
        data = {name: tuple(x) if isinstance(x, list) else x for name, x in data.items()}
        try:
            return kind(**data)
        except TypeError as error:
            raise ValueError(f"'{self.file}': no {kind.__name__}: {error}.") from error
        except ValueError as error:
            raise ValueError(f"'{self.file}': {error}") from error

    def network(self) -> Network:
        """Return the tokenizer or generator around the mapped tensors, frozen, in eval mode.

        Raises:
            ValueError: If its tensors are not those of its sizes.
        """
        kind: Any = ARCHITECTURES[self.architecture][0]
        config = self.config()
        try:
            return assign(lambda: kind(config), select(self.tensors, self.kind))
        except RuntimeError as error:
            raise ValueError(f"'{self.file}' does not describe its tensors: {error}") from error

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            ValueError: If it is a generator.
        """
        network = self.network() if self.kind == "tokenizer" else None
        if not isinstance(network, Tokenizer):
            raise ValueError(f"'{self.file}' is an export of a generator, not of a tokenizer.")
        return network

    def hbq_tokenizer(self) -> HBQTokenizer:
        """Return the tokenizer of a generator that refines.

        Raises:
            ValueError: If it is a generator, or a tokenizer of another family.
        """
        tokenizer = self.tokenizer()
        if not isinstance(tokenizer, HBQTokenizer):
            raise ValueError(f"'{self.file}' is a {self.architecture}, which no generator refines.")
        return tokenizer

    def text_encoder(self) -> TextEncoder | None:
        """Return the text encoder that a generator was trained with, if it is known.

        A trained one is part of the export; a frozen one is built from its own files.

        Raises:
            ValueError: If a frozen one is not the one of the training.
        """
        data = self.info["config"].get("text_encoder")
        if data is None:
            return None
        config = self._config(TextEncoderConfig, data)
        encoder = build_text_encoder(config)
        if tensors := select(self.tensors, "text_encoder"):
            try:
                encoder.load_state_dict(tensors)
            except RuntimeError as error:
                raise ValueError(f"'{self.file}' does not describe its tensors: {error}") from error
        elif (found := weights_hash(encoder)) != self.info.get("text_encoder_hash", found):
            raise ValueError(
                f"'{self.file}' was trained with text encoder {self.info['text_encoder_hash']}, "
                f"but {config.checkpoint or config.architecture!r} is {found}."
            )
        return encoder.eval().requires_grad_(False)

    def tokenizer_beside(self) -> Path | None:
        """Return the export in the same folder that is the tokenizer of this generator.

        Equal weights can lie there with other switches, such as attention that is bypassed; then
        it is the one with the switches that the generator was converted with.

        Raises:
            ValueError: If there are several, and nobody noted which.
        """
        found: list[tuple[Path, Any]] = []
        for file in sorted(self.file.parent.glob("*.json")):
            if self.tokenizer_hash is None or file == self.file or not is_export(file):
                continue
            try:
                info = _read_info(file)
            except ValueError:  # another's JSON
                continue
            if (info["kind"], info.get("tokenizer_hash")) == ("tokenizer", self.tokenizer_hash):
                found.append((file, info["config"]["tokenizer"]))
        noted = self.info.get("tokenizer_config")
        found = [pair for pair in found if pair[1] == noted] or found
        if any(config != found[0][1] for _, config in found):
            names = " and ".join(f"'{file}'" for file, _ in found)
            raise ValueError(
                f"{names} have the weights of the tokenizer of '{self.file}', but differ in their "
                "settings; give one of them as `tokenizer`."
            )
        return found[0][0] if found else None
