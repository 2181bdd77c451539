"""`grn convert`: published weights into exports that everything here reads, and back."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from grn_lightning.lit.tokenizer import load_tokenizer
from grn_lightning.models.convert import (
    Conversion,
    Layout,
    TokenizerReference,
    convert_official,
    read_official,
    variant_name,
    write_official,
)
from grn_lightning.models.hashes import weights_hash
from grn_lightning.models.pretrained import export_files, is_export, read_pretrained
from grn_lightning.models.sizes import NETWORKS, SizeHints
from grn_lightning.models.text_encoder import TINY, TextEncoderConfig

_HINTS = SizeHints()


@dataclass(frozen=True)
class ConversionReport:
    """What was converted, and where it lies."""

    files: tuple[Path, ...]
    """What was written."""
    what: str
    """The network, and the variant that it is."""
    layout: Layout
    """How the weights lie in the published file."""
    num_tensors: int
    """Tensors that were converted, all of them."""
    num_parameters: int
    """Values in them."""
    config: dict[str, Any]
    """Sizes of the network."""
    assumed: dict[str, Any]
    """Sizes that neither tensors nor options told."""
    left_out: tuple[str, ...] = ()
    """Tensors in the file that are no weights."""

    def __str__(self) -> str:
        """Say what it is, and what to look at twice."""
        told = (n for n, v in self.config.items() if v is not None and not isinstance(v, dict))
        sizes = ", ".join(f"{name}={self.config[name]}" for name in told)
        lines = [
            f"{self.what}: {self.num_tensors} tensors, {self.num_parameters:,} parameters "
            f"(layout {self.layout!r})",
            f"  {sizes}",
        ]
        if self.assumed:
            options = ", ".join(f"--{name} {value}" for name, value in self.assumed.items())
            lines.append(f"  assumed, since nothing tells it: {options}")
        if self.left_out:
            lines.append(f"  left out, since they are no weights: {', '.join(self.left_out)}")
        return "\n".join([*lines, f"in {', '.join(repr(str(file)) for file in self.files)}"])


def convert(
    file: Path,
    *,
    out: Path,
    to: Literal["ours", "official"] = "ours",
    variant: str = "auto",
    weights: Layout | None = None,
    layout: Layout | None = None,
    tokenizer: Path | None = None,
    text_encoder: TextEncoderConfig | None = None,
    config: SizeHints = _HINTS,
) -> ConversionReport:
    """Convert published weights to an export, or an export to a published checkpoint.

    Every tensor must find its place, and keeps its type and its bits in both directions. Sizes are
    read off the tensors; what no tensor tells is an option, and the answer says what was assumed.
    The file is read safely: nothing in it is run.

    Args:
        file: A published checkpoint (.ckpt, .pth, .safetensors), or an export to convert back.
        out: Name of the export, which becomes two files; or the checkpoint to write.
        to: "ours" writes an export, "official" a published checkpoint.
        variant: Variant that the weights must be, such as "B-index"; "auto" reads the sizes off.
        weights: Which of the weights in a checkpoint; by default the average if there is one.
        layout: How the weights lie in the checkpoint to write; by default as published.
        tokenizer: Tokenizer of a generator (export, checkpoint or run); its hash is noted.
        text_encoder: Text encoder of a text-conditional generator, which is named and not stored.
        config: What the tensors do not tell.

    Raises:
        ValueError: If the file is damaged or unsafe, or its tensors are not those of a network.
    """
    if to == "official":
        return _to_official(file, out, layout)
    if is_export(file):
        raise ValueError(f"'{file}' is an export already; `--to official` converts it back.")
    if text_encoder is not None and text_encoder.architecture == TINY:
        raise ValueError(
            f"`text_encoder` must be one with weights of its own, got {TINY!r}, which is trained "
            "along with a generator; name 'umt5' or a tower of open_clip, with its `checkpoint`."
        )
    reference = None
    if tokenizer is not None:
        network = load_tokenizer(tokenizer)
        reference = TokenizerReference(network.config, weights_hash(network))
    source = read_official(file, weights=weights)
    done = convert_official(
        source,
        out,
        variant=variant,
        hints=config,
        tokenizer=reference,
        text_encoder=text_encoder,
    )
    return _report(done)


def _report(done: Conversion) -> ConversionReport:
    name, tensors = variant_name(done.guess), done.source.tensors
    architecture = NETWORKS[done.guess.family].__name__
    return ConversionReport(
        files=tuple(export_files(done.file)),
        what=f"{architecture}, {f'variant {name!r}' if name else 'sizes of its own'}",
        layout=done.source.layout,
        num_tensors=len(tensors),
        num_parameters=sum(tensor.numel() for tensor in tensors.values()),
        config=asdict(done.guess.config),
        assumed=done.guess.assumed,
        left_out=done.source.left_out,
    )


def _to_official(file: Path, out: Path, layout: Layout | None) -> ConversionReport:
    pretrained = read_pretrained(file)
    written = write_official(pretrained, out, layout=layout)
    tensors = pretrained.network().state_dict()
    return ConversionReport(
        files=(out,),
        what=pretrained.architecture,
        layout=written,
        num_tensors=len(tensors),
        num_parameters=sum(tensor.numel() for tensor in tensors.values()),
        config=asdict(pretrained.config()),
        assumed={},
    )
