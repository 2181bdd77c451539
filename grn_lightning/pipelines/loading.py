"""Exports made ready to be used: a tokenizer, or a generator with whatever it needs to draw."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from grn_lightning.models.code_transformer import CodeTransformer
from grn_lightning.models.grn_text import GRNTextConfig
from grn_lightning.models.hashes import weights_hash
from grn_lightning.models.pretrained import Pretrained, read_pretrained
from grn_lightning.models.text_encoder import TextEncoder, TextEncoderConfig, build_text_encoder
from grn_lightning.models.tokenizer import HBQTokenizer
from grn_lightning.models.tokenizers import Tokenizer
from grn_lightning.pipelines.coarse_to_fine import CoarseToFinePipeline
from grn_lightning.pipelines.conditions import Condition
from grn_lightning.pipelines.fit import check_text_channels, target_of
from grn_lightning.pipelines.generator import GeneratorPipeline
from grn_lightning.pipelines.stages import load_stage_export
from grn_lightning.samplers import RefineConfig
from grn_lightning.samplers.config import config_from_plain


class LonePipeline(GeneratorPipeline):
    """A generator whose tokenizer or text encoder is not at hand.

    It gives logits, and samples as elements; what needs the missing part says so.
    """

    def __post_init__(self) -> None:
        """Look that the parts fit that there are."""
        config = self.generator.config
        if self._tokenizer_or_none is not None:
            self.target = target_of(config, self.tokenizer.config)
        if isinstance(config, GRNTextConfig) and self.text_encoder is not None:
            check_text_channels(config, self.text_encoder)

    @property
    def tokenizer(self) -> HBQTokenizer:
        """Whose codes the generator knows.

        Raises:
            ValueError: If it is not there.
        """
        if self._tokenizer_or_none is None:
            raise ValueError(
                "this generator was loaded without its tokenizer, which nothing here can replace; "
                "give it to `grn_lightning.load` as `tokenizer`, or to a command as `--tokenizer`."
            )
        return self._tokenizer_or_none

    @tokenizer.setter
    def tokenizer(self, value: HBQTokenizer | None) -> None:
        self._tokenizer_or_none = value

    @property
    def _parts(self) -> dict[str, nn.Module]:
        parts = {
            "generator": self.generator,
            "tokenizer": self._tokenizer_or_none,
            "text_encoder": self.text_encoder,
        }
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes of the weights of the parts that there are, by name."""
        return {name: weights_hash(part) for name, part in self._parts.items()}

    def to(self, device: torch.device | str) -> "LonePipeline":
        """Move all parts that there are, in place."""
        for part in self._parts.values():
            part.to(device)
        return self

    def condition(self, batch: Any) -> Condition:
        """Return what samples are generated from; captions need the text encoder.

        Raises:
            ValueError: If it is not there, or the batch lacks what is needed.
        """
        if self.is_text and self.text_encoder is None:
            raise ValueError(
                "this generator was loaded without its text encoder; name it to `grn convert` as "
                "`--text_encoder`, give its configuration to `grn_lightning.load` as "
                "`text_encoder`, or pass text features as the condition."
            )
        return super().condition(batch)


def load_export(
    path: str | Path,
    tokenizer: str | Path | Tokenizer | None = None,
    *,
    text_encoder: TextEncoder | TextEncoderConfig | None = None,
    fine: str | Path | None = None,
) -> Tokenizer | GeneratorPipeline | CoarseToFinePipeline | CodeTransformer:
    """Return what an export holds, ready to be used; see `grn_lightning.load`.

    Args:
        path: Name of the export, or either of its files.
        tokenizer: Of a generator: the network, or its export. None looks for it in the folder of
            the generator.
        text_encoder: Of a generator, where the export does not have or name one.
        fine: Stage 2 of coarse-to-fine prediction, for stage 1.

    Raises:
        ValueError: If the export is damaged, or parts do not belong together.
    """
    pretrained = read_pretrained(path)
    if pretrained.kind == "tokenizer":
        return pretrained.tokenizer()
    if isinstance(tokenizer, str | Path):
        tokenizer = read_pretrained(tokenizer).tokenizer()
    if pretrained.architecture == "CodeTransformer":
        return load_stage_export(path, tokenizer, fine)
    if not isinstance(tokenizer, HBQTokenizer | None):
        raise ValueError(f"'{pretrained.file}' refines codes of an HBQTokenizer; give that one.")
    found = find_tokenizer(pretrained, tokenizer)
    if isinstance(text_encoder, TextEncoderConfig):
        text_encoder = build_text_encoder(text_encoder).eval().requires_grad_(False)
    encoder = text_encoder or pretrained.text_encoder()
    generator: Any = pretrained.network()
    is_whole = found is not None and (encoder is not None or pretrained.architecture != "GRNText")
    kind = GeneratorPipeline if is_whole else LonePipeline
    return kind(generator, found, encoder, sampling_of(pretrained))  # type: ignore[arg-type]


def find_tokenizer(pretrained: Pretrained, given: HBQTokenizer | None) -> HBQTokenizer | None:
    """Return the tokenizer of a generator: the given one, or the one in its folder.

    Returns:
        The tokenizer; None if none was given and nobody knows which one it is.

    Raises:
        ValueError: If the given one is another one, or none was given and none is there.
    """
    expected = pretrained.tokenizer_hash
    if given is not None:
        found = weights_hash(given)
        if expected not in (None, found):
            raise ValueError(
                f"'{pretrained.file}' was trained on codes of tokenizer {expected}, but the given "
                f"one is tokenizer {found}. Give the former."
            )
        return given
    beside = pretrained.tokenizer_beside()
    if beside is not None:
        return read_pretrained(beside).hbq_tokenizer()
    if expected is not None:
        raise ValueError(
            f"'{pretrained.file}' was trained on codes of tokenizer {expected}, and no export in "
            f"'{pretrained.file.parent}' is that one. Give it as `tokenizer`, or copy it there."
        )
    return None


def sampling_of(pretrained: Pretrained) -> RefineConfig:
    """Return the settings of sampling that an export recommends, or the default ones.

    Raises:
        ValueError: If they are none that this version knows.
    """
    stored = pretrained.info.get("sampling") or {}
    try:
        if not isinstance(stored, dict):
            raise ValueError(f"no settings of sampling: {stored!r}.")
        plain = {name: x for name, x in stored.items() if name != "calibration"}  # how found
        return config_from_plain(plain)
    except ValueError as error:
        raise ValueError(f"'{pretrained.file}': {error}") from error
