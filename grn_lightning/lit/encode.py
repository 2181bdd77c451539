"""Encoding shards with a trained tokenizer, on as many devices as the Trainer has.

Every process decodes, encodes and writes its own shards (`datasets/encoding.py`); there is nothing
to exchange until the end, when the counts of codes are added up and one process lists what there
is.
"""

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import five_crop
from tqdm import tqdm

from grn_lightning.datasets.codes import (
    CODES,
    CodeFacts,
    TextFeatures,
    codes_member,
    decode_codes,
)
from grn_lightning.datasets.encoding import (
    CodeShardWriter,
    Encoded,
    EncodingPlan,
    ShardBatches,
    SourceBatch,
    SourceBatches,
    code_samples,
    finish_split,
)
from grn_lightning.datasets.files import write_json
from grn_lightning.datasets.samples import SampleFormat
from grn_lightning.datasets.shards import ShardSet
from grn_lightning.metrics.codes import CodeStatistics
from grn_lightning.models.text_encoder import TextEncoder
from grn_lightning.models.tokenizers import Tokenizer

_MAX_HISTOGRAM = 2**18  # numbers; larger ones are left out of the statistics


class ShardsToEncode(L.LightningDataModule):
    """Batches of the shards of this process that are not finished yet.

    Args:
        shards: The source.
        sample_format: How a sample is read.
        writer: Knows which shards are finished.
        batch_size: Samples encoded at a time.
        num_workers: Loader processes per device.
    """

    def __init__(
        self,
        shards: ShardSet,
        sample_format: SampleFormat,
        writer: CodeShardWriter,
        *,
        batch_size: int,
        num_workers: int,
    ):
        super().__init__()
        self.shards, self.sample_format, self.writer = shards, sample_format, writer
        self.batch_size, self.num_workers = batch_size, num_workers
        self.finished: list[int] = []
        self.waiting: list[int] = []

    def setup(self, stage: str) -> None:
        """Divide the shards among processes, and look which are finished."""
        assert self.trainer is not None
        mine = range(self.trainer.global_rank, len(self.shards.paths), self.trainer.world_size)
        filled = [n for n in mine if self.shards.shard_sizes[n]]
        self.finished = [n for n in filled if self.writer.path(n).is_file()]
        self.waiting = [n for n in filled if n not in self.finished]

    def predict_dataloader(self) -> DataLoader[Any]:
        """Decoded samples, shard by shard."""
        sizes = self.shards.shard_sizes
        return DataLoader(
            SourceBatches(self.shards, self.sample_format),
            batch_size=None,  # the data set gives batches, so that none lies across two shards
            sampler=ShardBatches(sizes, self.waiting, batch_size=self.batch_size),
            num_workers=self.num_workers,
        )

    def transfer_batch_to_device(
        self, batch: SourceBatch, device: torch.device, dataloader_idx: int
    ) -> SourceBatch:
        """Move the clips; Lightning would walk through every byte of the rest."""
        return batch._replace(clips=batch.clips.to(device))


class CodeEncoder(L.LightningModule):
    """Tokenizer and text encoder at work; nothing is trained.

    Args:
        tokenizer: Frozen, in evaluation mode.
        text_encoder: Likewise; None leaves captions as they are.
        flip: Whether mirrored clips are encoded too.
        crop_size: Height and width of the five crops that are encoded (centre and corners); None
            encodes the clips as they are.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        text_encoder: TextEncoder | None,
        *,
        flip: bool,
        crop_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.flip = flip
        self.crop_size = crop_size

    def predict_step(self, batch: SourceBatch, batch_idx: int) -> Encoded | None:
        """Encode a batch; None if nothing of it could be read."""
        if not batch.keys:
            return None
        codes = {
            codes_member(crop, is_flipped): self.tokenizer.tokenize(
                clips.flip(-1) if is_flipped else clips
            )
            for crop, clips in enumerate(self._crops(batch.clips))
            for is_flipped in (False, True)[: 1 + self.flip]
        }
        text = None if self.text_encoder is None else self._features(batch, self.text_encoder)
        return Encoded(codes, text)

    def _crops(self, clips: Tensor) -> list[Tensor]:
        """Return the clips, or centre, top left, top right, bottom left, bottom right of them."""
        if self.crop_size is None:
            return [clips]
        *corners, centre = five_crop(clips, list(self.crop_size))
        return [centre, *corners]

    def _features(self, batch: SourceBatch, encoder: nn.Module) -> list[TextFeatures]:
        captions = [carried.get("txt", b"").decode().strip() for carried in batch.carried]
        condition = encoder(encoder.tokenize(captions).to(self.device))  # type: ignore[operator]
        return [TextFeatures(*pair) for pair in zip(*condition, strict=True)]


class WriteCodes(L.Callback):
    """Writes code shards as they come, and what there is at the end.

    Args:
        writer: Of this process.
        plan: What is encoded.
        facts: What the codes mean.
        statistics: Counts codes.
    """

    def __init__(
        self,
        writer: CodeShardWriter,
        plan: EncodingPlan,
        facts: CodeFacts,
        statistics: CodeStatistics,
    ):
        self.writer, self.plan, self.facts, self.statistics = writer, plan, facts, statistics
        self.bar: tqdm[Any] | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show a bar over the samples of the first process, which stand for all."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.statistics.to(pl_module.device)
        total = sum(data.shards.shard_sizes[shard] for shard in data.waiting)
        self.bar = tqdm(
            total=total,
            desc=f"encode {self.plan.split}",
            unit="sample",
            disable=not trainer.is_global_zero,
        )
        if data.finished:
            self.bar.set_postfix_str(f"{len(data.finished)} shards were there")

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: SourceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write a batch."""
        if outputs is None:
            self.writer.add(batch, iter(()))
        else:
            self.statistics.update(outputs.codes[CODES])
            hashed = self.plan.text_hash
            self.writer.add(batch, code_samples(batch, outputs, self.facts, text_hash=hashed))
        if self.bar is not None:
            self.bar.update(len(batch.keys) + len(batch.skipped))

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leave no half shard behind."""
        self.writer.abort()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the codes that were there before, add up all counts, and list what there is."""
        if self.bar is not None:
            self.bar.close()
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        for shard in data.finished:
            _count(self.writer.path(shard), self.statistics)
        report = self.statistics.compute()  # adds up over processes
        trainer.strategy.barrier("codes")
        if trainer.is_global_zero:
            sizes = zip(self.writer.names, self.writer.sizes, strict=True)
            names = [name for name, size in sizes if size]
            finish_split(self.writer.folder, names, split=self.plan.split)
            file = self.writer.folder / f"{self.plan.split}.codes.json"
            write_json(file, _statistics(report, self.facts))
        trainer.strategy.barrier("manifest")


def _count(path: Path, statistics: CodeStatistics) -> None:
    """Count the codes of a finished shard, which are checked on the way."""
    shards = ShardSet.open(path.parent, path.name)
    for index in range(len(shards)):
        fields = shards.read(index, (CODES, "json")).fields
        codes, _ = decode_codes(fields[CODES], json.loads(fields["json"])[CODES])
        statistics.update(codes[None].to(statistics.histogram.device))


def _statistics(report: Any, facts: CodeFacts) -> dict[str, Any]:
    """Return what the codes of a set look like, as JSON holds it."""
    histogram: Tensor = report.histogram
    positions = torch.Size(facts.grid).numel()
    num_pixels = torch.Size(facts.size).numel()
    return {
        "num_samples": int(histogram.sum()) // (histogram.shape[0] * positions),
        **facts.plain(),
        "bits_per_sample": facts.num_bits,
        "bits_per_pixel": facts.num_bits / num_pixels,
        "rounds": {
            name: getattr(report, name).reshape(-1).tolist()
            for name in ("ones_fraction", "entropy", "dead_fraction")
        },
        "channels": {
            name: getattr(report, name).reshape(-1).tolist() for name in ("usage", "perplexity")
        },
        "histogram": histogram.tolist() if histogram.numel() <= _MAX_HISTOGRAM else None,
    }
