"""`grn encode`: shards of pixels in, shards of codes out."""

import json
from dataclasses import dataclass
from pathlib import Path

import lightning as L
from lightning.pytorch.strategies import DDPStrategy

from grn_lightning.datasets.codes import CodeFacts
from grn_lightning.datasets.encoding import (
    CodeShardWriter,
    EncodingPlan,
    skipped_file,
    source_digest,
)
from grn_lightning.datasets.manifest import read_manifest
from grn_lightning.datasets.samples import SampleFormat, check_fields
from grn_lightning.datasets.shards import ShardSet
from grn_lightning.lit.cached import is_trainable, text_encoder_hash
from grn_lightning.lit.encode import CodeEncoder, ShardsToEncode, WriteCodes
from grn_lightning.lit.tokenizer import load_tokenizer
from grn_lightning.metrics.codes import CodeStatistics
from grn_lightning.models.hashes import weights_hash
from grn_lightning.models.text_encoder import TextEncoder, TextEncoderConfig, build_text_encoder
from grn_lightning.models.tokenizers import AnyTokenizerConfig
from grn_lightning.scripts.heldout import media_of
from grn_lightning.scripts.runs import ClipSize, open_run


@dataclass(frozen=True)
class EncodeReport:
    """What was encoded."""

    folder: Path
    """Where the code shards lie."""
    split: str
    """Which split."""
    num_samples: int
    """Samples in all shards."""
    num_shards: int
    """Shards."""
    num_bytes: int
    """Size of all shards."""
    num_source_bytes: int
    """Size of the shards that were encoded."""
    num_skipped: int
    """Samples that could not be read."""
    bits_per_pixel: float
    """Of the codes alone."""

    def __str__(self) -> str:
        """Tell it in two lines."""
        sizes = f"{self.num_bytes / 1e6:.1f} MB, source {self.num_source_bytes / 1e6:.1f} MB"
        text = (
            f"{self.split}: codes of {self.num_samples} samples in {self.num_shards} shards in "
            f"'{self.folder}' ({sizes}; {self.bits_per_pixel:.3f} bits per pixel)\n"
            f"  statistics in {self.split}.codes.json"
        )
        if self.num_skipped:
            text += f"; {self.num_skipped} samples could not be read: {self.split}-*.skipped.jsonl"
        return text


def _text_encoder(config: TextEncoderConfig | None) -> TextEncoder | None:
    if config is None:
        return None
    encoder = build_text_encoder(config)
    if is_trainable(encoder):
        raise ValueError(
            f"`text_encoder` must be a frozen one, got {config.architecture!r}, which is trained "
            "along with a generator: its features change with every step."
        )
    return encoder.eval()


def _trainer(accelerator: str, devices: int | str, num_nodes: int) -> L.Trainer:
    is_one = devices in (1, "1", "auto") and num_nodes == 1
    return L.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy="auto" if is_one else DDPStrategy(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _facts(
    config: AnyTokenizerConfig, tokenizer_hash: str, size: ClipSize, fps: float | None
) -> CodeFacts:
    if not config.has_codes:
        raise ValueError("the tokenizer has no quantizer, so there are no codes to be stored.")
    _, *grid = config.latent_shape(*size)
    return CodeFacts(
        tokenizer_hash=tokenizer_hash,
        num_rounds=(config.alphabet_size - 1).bit_length(),  # M with HBQ
        latent_channels=config.code_channels,
        grid=(grid[0], grid[1], grid[2]),
        size=(size.num_frames, size.height, size.width),
        fps=fps,
    )


def _check(tokenizer: Path | None, out: Path | None, shards: Path, batch_size: int) -> None:
    if tokenizer is None or out is None:
        raise ValueError(
            "`--tokenizer` (a run, checkpoint or export) and `--out` (a folder for the code "
            "shards) must be given."
        )
    if out.resolve() == shards.resolve():
        raise ValueError(f"`--out` must be another folder than the shards, got '{out}' twice.")
    if batch_size < 1:
        raise ValueError(f"`--batch_size` must be at least 1, got {batch_size}.")


def encode(
    shards: Path,
    *,
    tokenizer: Path | None = None,
    out: Path | None = None,
    split: str = "train",
    flip: bool = False,
    crop_scale: float | None = None,
    text_encoder: TextEncoderConfig | None = None,
    num_frames: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    fps: float | None = None,
    batch_size: int = 16,
    num_workers: int = 0,
    accelerator: str = "auto",
    devices: int | str = 1,
    num_nodes: int = 1,
) -> EncodeReport:
    """Encode shards of pictures or videos with a trained tokenizer, once for all epochs.

    Keys, order, classes and captions stay. An interrupted run goes on where it was when the same
    command is given again, also on another number of devices; other settings for the same folder
    are refused. A generator is trained from the codes by giving it their folder as `path`.

    Args:
        shards: Folder of shards.
        tokenizer: Run, checkpoint or export of the tokenizer.
        out: Folder of the code shards, another one.
        split: Split to encode.
        flip: Store codes of mirrored samples as well, for `horizontal_flip`. Never for digits,
            text or "moves left".
        crop_scale: Scale pictures to this multiple of the size and store the codes of their centre
            and their four corners, for `random_crop`; with `flip` the ten crops of LlamaGen at 1.1.
        text_encoder: Frozen text encoder whose features of the captions are stored too.
        num_frames: Frames of a clip, 1 for a picture; by default as the tokenizer was trained.
        image_size: Height and width in pixels, or one number for both; by default likewise.
        fps: Frames per second at which videos are read; by default likewise.
        batch_size: Samples encoded at a time on a device.
        num_workers: Processes per device that decode files.
        accelerator: "auto", "cpu" or "gpu".
        devices: Number of processes on this node.
        num_nodes: Number of nodes.

    Returns:
        What was written; `str` tells it to a person.

    Raises:
        ValueError: If shards, tokenizer and options do not fit together, or the folder holds other
            codes.
    """
    _check(tokenizer, out, shards, batch_size)
    assert tokenizer is not None
    assert out is not None
    source, network, encoder = (
        ShardSet.open(shards, split),
        load_tokenizer(tokenizer),
        _text_encoder(text_encoder),
    )
    media = media_of(source)
    size, fps = _size(tokenizer, shards, media, num_frames, image_size, fps)
    facts = _facts(network.config, weights_hash(network), size, fps)
    sample_format = SampleFormat(
        media=media,
        size=_scaled(size, crop_scale),
        num_frames=size.num_frames,
        fps=fps,
        with_captions=encoder is not None,
    )
    check_fields(source, sample_format, name=str(shards))
    split = "train" if split.endswith(".tar") else split
    plan = EncodingPlan(
        split=split,
        media=media,
        size=facts.size,
        fps=fps,
        flip=flip,
        crop_scale=crop_scale,
        tokenizer_hash=facts.tokenizer_hash,
        text_hash=None if encoder is None else text_encoder_hash(encoder),
        source=source_digest(source),
    )
    plan.check(out)
    plan.store(out)

    names = [f"{split}-{n:06d}.tar" for n in range(len(source.paths))]
    writer = CodeShardWriter(out, names, source.shard_sizes, split=split)
    data = ShardsToEncode(
        source, sample_format, writer, batch_size=batch_size, num_workers=num_workers
    )
    statistics = CodeStatistics(
        num_channels=facts.latent_channels,
        num_rounds=facts.num_rounds,
        alphabet_size=network.config.alphabet_size,
    )
    trainer = _trainer(accelerator, devices, num_nodes)
    trainer.callbacks.append(WriteCodes(writer, plan, facts, statistics))  # type: ignore[attr-defined]
    crop_size = None if crop_scale is None else (size.height, size.width)
    network_at_work = CodeEncoder(network, encoder, flip=flip, crop_size=crop_size)
    trainer.predict(network_at_work, data, return_predictions=False)
    return _report(out, split, source, names)


def _scaled(size: ClipSize, crop_scale: float | None) -> tuple[int, int]:
    """Return height and width to which pictures are scaled before they are cropped."""
    if crop_scale is None:
        return size.height, size.width
    if crop_scale < 1:
        raise ValueError(f"`--crop_scale` must be at least 1, got {crop_scale}.")
    return int(crop_scale * size.height), int(crop_scale * size.width)


def _size(
    tokenizer: Path,
    shards: Path,
    media: str,
    num_frames: int | None,
    image_size: int | tuple[int, int] | None,
    fps: float | None,
) -> tuple[ClipSize, float | None]:
    """Return size and rate: what is asked for, or else that of the tokenizer's training."""
    run = open_run(tokenizer)
    known = run.source(media=media, path=shards)
    size = run.choose_size(known, num_frames=num_frames, image_size=image_size)
    return size, fps if fps is not None or media == "image" else known.get("fps")


def _report(out: Path, split: str, source: ShardSet, names: list[str]) -> EncodeReport:
    manifest = read_manifest(out / f"{split}.manifest.json")
    statistics = json.loads((out / f"{split}.codes.json").read_text())
    lists = [skipped_file(out / name) for name in names]
    return EncodeReport(
        folder=out,
        split=split,
        num_samples=manifest.num_samples,
        num_shards=len(manifest.shards),
        num_bytes=sum(shard.num_bytes for shard in manifest.shards),
        num_source_bytes=sum(path.stat().st_size for path in source.paths),
        num_skipped=sum(len(f.read_text().splitlines()) for f in lists if f.is_file()),
        bits_per_pixel=statistics["bits_per_pixel"],
    )
