"""Runs and exports made ready to be used, from one path."""

from pathlib import Path

from grn_lightning.lit.checkpoints import read_checkpoint
from grn_lightning.lit.coarse_to_fine import LitFine, load_stage
from grn_lightning.lit.generator import load_generator
from grn_lightning.lit.tokenizer import load_tokenizer
from grn_lightning.models.code_transformer import CodeTransformer
from grn_lightning.models.pretrained import is_export, read_pretrained
from grn_lightning.models.text_encoder import TextEncoder, TextEncoderConfig
from grn_lightning.models.tokenizers import Tokenizer
from grn_lightning.pipelines import GeneratorPipeline
from grn_lightning.pipelines.coarse_to_fine import CoarseToFinePipeline
from grn_lightning.pipelines.loading import load_export
from grn_lightning.pipelines.stages import TrainedStage, as_stage, join_stages
from grn_lightning.samplers.coarse_to_fine import CoarseToFineConfig


def load_trained(
    path: str | Path,
    tokenizer: str | Path | Tokenizer | None = None,
    *,
    text_encoder: TextEncoder | TextEncoderConfig | None = None,
    fine: str | Path | None = None,
) -> Tokenizer | GeneratorPipeline | CoarseToFinePipeline | CodeTransformer:
    """Return what lies at a path, ready to be used; see `grn_lightning.load`.

    Raises:
        ValueError: If nothing lies there, or parts do not belong together.
    """
    if is_export(path) and (fine is None or is_export(fine)):
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(tokenizer)
        return load_export(path, tokenizer, text_encoder=text_encoder, fine=fine)
    if isinstance(tokenizer, Tokenizer) or text_encoder is not None:
        raise ValueError(
            f"'{path}' is a run, which knows its text encoder, and its tokenizer by path; give "
            "`tokenizer` as a path, or `grn export` the run."
        )
    place = None if tokenizer is None else str(tokenizer)
    if is_stage(path):
        stage = open_stage(path, place)
        is_half = stage.split is not None or not stage.network.config.is_causal
        if fine is None and is_half:
            return stage.network
        return join_stages(stage, None if fine is None else open_stage(fine, place))
    if "generator" in read_checkpoint(path).get("hyper_parameters", {}):
        return load_generator(path, tokenizer=place).pipeline
    return load_tokenizer(path)


def is_stage(path: str | Path) -> bool:
    """Whether a stage of coarse-to-fine prediction, or its plain baseline, lies there.

    Raises:
        ValueError: If nothing that was trained lies there.
    """
    if is_export(path):
        info = read_pretrained(path, check=False).info
        return info.get("architecture") == CodeTransformer.__name__
    return "backbone" in read_checkpoint(path).get("hyper_parameters", {})


def open_stage(path: str | Path, tokenizer: str | None = None) -> TrainedStage:
    """Return a stage from a run, a checkpoint or an export.

    Args:
        path: Where it lies.
        tokenizer: Where its tokenizer lies, if not where it is expected.

    Raises:
        ValueError: If it is no stage, or the tokenizer another one than in training.
    """
    if is_export(path):
        return as_stage(
            read_pretrained(path), None if tokenizer is None else load_tokenizer(tokenizer)
        )
    module = load_stage(path, tokenizer=tokenizer)
    return TrainedStage(
        network=module.network,
        split=module.split,
        tokenizer=module.tokenizer,
        text_encoder=module.text_encoder if module.is_text else None,
        fine_mask=module.fine_mask if isinstance(module, LitFine) else "train+sample",
        name=str(path),
    )


def open_coarse_to_fine(
    path: str | Path,
    fine: str | Path | None = None,
    *,
    tokenizer: str | None = None,
    sampling: CoarseToFineConfig | None = None,
) -> CoarseToFinePipeline:
    """Join stages from runs and exports alike; see `join_stages`.

    Raises:
        ValueError: If they are no such stages, or do not belong together.
    """
    second = None if fine is None else open_stage(fine, tokenizer)
    return join_stages(open_stage(path, tokenizer), second, sampling=sampling)
