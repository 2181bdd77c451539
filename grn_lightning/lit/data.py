"""Pictures and films of shards, or their codes, with classes or captions, to train and validate.

Training data are endless: which samples a step takes is a function of the seed and of the samples
taken before it. Train by `max_steps`, validate every so many batches
(`val_check_interval: 1000`, `check_val_every_n_epoch: null`), and with several devices set
`use_distributed_sampler: false`. A checkpoint stores how many samples were taken from each source;
a resumed run goes on with the next one, bit for bit, and also on another number of devices, with
another batch size, other workers or further sources.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Sampler

from grn_lightning.datasets.codes import TEXT
from grn_lightning.datasets.order import (
    EndlessBatchSampler,
    OrderedSource,
    Position,
    SampleOrder,
    SampleRequest,
    TrainingOrder,
    ValidationBatchSampler,
)
from grn_lightning.datasets.samples import (
    Item,
    SampleFormat,
    SampleReader,
    ShardDataset,
    check_fields,
    collate,
    holds_codes,
)
from grn_lightning.datasets.shards import ShardSet
from grn_lightning.lit.sources import LoaderConfig as LoaderConfig
from grn_lightning.lit.sources import ShardSource as ShardSource
from grn_lightning.lit.sources import as_pair, refuse


class _ResumableLoader(DataLoader[Item]):
    """A loader that continues where the training stands; the data module stores where that is.

    Without these methods Lightning warns at every resume that its place is lost.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: see `ShardData.state_dict`."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: the sampler asks the data module."""


class ShardData(L.LightningDataModule):
    """Batches from WebDataset shards; see the module's docstring and `Batch`.

    With several sources every training step takes one of them, in turns that follow their
    weights and are the same on all devices; validation reads all sources one after the other.

    Args:
        sources: The sets of shards; plain dictionaries, as checkpoints hold them, do as well.
        image_size: Height and width in pixels, or one number for both.
        num_classes: Number of classes, for models that need it; larger labels count as bad.
        with_classes: Put `class_labels` into the batch.
        with_captions: Put `captions` into the batch.
        with_text_features: Put `text_embeds` and `text_mask` into the batch: features of the
            captions that `grn encode --text_encoder` has stored, in place of a frozen encoder.
        seed: Seed of order, flips and windows.
        loader: How samples are loaded.

    Raises:
        ValueError: If two sources share a name, or a value is out of range.
    """

    def __init__(
        self,
        sources: list[ShardSource],
        *,
        image_size: int | tuple[int, int],
        num_classes: int | None = None,
        with_classes: bool = False,
        with_captions: bool = False,
        with_text_features: bool = False,
        seed: int = 0,
        loader: LoaderConfig | None = None,
    ):
        super().__init__()
        self.sources = [s if isinstance(s, ShardSource) else ShardSource(**s) for s in sources]
        self.loader = (
            LoaderConfig(**loader) if isinstance(loader, dict) else loader or LoaderConfig()
        )
        self.image_size = as_pair(image_size)
        self.num_classes = num_classes
        self.with_classes = with_classes
        self.with_captions = with_captions
        self.with_text_features = with_text_features
        self.seed = seed
        titles = [source.title for source in self.sources]
        refuse(
            "ShardData",
            (not titles, "`sources` must hold at least one"),
            (len(set(titles)) < len(titles), f"sources need different `name`s, got {titles}"),
            (seed < 0, f"`seed` must be at least 0, got {seed}"),
            (num_classes is not None and num_classes < 1, f"`num_classes` is {num_classes}"),
        )
        self.save_hyperparameters(self._plain(), logger=False)

        self._readers: dict[str, list[SampleReader]] = {}
        self._order: TrainingOrder | None = None
        self._position: Position | None = None
        self._restored: Mapping[str, Any] | None = None

    def _plain(self) -> dict[str, Any]:
        """Arguments as plain data, which a checkpoint may hold."""
        return {
            "sources": [asdict(source) for source in self.sources],
            "image_size": list(self.image_size),
            "num_classes": self.num_classes,
            "with_classes": self.with_classes,
            "with_captions": self.with_captions,
            "with_text_features": self.with_text_features,
            "seed": self.seed,
            "loader": asdict(self.loader),
        }

    # --- shards -----------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Find the shards and check that they have what is asked for.

        Raises:
            ValueError: If shards or fields are missing, or the trainer would change the order.
        """
        if self.trainer is not None:
            self._refuse_settings_of(self.trainer)
        if stage in ("fit", None):
            self._readers["train"] = [self._reader(s, s.split_train) for s in self.sources]
        if stage in ("fit", "validate", "test", "predict", None):
            self._readers["val"] = [
                self._reader(s, s.split_val, is_val=True) for s in self.sources if s.split_val
            ]
        module = getattr(self.trainer, "lightning_module", None)
        coded = self.code_hashes()
        refuse(
            f"source {', '.join(coded)}",
            (
                bool(coded) and module is not None and not getattr(module, "reads_codes", False),
                f"{type(module).__name__} learns from pixels, and these shards hold codes; give "
                "the shards that they were encoded from",
            ),
        )

    def _refuse_settings_of(self, trainer: L.Trainer) -> None:
        replaces_sampler = bool(trainer._accelerator_connector.use_distributed_sampler)
        overfits = bool(getattr(trainer, "overfit_batches", 0))
        refuse(
            "trainer",
            (
                replaces_sampler and trainer.world_size > 1,
                "`use_distributed_sampler` must be false: the data are divided already",
            ),
            (overfits, "`overfit_batches` cannot repeat endless data; set `max_samples` instead"),
        )

    def _reader(self, source: ShardSource, split: str, *, is_val: bool = False) -> SampleReader:
        folder = source.path_val or source.path if is_val else source.path
        try:
            shards = ShardSet.open(folder, split)
        except ValueError as error:
            hint = " To train without validation set `split_val: null`." if is_val else ""
            raise ValueError(f"source {source.title!r}: {error}{hint}") from error
        sample_format = self._format(source, codes=holds_codes(shards, source.media))
        if is_val:
            sample_format = replace(
                sample_format,
                horizontal_flip=False,
                random_crop=False,
                random_window=False,
                with_text_features=self.with_text_features and TEXT in shards.fields,
            )
        check_fields(shards, sample_format, name=source.title)
        refuse(
            f"source {source.title!r}",
            (
                sample_format.codes and sample_format.random_window,
                "`random_window` needs pixels: the codes are those of one stretch of each video",
            ),
            (
                sample_format.random_crop and not sample_format.codes,
                "`random_crop` needs codes, those of `grn encode --crop_scale`; it holds pixels",
            ),
        )
        try:
            return SampleReader(
                shards,
                sample_format,
                seed=self.seed,
                max_samples=source.max_samples,
                cache_decoded=self.loader.cache_decoded,
            )
        except ValueError as error:
            raise ValueError(f"source {source.title!r}: {error}") from error

    def _format(self, source: ShardSource, *, codes: bool) -> SampleFormat:
        return SampleFormat(
            media=source.media,
            size=as_pair(source.image_size or self.image_size),
            num_frames=source.num_frames,
            fps=source.fps,
            random_window=source.random_window,
            horizontal_flip=source.horizontal_flip,
            random_crop=source.random_crop,
            with_classes=self.with_classes,
            with_captions=self.with_captions,
            with_text_features=self.with_text_features,
            num_classes=self.num_classes,
            codes=codes,
        )

    def code_hashes(self) -> dict[str, str]:
        """Return the hash of the tokenizer of every source that holds codes."""
        return {
            name: reader.code_facts.tokenizer_hash
            for name, reader in self._named_readers()
            if reader.code_facts is not None
        }

    def text_hashes(self) -> dict[str, str]:
        """Return the hash of the text encoder of every source whose features are read."""
        readers = self._named_readers()
        return {name: reader.text_hash for name, reader in readers if reader.text_hash is not None}

    def _named_readers(self) -> Iterator[tuple[str, SampleReader]]:
        validated = [source for source in self.sources if source.split_val]
        for split, readers in self._readers.items():
            sources = self.sources if split == "train" else validated
            for source, reader in zip(sources, readers, strict=True):
                yield f"{source.title!r} ({split})", reader

    # --- loaders ----------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Item]:
        """Endless batches of this rank, from where the training stands."""
        rank, num_ranks = self._rank_and_number()
        readers = self._readers["train"]
        self._order = TrainingOrder(
            [
                OrderedSource(
                    order=SampleOrder(
                        reader.shard_sizes, seed=self.seed, shuffle_shards=source.shuffle_shards
                    ),
                    batch_size=source.batch_size,
                    weight=source.weight,
                )
                for source, reader in zip(self.sources, readers, strict=True)
            ],
            num_ranks=num_ranks,
        )
        if self._restored is not None:
            self._position = self._restore(self._order, self._restored)
            self._restored = None
        return self._loader(
            EndlessBatchSampler(self._order, rank=rank, position=self.position), "train"
        )

    def val_dataloader(self) -> DataLoader[Item] | list[DataLoader[Item]]:
        """Every validation sample once over all ranks; no loader if no source has a split."""
        readers = self._readers["val"]
        if not readers:
            return []
        rank, num_ranks = self._rank_and_number()
        sampler = ValidationBatchSampler(
            [reader.num_samples for reader in readers],
            [source.batch_size for source in self.sources if source.split_val],
            rank=rank,
            num_ranks=num_ranks,
        )
        return self._loader(sampler, "val")

    def test_dataloader(self) -> DataLoader[Item] | list[DataLoader[Item]]:
        """The validation samples; give `split_val: test` to test on others."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Item] | list[DataLoader[Item]]:
        """The validation samples."""
        return self.val_dataloader()

    def _rank_and_number(self) -> tuple[int, int]:
        """Rank and number of data-parallel processes."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (0, 1)

    def _loader(self, sampler: Sampler[list[SampleRequest]], split: str) -> DataLoader[Item]:
        has_workers = self.loader.num_workers > 0
        on_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return _ResumableLoader(
            ShardDataset(
                self._readers[split],
                is_validation=split == "val",
                max_bad_fraction=self.loader.max_bad_fraction,
            ),
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=self.loader.num_workers,
            persistent_workers=has_workers and self.loader.persistent_workers,
            multiprocessing_context=self.loader.multiprocessing_context if has_workers else None,
            pin_memory=on_cuda,
        )

    # --- where the training stands ----------------------------------------------------------------

    def position(self) -> Position:
        """Return what has been taken from each source by the steps that the trainer has done."""
        if self._order is None:
            raise RuntimeError("there is no position before `train_dataloader()` was called.")
        steps = 0
        if self.trainer is not None:
            steps = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
        known = self._position or self._order.start()
        if steps < known.num_batches:  # a new trainer begins from the start
            known = self._order.start()
        self._position = self._order.advance(known, steps - known.num_batches)
        return self._position

    def samples_per_step(self, num_ranks: int) -> float:
        """Mean number of samples of a training batch over all ranks and, by weight, sources."""
        weights = [source.weight for source in self.sources]
        sizes = [source.weight * source.batch_size for source in self.sources]
        return num_ranks * sum(sizes) / sum(weights)

    @property
    def samples_seen(self) -> int:
        """Samples that all ranks together have trained on."""
        return self.position().num_samples

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what it depends on, as plain data."""
        if self._order is None:
            return dict(self._restored or {})
        position = self.position()
        sources = {
            source.title: {"samples_seen": samples, "batches": batches, "weight": source.weight}
            for source, samples, batches in zip(
                self.sources, position.samples, position.batches, strict=True
            )
        }
        return {"seed": self.seed, "samples_seen": position.num_samples, "sources": sources}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a position; it is applied when training starts."""
        self._restored = state_dict

    def _restore(self, order: TrainingOrder, state: Mapping[str, Any]) -> Position:
        """Continue every source where it stood; new ones start at their beginning.

        Raises:
            ValueError: If the seed is another one.
        """
        if state["seed"] != self.seed:
            raise ValueError(
                f"the checkpoint was trained with data seed {state['seed']}, got {self.seed}: "
                f"resume with `seed: {state['seed']}`, or start a new run from the weights alone."
            )
        before, now = state["sources"], {source.title: source.weight for source in self.sources}
        if set(before) != set(now):
            warnings.warn(
                f"the checkpoint was trained on the sources {sorted(before)}, this run on "
                f"{sorted(now)}; new ones start at their first sample. To continue a renamed "
                "source, set its `name` to the old one.",
                stacklevel=2,
            )
        nothing = {"samples_seen": 0, "batches": 0}
        sources = [before.get(title, nothing) for title in now]
        samples = tuple(source["samples_seen"] for source in sources)
        if {title: source["weight"] for title, source in before.items()} == now:
            return Position(tuple(source["batches"] for source in sources), samples)
        return order.rebalance(sum(source["batches"] for source in before.values()), samples)
