"""`grn export`: what a run has learned, as one safetensors file and one JSON."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from grn_lightning.lit.checkpoints import read_checkpoint, trained_state
from grn_lightning.lit.coarse_to_fine import load_stage
from grn_lightning.models.code_transformer import CodeTransformer
from grn_lightning.models.grn_class import GRNClass, GRNClassConfig
from grn_lightning.models.grn_text import GRNText, GRNTextConfig
from grn_lightning.models.hashes import tensors_hash
from grn_lightning.models.pretrained import (
    assign,
    export_files,
    is_export,
    read_pretrained,
    select,
    write_pretrained,
)
from grn_lightning.models.stored_split import SplitTensors, split_as_plain
from grn_lightning.models.text_encoder import TINY, TextEncoderConfig, build_text_encoder
from grn_lightning.models.tokenizers import as_tokenizer_config, build_tokenizer
from grn_lightning.samplers import RefineConfig
from grn_lightning.scripts.calibrated import SAMPLING_FILE, calibrated
from grn_lightning.scripts.runs import STAGES, TrainedRun, open_run

_SOURCE_FIELDS = ("media", "num_frames", "fps", "image_size")  # of the data, what samples need


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and where it lies."""

    files: tuple[Path, ...]
    """JSON and tensors."""
    architecture: str
    """The network."""
    weights: Literal["averaged", "last"]
    """Which weights."""
    weights_hash: dict[str, str]
    """Hash of every part."""
    tokenizer_hash: str
    """Hash of the tokenizer that it is or belongs to."""

    def __str__(self) -> str:
        """Say what there is."""
        parts = ", ".join(f"{name} {value}" for name, value in self.weights_hash.items())
        lines = [f"{self.architecture}, {self.weights} weights: {parts}"]
        if "tokenizer" not in self.weights_hash:
            lines.append(f"belongs to tokenizer {self.tokenizer_hash}")
        return "\n".join([*lines, f"in {', '.join(repr(str(file)) for file in self.files)}"])


def export(
    checkpoint: Path,
    *,
    out: Path,
    weights: Literal["averaged", "last"] = "averaged",
    sampling: RefineConfig | None = None,
) -> ExportReport:
    """Write the trained networks of a run, without what only training needs.

    A generator comes with its text encoder if that was trained, and refers to its tokenizer by
    hash: export the tokenizer into the same folder. Exports are read by `grn_lightning.load` and
    by every command that takes a run.

    Args:
        checkpoint: Checkpoint of a tokenizer or generator, or the folder of its run.
        out: Name of the export, which becomes `NAME.json` and `NAME.safetensors`.
        weights: The average if the run kept one, or the weights of the last step.
        sampling: Settings of sampling to recommend for a generator; by default those that
            `grn calibrate` has found.

    Raises:
        ValueError: If there is no such run, or `out` exists or is the folder of a run.
    """
    if is_export(checkpoint):
        raise ValueError(f"'{checkpoint}' is an export already.")
    name = Path(str(export_files(out).info).removesuffix(".json"))
    if any(True for _ in name.rglob("*.ckpt")):
        raise ValueError(
            f"`out` must be the name of no run, got '{name}': the export would be taken for the "
            f"run there from then on. Give another, such as '{name}-export'."
        )
    run = open_run(checkpoint)
    config, state = run.configuration, trained_state(run.checkpoint, weights=weights)
    info: dict[str, Any] = {"kind": run.stage, "config": config, "training": _training(run)}
    modules: dict[str, nn.Module]
    if run.stage == "tokenizer":
        sizes = as_tokenizer_config(config["tokenizer"])
        modules = {"tokenizer": assign(lambda: build_tokenizer(sizes), select(state, "tokenizer"))}
    elif run.stage in STAGES:
        modules = _stage(run, state, info)
    else:
        modules = {"generator": _generator(config["generator"], select(state, "generator"))}
        info["sampling"] = sampling or _calibrated(run)
    if run.stage != "tokenizer":
        stored = read_checkpoint(run.checkpoint)
        info["tokenizer_hash"] = stored["tokenizer_hash"]
        info["tokenizer_config"] = stored.get("tokenizer_config")
        if config.get("text_encoder") is not None:
            _add_text_encoder(modules, info, select(state, "text_encoder"))
    info["training"]["weights"] = weights
    written = read_pretrained(write_pretrained(out, modules, info))
    return ExportReport(
        files=tuple(export_files(out)),
        architecture=written.architecture,
        weights=weights,
        weights_hash=written.info["weights_hash"],
        tokenizer_hash=written.info["tokenizer_hash"],
    )


def _generator(config: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    if "num_classes" in config:
        of_classes = GRNClassConfig(**config)
        return assign(lambda: GRNClass(of_classes), tensors)
    of_text = GRNTextConfig(**config)
    return assign(lambda: GRNText(of_text), tensors)


def _stage(run: TrainedRun, state: dict[str, Tensor], info: dict[str, Any]) -> dict[str, nn.Module]:
    """Network and split of a stage of coarse-to-fine prediction; completes `info`."""
    module = load_stage(run.checkpoint)
    network_config = module.network.config
    network = assign(lambda: CodeTransformer(network_config), select(state, "network"))
    config = {"generator": network_config, "text_encoder": run.configuration["text_encoder"]}
    modules: dict[str, nn.Module] = {"generator": network}
    if module.split is not None:
        config["split"] = split_as_plain(module.split)
        tensors = SplitTensors(module.split)
        if tensors.state_dict():
            modules["split"] = tensors
    info |= {"kind": "generator", "config": config}
    if run.stage == "fine":
        info["fine_mask"] = run.configuration["fine_mask"]
    return modules


def _add_text_encoder(
    modules: dict[str, nn.Module], info: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Store a text encoder that was trained; of one that was not, its hash."""
    config = TextEncoderConfig(**info["config"]["text_encoder"])
    if config.architecture != TINY:
        info["text_encoder_hash"] = tensors_hash(tensors)
        return
    encoder = build_text_encoder(config)
    encoder.load_state_dict(tensors)
    modules["text_encoder"] = encoder


def _calibrated(run: TrainedRun) -> dict[str, Any] | None:
    """Settings that a run was calibrated to, with how they came about."""
    file = run.folder / SAMPLING_FILE
    if calibrated(run) is None:  # refuses what is no such file
        return None
    return json.loads(file.read_text(encoding="utf-8"))


def _training(run: TrainedRun) -> dict[str, Any]:
    """What the run was trained on, without places of somebody's machine."""
    sources = [
        {**{name: source.get(name) for name in _SOURCE_FIELDS}, "path": Path(source["path"]).name}
        for source in run.data.get("sources", [])
    ]
    data = {"sources": sources, "image_size": run.data.get("image_size")} if sources else {}
    return {"step": run.step, "samples_seen": run.samples_seen, "data": data}
