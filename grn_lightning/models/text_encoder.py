"""Text encoders: what all of them offer, and the text towers of open_clip, read before pooling.

A generator wants one feature per token. Everything here works offline: weights come from local
files, never from a download. The encoder of the official text-conditional weights is in `umt5.py`.
"""

import dataclasses
from abc import ABC, abstractmethod
from pathlib import Path

import open_clip
import torch
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from grn_lightning.functional.rope import NUM_TEXT_POSITIONS
from grn_lightning.models.grn_text import TextCondition

TINY = "tiny"
UMT5 = "umt5"
LOCAL_DIR = "local-dir:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Which text tower, and where its weights are.

    Attributes:
        architecture: "tiny"; an open_clip name such as "ViT-L-14-quickgelu" (the weights of
            OpenAI need the "-quickgelu" names); "local-dir:FOLDER", where the folder holds
            `open_clip_config.json` and weights; or "umt5", the encoder of the official
            text-conditional weights.
        checkpoint: File with open_clip weights of both towers (`.pt`, `.safetensors`), needed
            with an open_clip name; or the file of the UMT5 encoder, needed with "umt5".
        context_length: Tokens per caption; None means 16 for "tiny", 512 for "umt5", else what the
            tower was trained with. Shorter is possible with causal towers, and exact; "umt5" cuts
            longer captions.
        width: Width of the "tiny" tower.
        layers: Number of blocks of the "tiny" tower.
        heads: Number of heads of the "tiny" tower.
        tokenizer: Folder of the tokenizer of "umt5".
        device: Where "umt5" computes; its weights never follow the generator.
        feature_cache: Folder in which "umt5" keeps features for other runs; None keeps them in
            memory only.
        keep_loaded: Whether "umt5" stays in memory after it has met new captions.
    """

    architecture: str = TINY
    checkpoint: str | None = None
    context_length: int | None = None
    width: int = 64
    layers: int = 2
    heads: int = 2
    tokenizer: str | None = None
    device: str = "cpu"
    feature_cache: str | None = None
    keep_loaded: bool = True

    def __post_init__(self) -> None:
        issues = self._umt5_issues()
        if self.context_length is not None and self.context_length < 2:
            issues.append(
                f"context_length must be at least 2 (start and end), got {self.context_length}"
            )
        if self.width % self.heads:
            issues.append(f"heads must divide width = {self.width}, got {self.heads}")
        is_local = self.architecture == TINY or self.architecture.startswith(LOCAL_DIR)
        if not is_local and self.checkpoint is None:
            issues.append(
                f"architecture {self.architecture!r} needs a checkpoint: the path of a local file "
                "with its weights (random text features are of use with 'tiny' only)"
            )
        if is_local and self.checkpoint is not None:
            issues.append(
                f"architecture {self.architecture!r} takes no checkpoint, got {self.checkpoint!r}"
            )
        if issues:
            raise ValueError("TextEncoderConfig: " + "; ".join(issues) + ".")

    def _umt5_issues(self) -> list[str]:
        if self.architecture == UMT5:
            issues = []
            if self.tokenizer is None:
                issues.append("architecture 'umt5' needs tokenizer: the folder of its tokenizer")
            if (self.context_length or 1) > NUM_TEXT_POSITIONS:
                issues.append(
                    f"context_length must be at most {NUM_TEXT_POSITIONS} with 'umt5', "
                    f"got {self.context_length}"
                )
            return issues
        return [
            f"{name} is for architecture 'umt5' only, got {value!r} with {self.architecture!r}"
            for name in ("tokenizer", "device", "feature_cache", "keep_loaded")
            if (value := getattr(self, name)) != getattr(TextEncoderConfig, name)
        ]


class TextEncoder(nn.Module, ABC):
    """Captions to token features with mask: `encoder(encoder.tokenize(captions))`."""

    @property
    @abstractmethod
    def text_channels(self) -> int:
        """Width of the features."""

    @property
    @abstractmethod
    def context_length(self) -> int:
        """Number of tokens `l` of every caption, padding included."""

    @abstractmethod
    def tokenize(self, captions: list[str]) -> Tensor:
        """Turn captions into tokens `(b, l)`."""

    @abstractmethod
    def forward(self, tokens: Tensor) -> TextCondition:
        """Compute features of tokens `(b, l)`."""


def build_text_encoder(config: TextEncoderConfig) -> TextEncoder:
    """Return the encoder that a configuration names."""
    if config.architecture == UMT5:
        from grn_lightning.models.umt5 import UMT5TextEncoder  # it builds on this file

        return UMT5TextEncoder(config)
    return OpenClipTextEncoder(config)


class OpenClipTextEncoder(TextEncoder):
    """Captions to token features with mask.

    "tiny" is a small causal transformer over the CLIP vocabulary, made to be trained together
    with a generator. Its token embedding (49408 rows) is random and stays so
    (`requires_grad=False`): a few dozen words of a small data set are told apart by random
    vectors as well as by learned ones, and an optimizer step over all rows would cost more than
    the rest of the tower. All other towers are loaded from disk and frozen as a whole.

    Args:
        config: Which tower.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        if config.architecture == TINY:
            self.tower = _tiny_tower(config)
            self._tokenizer = open_clip.SimpleTokenizer()
        else:
            self.tower = _load_tower(config)
            self._tokenizer = open_clip.get_tokenizer(config.architecture)
        if config.context_length is not None:
            _crop_context(self.tower, config.context_length)

    @property
    def text_channels(self) -> int:
        """Width of the features."""
        return self.tower.width

    @property
    def context_length(self) -> int:
        """Number of tokens `l` of every caption."""
        return self.tower.context_length

    def tokenize(self, captions: list[str]) -> Tensor:
        """Turn captions into tokens `(b, l)`; long ones are cut and keep their end token."""
        return self._tokenizer(captions, context_length=self.context_length)

    def forward(self, tokens: Tensor) -> TextCondition:
        """Compute features of tokens.

        Args:
            tokens: `(b, l)` from `tokenize`.

        Returns:
            Features `(b, l, text_channels)` after the final normalization, before pooling, and a
            mask that is True up to and including the end token.
        """
        embeds = self.tower(tokens)[1]
        end = self._end_index(tokens)
        mask = torch.arange(tokens.shape[1], device=tokens.device) <= end[:, None]
        return TextCondition(embeds, mask)

    def _end_index(self, tokens: Tensor) -> Tensor:
        """Find the end token `(b,)`: CLIP's largest number, else the last of the caption."""
        if self.tower.pool_type == "argmax":
            return tokens.argmax(dim=1)
        index = torch.arange(tokens.shape[1], device=tokens.device)
        return (index * (tokens != self.tower.pad_id)).amax(dim=1)


def _tiny_tower(config: TextEncoderConfig) -> TextTransformer:
    tower = TextTransformer(
        context_length=config.context_length or 16,
        width=config.width,
        heads=config.heads,
        layers=config.layers,
        output_dim=None,  # no projection: nothing behind the features would train it
        output_tokens=True,
    )
    tower.token_embedding.requires_grad_(False)
    return tower


def _load_tower(config: TextEncoderConfig) -> TextTransformer:
    """Build an open_clip model from local files and keep its frozen text tower."""
    name, checkpoint = config.architecture, config.checkpoint
    _refuse_unknown(name, checkpoint)
    try:
        model = open_clip.create_model(
            name,
            # An absolute path is never taken for the tag of a download.
            pretrained=None if checkpoint is None else str(Path(checkpoint).resolve()),
            force_custom_text=True,  # one layout of modules for all towers
            require_pretrained=True,
        )
    except Exception as error:  # a foreign file: open_clip, torch and json each fail in their way
        raise ValueError(
            f"cannot load the weights of {name!r} from {checkpoint or name!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    tower = model.text
    tower.output_tokens = True
    return tower.requires_grad_(False).eval()


def _refuse_unknown(name: str, checkpoint: str | None) -> None:
    """Refuse what open_clip would search for on the network, and files that are not there."""
    if name.startswith("hf-hub:"):
        raise ValueError(
            f"architecture {name!r} would be downloaded; fetch the folder once and give its path "
            f"as '{LOCAL_DIR}FOLDER'."
        )
    if name.startswith(LOCAL_DIR):
        folder = Path(name.removeprefix(LOCAL_DIR))
        if not (folder / "open_clip_config.json").is_file():
            raise ValueError(f"architecture {name!r}: no file open_clip_config.json in {folder}.")
    elif name not in open_clip.list_models():
        raise ValueError(
            f"unknown architecture {name!r}; known are {TINY!r}, {UMT5!r}, '{LOCAL_DIR}FOLDER' and "
            "the names that open_clip.list_models() returns."
        )
    elif not Path(str(checkpoint)).is_file():
        raise ValueError(
            f"checkpoint must be an existing file with weights of {name!r}, got {checkpoint!r}; "
            "names of published weights are not downloaded."
        )
    text_config = open_clip.get_model_config(name).get("text_cfg", {})
    if any(text_config.get(key) for key in ("hf_model_name", "hf_tokenizer_name", "embed_cls")):
        raise ValueError(
            f"architecture {name!r} has no plain CLIP text tower with CLIP's own vocabulary; "
            "choose one that has, such as 'ViT-L-14'."
        )


def _crop_context(tower: TextTransformer, length: int) -> None:
    """Shorten the context; with a causal mask the remaining tokens never saw the rest."""
    if length > tower.context_length or (length < tower.context_length and tower.attn_mask is None):
        raise ValueError(
            f"context_length must be {tower.context_length} "
            f"{'or less' if tower.attn_mask is not None else ''} with this tower, got {length}."
        )
    positions = tower.positional_embedding
    tower.positional_embedding = nn.Parameter(
        positions.detach()[:length].clone(), requires_grad=positions.requires_grad
    )
    if tower.attn_mask is not None:
        tower.attn_mask = tower.attn_mask[:length, :length].clone()
    tower.context_length = tower.num_pos = length
