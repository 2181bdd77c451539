"""Runs and exports made ready to be used, from one path."""

from pathlib import Path

from grn_lightning.lit.checkpoints import read_checkpoint
from grn_lightning.lit.generator import load_generator
from grn_lightning.lit.tokenizer import load_tokenizer
from grn_lightning.models.pretrained import is_export
from grn_lightning.models.text_encoder import TextEncoder, TextEncoderConfig
from grn_lightning.models.tokenizer import HBQTokenizer
from grn_lightning.models.tokenizers import Tokenizer
from grn_lightning.pipelines import GeneratorPipeline
from grn_lightning.pipelines.loading import load_export


def load_trained(
    path: str | Path,
    tokenizer: str | Path | HBQTokenizer | None = None,
    *,
    text_encoder: TextEncoder | TextEncoderConfig | None = None,
) -> Tokenizer | GeneratorPipeline:
    """Return what lies at a path, ready to be used; see `grn_lightning.load`.

    Raises:
        ValueError: If nothing lies there, or parts do not belong together.
    """
    if is_export(path):
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(tokenizer)
        return load_export(path, tokenizer, text_encoder=text_encoder)
    if isinstance(tokenizer, HBQTokenizer) or text_encoder is not None:
        raise ValueError(
            f"'{path}' is a run, which knows its text encoder, and its tokenizer by path; give "
            "`tokenizer` as a path, or `grn export` the run."
        )
    if "generator" in read_checkpoint(path).get("hyper_parameters", {}):
        return load_generator(
            path, tokenizer=None if tokenizer is None else str(tokenizer)
        ).pipeline
    return load_tokenizer(path)
