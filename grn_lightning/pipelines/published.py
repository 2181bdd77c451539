"""Published weights made ready: official files or exports -> tokenizer or pipeline, strictly.

Files are mapped into memory and become the weights as they are; nothing is converted on disk.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from grn_lightning.models.convert import hints_of, identify, read_official
from grn_lightning.models.grn_class import GRNClass
from grn_lightning.models.grn_text import GRNText
from grn_lightning.models.pretrained import Network, assign, is_export, read_pretrained
from grn_lightning.models.sizes import NETWORKS, SizeHints
from grn_lightning.models.text_encoder import TextEncoder, TextEncoderConfig, build_text_encoder
from grn_lightning.models.tokenizer import HBQTokenizer
from grn_lightning.pipelines.generator import GeneratorPipeline
from grn_lightning.pipelines.registry import (
    DEFAULT_FOLDER,
    PublishedWeights,
    fetch,
    fetch_text_encoder,
    published,
)
from grn_lightning.samplers import RefineConfig
from grn_lightning.samplers.presets import get_preset

ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
"""The text encoder's weights in its folder; its tokenizer is a folder beside them."""


@dataclass(frozen=True)
class LoadedWeights:
    """Published weights in memory."""

    file: Path
    """Where they came from."""
    network: Network
    """The network, frozen, in eval mode."""


def load_network(name: str, folder: Path = DEFAULT_FOLDER) -> LoadedWeights:
    """Load one published network.

    Args:
        name: One of `registry.WEIGHTS`.
        folder: Where it lies, or is downloaded to.

    Raises:
        ValueError: If it is not to be had, or its tensors are not those of the variant.
    """
    row, file = published(name), fetch(name, folder)
    if is_export(file):
        return LoadedWeights(file, _checked(row, file, read_pretrained(file).network()))
    source = read_official(file)
    hints = SizeHints(attention=row.attention, use_mid_attention=row.use_mid_attention)
    guess = identify(source.tensors, variant=row.variant, hints=hints.over(hints_of(source)))
    network = assign(lambda: NETWORKS[guess.family](guess.config), source.tensors)
    return LoadedWeights(file, _checked(row, file, network))


def _checked(row: PublishedWeights, file: Path, network: nn.Module) -> Network:
    """Refuse an export that was given another's name."""
    kinds: dict[str, type[Network]] = {
        "tokenizer": HBQTokenizer,
        "class": GRNClass,
        "text": GRNText,
    }
    if not isinstance(network, kinds[row.kind]):
        raise ValueError(
            f"'{file}' should be a {kinds[row.kind].__name__}, but is a {type(network).__name__}; "
            "its name is taken by published weights."
        )
    if isinstance(network, GRNText) and row.attention not in (None, network.config.attention):
        raise ValueError(
            f"'{file}' says attention={network.config.attention!r}, these weights have "
            f"{row.attention!r}; convert the file again with `--attention {row.attention}`."
        )
    return network


def umt5_config(place: Path, folder: Path) -> TextEncoderConfig:
    """Describe the published text encoder.

    Args:
        place: Its folder, with the weights and the folder of its tokenizer.
        folder: Where features of captions are kept, so that the encoder runs once for each.
    """
    inner = place / place.name
    return TextEncoderConfig(
        architecture="umt5",
        checkpoint=str(place / ENCODER_FILE),
        tokenizer=str(inner if inner.is_dir() else place),
        feature_cache=str(folder / "text-features"),
        keep_loaded=False,
    )


def sampling_of(name: str) -> dict[str, RefineConfig]:
    """Return the published settings of sampling, by task or "class"."""
    return {task: get_preset(preset) for task, preset in published(name).sampling.items()}


def load_published(
    name: str, folder: Path = DEFAULT_FOLDER, *, tokenizer: HBQTokenizer | None = None
) -> GeneratorPipeline:
    """Load a published generator with its tokenizer and text encoder, ready to draw.

    Args:
        name: One of `registry.WEIGHTS` that is a generator.
        folder: Where weights lie, or are downloaded to.
        tokenizer: Use this one; by default the one the weights were trained with.

    Raises:
        ValueError: If something is not to be had, or does not fit.
    """
    row = published(name)
    if row.tokenizer is None:
        raise ValueError(f"'{name}' is a tokenizer, which draws nothing; name a generator.")
    network = load_network(name, folder).network
    assert isinstance(network, GRNClass | GRNText)
    if tokenizer is None:
        loaded = load_network(row.tokenizer, folder).network
        assert isinstance(loaded, HBQTokenizer)
        tokenizer = loaded
    encoder: TextEncoder | None = None
    if row.text_encoder is not None:
        encoder = build_text_encoder(umt5_config(fetch_text_encoder(name, folder), folder))
    sampling = next(iter(sampling_of(name).values()), RefineConfig())
    return GeneratorPipeline(network, tokenizer, encoder, sampling, row.styles)
