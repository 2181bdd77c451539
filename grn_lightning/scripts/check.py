"""The tool behind `grn check`: what a training would learn, before or after it."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch

from grn_lightning.datasets.documents import is_pack
from grn_lightning.lit.code_stage import CodeStage
from grn_lightning.lit.data import ShardData
from grn_lightning.lit.generator import LitGenerator, load_generator
from grn_lightning.lit.packed import PackedShardData
from grn_lightning.lit.preflight import (
    CheckReport,
    Finding,
    Status,
    check_module,
    merge_reports,
)
from grn_lightning.lit.tokenizer import LitTokenizer, load_tokenizer
from grn_lightning.scripts.runs import STAGES, choose_device, open_run

NUM_BATCHES = 8
"""Batches that are looked through for other shapes: sources take turns."""
EXPORT_BATCH = 2
"""Batch size where the settings of a training tell none."""
EDGE = 4
"""Positions along the edges of made-up clips."""


def check(
    run: Path,
    *,
    data: Path | None = None,
    tokenizer: str | None = None,
    num_samples: int = 2,
    device: str = "auto",
) -> CheckReport:
    """Check that a trained network means the same in training, in the cache and in sampling.

    `grn check -c FILE ...` with the command line of `grn fit` checks a training before it begins.

    Args:
        run: Folder of a run, a checkpoint, or an export.
        data: Shards to take samples from, if not those of the training.
        tokenizer: Where the generator's tokenizer lies, if not where it lay in training.
        num_samples: Samples of each shape that are looked at.
        device: "auto", "cpu" or "cuda".

    Returns:
        A table; the command ends with 1 if something in it is wrong.

    Raises:
        ValueError: If there is nothing that can be checked.
    """
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1, got {num_samples}.")
    trained = open_run(run)
    if trained.stage in STAGES:
        raise ValueError(
            f"'{trained.checkpoint}' is a stage of coarse-to-fine prediction, which is not checked."
        )
    try:
        module = _load(trained.checkpoint, trained.stage, tokenizer)
    except ValueError as error:  # of another tokenizer, damaged, incomplete
        return CheckReport((Finding("loading", Status.WRONG, str(error)),), 0.0)
    module = module.to(choose_device(device))
    loading = Finding("loading", Status.OK, f"{trained.checkpoint}, step {trained.step}")
    found, batches = _batches_of(module, trained.data, data)
    reports = [check_module(module, one, num_samples=num_samples) for one in batches]
    report = merge_reports(reports)
    return CheckReport((loading, found, *report.findings), report.seconds)


def check_training(module: L.LightningModule, data: L.LightningDataModule) -> CheckReport:
    """Check a training that has not begun; `grn check -c FILE` calls it.

    Args:
        module: The stage, not yet built.
        data: Where its batches come from.

    Raises:
        ValueError: If networks or data cannot be built.
    """
    module.configure_model()
    if isinstance(data, PackedShardData) and isinstance(module, LitGenerator):
        data.measure_by(module)
    return merge_reports([check_module(module, one) for one in _distinct_batches(data)])


def _load(checkpoint: Path, stage: str, tokenizer: str | None) -> LitTokenizer | LitGenerator:
    if stage == "generator":
        return load_generator(checkpoint, tokenizer=tokenizer)
    network = load_tokenizer(checkpoint)
    module = LitTokenizer(network.config)
    module.tokenizer = network
    return module.eval()


def _distinct_batches(data: L.LightningDataModule) -> Iterator[dict[str, Any]]:
    """Yield the first batch of each shape."""
    data.prepare_data()
    data.setup("fit")
    seen = set()
    for batch in islice(data.train_dataloader(), NUM_BATCHES):
        if is_pack(batch):  # checked by its first document
            yield batch
            continue
        field = "codes" if "codes" in batch else "clips"
        if (shape := (field, *batch[field].shape[1:])) not in seen:
            seen.add(shape)
            yield batch


def _batches_of(
    module: LitTokenizer | LitGenerator, settings: dict[str, Any], path: Path | None
) -> tuple[Finding, list[dict[str, Any]]]:
    """Return samples of the training's data, or made-up ones where it is gone."""
    settings = _whole_settings(module, settings)
    if path is not None:
        sources = [{**source, "path": str(path)} for source in settings["sources"]][-1:]
        settings = {**settings, "sources": sources}
    try:
        if not settings["sources"]:
            hint = "" if path is None else " Leave `--data` out: made-up samples are checked then."
            raise ValueError(f"the training data is not known, nor how shards were read.{hint}")
        shards = ShardData(**{**settings, "loader": {"num_workers": 0}})
        batches = [_moved(batch, module.device) for batch in _distinct_batches(shards)]
    except (ValueError, TypeError, FileNotFoundError) as error:  # gone, or of an older version
        if path is not None:
            raise
        text = f"{error} Made-up samples are checked instead; `--data` takes other shards."
        return Finding("data", Status.NOTE, text), [_moved(_made_up(module), module.device)]
    paths = ", ".join(str(source["path"]) for source in settings["sources"])
    return Finding("data", Status.OK, paths), batches


def _whole_settings(
    module: LitTokenizer | LitGenerator, settings: dict[str, Any]
) -> dict[str, Any]:
    """Return settings of the data with what an export leaves out: batches, and conditions."""
    sources = [
        {"batch_size": EXPORT_BATCH} | {key: x for key, x in source.items() if x is not None}
        for source in settings.get("sources", [])
    ]
    told: dict[str, Any] = {}
    if isinstance(module, CodeStage) and "with_classes" not in settings:
        if module.is_text:
            told = {"with_captions": "with_text_features" not in settings}
        else:
            told = {"with_classes": True, "num_classes": module.null_class}
    return {**told, **settings, "sources": sources}


def _moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def _made_up(module: LitTokenizer | LitGenerator) -> dict[str, Any]:
    """Return noise in the shape that the networks read."""
    config = module.tokenizer.config
    frames, rows, columns = 1 + config.temporal_stride, EDGE, EDGE
    batch: dict[str, Any] = {"sample_index": torch.arange(2)}
    if isinstance(module, CodeStage):
        if module.is_text:
            batch["captions"] = ["", "noise"]
        else:
            frames, (rows, columns) = 1, module.generator_config.grid_size  # type: ignore[union-attr]
            batch["class_labels"] = torch.tensor([0, module.null_class - 1])
    size = (frames, rows * config.spatial_stride, columns * config.spatial_stride)
    noise = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    return batch | {"clips": noise * 2 - 1}
