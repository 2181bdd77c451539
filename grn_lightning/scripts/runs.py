"""Run folders: where a checkpoint lies, which stage it is of, and what it was trained on."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from grn_lightning.lit.checkpoints import find_checkpoint, read_checkpoint
from grn_lightning.models.code_transformer import CodeTransformer
from grn_lightning.models.pretrained import export_files, is_export, read_pretrained

_CHECKPOINTS = "checkpoints"  # Lightning's folder of checkpoints in a run
_NETWORKS = {
    "tokenizer": ("tokenizer",),
    "generator": ("generator", "text_encoder"),
    "raster": ("backbone", "split", "text_encoder"),
    "fine": ("backbone", "split", "text_encoder", "fine_mask"),
}

Stage = Literal["tokenizer", "generator", "raster", "fine"]
"""What was trained; "raster" and "fine" are the stages of coarse-to-fine prediction."""

STAGES = ("raster", "fine")
"""The plain baseline and stage 1, and stage 2."""


class ClipSize(NamedTuple):
    """Size of clips in pixels; a picture has one frame."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        """Return it as a person writes it."""
        return f"{self.num_frames} x {self.height} x {self.width}"


@dataclass(frozen=True)
class TrainedRun:
    """A checkpoint and what it says about itself."""

    checkpoint: Path
    """The file."""
    stage: Stage
    """What was trained."""
    step: int
    """Optimizer steps it has seen."""
    samples_seen: int
    """Training samples it has seen, over all devices."""
    data: dict[str, Any]
    """Hyper-parameters of its data module; empty if it had none."""
    configuration: dict[str, Any] = field(default_factory=dict)
    """Sizes of its networks by name, as plain data."""

    @property
    def folder(self) -> Path:
        """Folder of the run: the one that holds `checkpoints/`, or else the file's own.

        Of an export, the folder beside it that has its name.
        """
        parent = self.checkpoint.parent
        if is_export(self.checkpoint):
            return parent / export_files(self.checkpoint).info.stem
        return parent.parent if parent.name == _CHECKPOINTS else parent

    def source(self, *, media: str | None = None, path: Path | None = None) -> dict[str, Any]:
        """Return the source of shards it was trained on, the longest clips if there are several.

        Args:
            media: Only "image" or "video" sources.
            path: Prefer the source that lies there.

        Returns:
            Plain data of a `ShardSource`; empty if there is none.
        """
        sources = [s for s in self.data.get("sources", []) if media in (None, s["media"])]
        sources.sort(key=lambda s: s["num_frames"])
        here = [s for s in sources if path and Path(s["path"]).resolve() == path.resolve()]
        return (here or sources or [{}])[-1]

    def choose_size(
        self,
        source: dict[str, Any],
        *,
        num_frames: int | None,
        image_size: int | tuple[int, int] | None,
    ) -> ClipSize:
        """Return the size asked for, or where nothing is asked, that of a source of the training.

        Args:
            source: See `source`.
            num_frames: Frames asked for.
            image_size: Height and width asked for, or one number for both.

        Raises:
            ValueError: If neither says it.
        """
        frames = num_frames or source.get("num_frames")
        size = image_size or source.get("image_size") or self.data.get("image_size")
        if not frames or not size:
            raise ValueError(
                "the checkpoint does not tell the size of its training data; give `--num_frames` "
                "(1 for images) and `--image_size`."
            )
        height, width = (size, size) if isinstance(size, int) else size
        return ClipSize(frames, height, width)


def open_run(path: Path) -> TrainedRun:
    """Read what a checkpoint says about itself.

    Args:
        path: A `.ckpt` file, a folder under which the newest `last.ckpt` is taken, or an export.

    Raises:
        ValueError: If there is none, or neither stage has written it.
    """
    if is_export(path):
        return _open_export(path)
    file = find_checkpoint(path)
    checkpoint = read_checkpoint(file)
    hyper_parameters = checkpoint.get("hyper_parameters", {})
    stage: Stage = "tokenizer"
    if "generator" in hyper_parameters:
        stage = "generator"
    elif "backbone" in hyper_parameters:
        stage = "fine" if "fine_mask" in hyper_parameters else "raster"
    elif not isinstance(hyper_parameters.get("tokenizer"), dict):
        raise ValueError(
            f"'{file}' is a checkpoint neither of a tokenizer nor of a generator: its "
            f"hyper-parameters are {sorted(hyper_parameters)}. Give one that `grn fit` has written."
        )
    return TrainedRun(
        checkpoint=file,
        stage=stage,
        step=checkpoint.get("global_step", 0),
        samples_seen=checkpoint.get("samples_seen", 0),
        data=dict(checkpoint.get("datamodule_hyper_parameters", {})),
        configuration={name: hyper_parameters.get(name) for name in _NETWORKS[stage]},
    )


def _open_export(path: Path) -> TrainedRun:
    pretrained = read_pretrained(path, check=False)
    training = pretrained.info.get("training", {})  # converted weights do not know it
    stage: Stage = pretrained.kind
    if pretrained.architecture == CodeTransformer.__name__:
        stage = "raster" if pretrained.info["config"]["generator"]["is_causal"] else "fine"
    return TrainedRun(
        checkpoint=pretrained.file,
        stage=stage,
        step=training.get("step", 0),
        samples_seen=training.get("samples_seen", 0),
        data=training.get("data", {}),
        configuration=pretrained.info["config"],
    )


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, as `sha256sum` prints it; of a folder that of such a list."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = [f"{file_hash(file)}  {file.relative_to(path)}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def choose_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is the first GPU if there is one.

    Raises:
        ValueError: If there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
    except RuntimeError as error:
        raise ValueError(f"`device` must be 'auto', 'cpu' or 'cuda', got {name!r}.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"`device` is {name!r}, but torch finds no GPU here; leave it out.")
    return device
