"""Whatever can draw, opened: a run, a checkpoint, an export, or published weights by name."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grn_lightning.lit.generator import load_generator
from grn_lightning.lit.tokenizer import load_tokenizer
from grn_lightning.models.pretrained import export_files, is_export
from grn_lightning.models.tokenizer import HBQTokenizer
from grn_lightning.pipelines import GeneratorPipeline
from grn_lightning.pipelines.loading import load_export
from grn_lightning.pipelines.published import fetch, load_published, sampling_of
from grn_lightning.pipelines.registry import published
from grn_lightning.samplers import RefineConfig
from grn_lightning.samplers.presets import get_preset
from grn_lightning.scripts.calibrated import calibrated
from grn_lightning.scripts.runs import STAGES, TrainedRun, file_hash, open_run

AUTO = "auto"
"""Settings that come with the weights."""

_DEFAULTS = RefineConfig()


def identity(checkpoint: Path) -> dict[str, Any]:
    """Return path and hash of a checkpoint or export, for a list of samples."""
    file = export_files(checkpoint).tensors if is_export(checkpoint) else checkpoint
    return {"checkpoint": str(checkpoint), "checkpoint_sha256": file_hash(file)}


@dataclass(frozen=True)
class Opened:
    """A pipeline, and what its origin says about it."""

    pipeline: GeneratorPipeline
    """Ready to draw."""
    file: Path
    """Where the generator's weights came from."""
    run: TrainedRun | None
    """What the training says, where there was one here."""
    weights: str | None = None
    """Name of published weights."""

    def facts(self) -> dict[str, Any]:
        """Return what identifies the weights, for a list of samples."""
        facts = identity(self.file)
        return facts if self.weights is None else {"weights": self.weights, **facts}

    def recipe(self, tokenizer: Path | None) -> dict[str, Any]:
        """Return what a recipe says of the weights."""
        return {
            "checkpoint": str(self.file),
            "tokenizer": None if tokenizer is None else str(tokenizer),
            "published": self.weights,
            "weights": self.pipeline.hashes,
        }

    def sampling(self, name: str, given: RefineConfig, task: str) -> RefineConfig:
        """Return the settings of sampling.

        Args:
            name: "auto" for those that came with the weights, or a preset's name.
            given: Settings by option; where they differ from their defaults, they win.
            task: What is drawn: "class", "image", "video" or "first_frame".

        Raises:
            ValueError: If there is no such preset.
        """
        base = get_preset(name) if name != AUTO else self.pipeline.sampling
        if name == AUTO and self.weights is not None:
            base = sampling_of(self.weights).get(task, base)
        changed = {
            key: value for key, value in vars(given).items() if value != getattr(_DEFAULTS, key)
        }
        return replace(base, **changed) if changed else base


def _refuse_stages(run: TrainedRun) -> None:
    if run.stage in STAGES:
        raise ValueError(
            f"'{run.checkpoint}' is a stage of coarse-to-fine prediction, which does not refine: "
            "`grn sample` draws from it, `grn evaluate samples` and `grn bench fine` judge it."
        )


def open_drawer(
    checkpoint: Path | None,
    weights: str | None,
    *,
    folder: Path,
    tokenizer: Path | None,
    run: TrainedRun | None = None,
) -> Opened:
    """Open what is to draw.

    Args:
        checkpoint: Checkpoint of a generator, the folder of its run, or an export.
        weights: Name of published weights, instead.
        folder: Where published weights lie, or are downloaded to.
        tokenizer: Where the tokenizer lies, if not where it is expected.
        run: From `open_run` of that checkpoint, where it was opened already.

    Raises:
        ValueError: If neither or both are given, or they cannot be opened.
    """
    if (checkpoint is None) == (weights is None):
        raise ValueError(
            "give either a checkpoint, run or export, or the name of published weights by "
            "`--weights` (`grn weights` lists them)."
        )
    if weights is not None:
        published(weights)  # refuses unknown names before anything is loaded
        network = None if tokenizer is None else load_tokenizer(tokenizer)
        if not isinstance(network, HBQTokenizer | None):
            raise ValueError(
                f"'{weights}' refines codes of an HBQTokenizer, and '{tokenizer}' is a "
                f"{type(network).__name__}; leave `--tokenizer` out, or name another."
            )
        pipeline = load_published(weights, folder, tokenizer=network)
        return Opened(pipeline, fetch(weights, folder), None, weights)
    assert checkpoint is not None
    run = run or open_run(checkpoint)
    _refuse_stages(run)
    if is_export(checkpoint):
        network = None if tokenizer is None else load_tokenizer(tokenizer)
        loaded = load_export(checkpoint, network)
        if not isinstance(loaded, GeneratorPipeline):
            raise ValueError(f"'{checkpoint}' is a tokenizer, which draws nothing.")
        return Opened(loaded, checkpoint, run)
    place = None if tokenizer is None else str(tokenizer)
    pipeline = load_generator(run.checkpoint, tokenizer=place).pipeline
    pipeline.sampling = calibrated(run) or pipeline.sampling
    return Opened(pipeline, run.checkpoint, run)
