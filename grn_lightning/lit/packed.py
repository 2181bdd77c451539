"""Training data in packs: documents of all sources and sizes that share a budget of tokens.

`PackedShardData` takes the place of `ShardData` in a configuration. Pictures and clips of any
aspect, resolution and duration, with captions of any length, share the sequences of a `GRNText`
without padding. Validation has batches of one size, as ever.

The order is exact and elastic: see `datasets/packing.py`. A checkpoint holds which documents were
drawn and which of them wait.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch.utils.data import DataLoader

from grn_lightning.datasets.documents import (
    DocumentFormat,
    DocumentReader,
    PackDataset,
    PackedBatch,
    Strides,
)
from grn_lightning.datasets.order import (
    OrderedSource,
    Position,
    SampleOrder,
    SampleRequest,
    TrainingOrder,
)
from grn_lightning.datasets.packing import PackedOrder, PackedPosition, PackSampler
from grn_lightning.datasets.samples import SampleReader, check_fields, holds_codes
from grn_lightning.datasets.shards import ShardSet
from grn_lightning.lit.data import ShardData, _ResumableLoader
from grn_lightning.lit.sources import LoaderConfig, ShardSource, refuse
from grn_lightning.media.resolutions import PRESETS


@dataclass(frozen=True, kw_only=True)
class PackedSource(ShardSource):
    """One set of shards, packed with others; `batch_size` is that of validation."""

    presets: dict[str, float] | None = None
    """Resolution presets of pixels with weights, such as {"0.25M": 2, "0.41M": 1}: each sample gets
    the aspect template nearest to its own shape. Null takes `image_size`; codes keep their size."""
    allow_shorter: bool = False
    """Take videos shorter than `num_frames` too, whole; their shards must note their length."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        super().__post_init__()
        presets = self.presets
        unknown = [] if presets is None else [name for name in presets if name not in PRESETS]
        weights = [] if presets is None else [*presets.values()]
        refuse(
            f"source {self.title!r}",
            (
                bool(unknown),
                f"unknown `presets` {', '.join(unknown)}; known are {', '.join(PRESETS)}",
            ),
            (presets == {}, "`presets` must hold at least one, or be null"),
            (any(weight <= 0 for weight in weights), f"`presets` need positive weights: {presets}"),
            (
                presets is not None and self.image_size is not None,
                "`presets` and `image_size` exclude one another",
            ),
            (self.allow_shorter and self.media == "image", "`allow_shorter` is for videos"),
        )


class MeasuringStage(Protocol):
    """The stage that documents are measured for."""

    @property
    def strides(self) -> Strides:
        """Pixels per position of its tokenizer."""

    def text_lengths(self, captions: list[str]) -> list[int]:
        """Return the tokens of captions."""


def _as_it_is(batch: Any) -> Any:
    """Take a pack as the data set made it; a loader's own function would make lists of tuples."""
    return batch


class PackedShardData(ShardData):
    """Packs of documents to train on, batches to validate on; see the module's docstring.

    Args:
        sources: The sets of shards. `weight` is the share of the documents.
        token_budget: Most tokens of a pack, which is what a device has in a step: those of the
            captions, one per position of the code maps, and one per document.
        look_ahead: Budgets of tokens that wait to be packed; more of them fill packs better.
        max_left_out: Share of documents that may be longer than the budget, or without a size,
            before the run stops; each of them is told.
        image_size: Height and width of pixels without presets, and of validation.
        num_classes: See `ShardData`, like all that follow.
        with_classes: Of use in validation only.
        with_captions: Put captions into batches.
        with_text_features: Put cached features of the captions into batches.
        seed: Seed of order, presets, flips and windows.
        loader: How samples are loaded.

    Raises:
        ValueError: If two sources share a name, or a value is out of range.
    """

    sources: list[PackedSource]  # type: ignore[assignment]

    def __init__(
        self,
        sources: list[PackedSource],
        *,
        token_budget: int,
        image_size: int | tuple[int, int],
        look_ahead: int = 4,
        max_left_out: float = 0.01,
        num_classes: int | None = None,
        with_classes: bool = False,
        with_captions: bool = False,
        with_text_features: bool = False,
        seed: int = 0,
        loader: LoaderConfig | None = None,
    ):
        self.token_budget, self.look_ahead = token_budget, look_ahead
        self.max_left_out = max_left_out
        refuse(
            "PackedShardData",
            (token_budget < 3, f"`token_budget` must be at least 3, got {token_budget}"),
            (look_ahead < 1, f"`look_ahead` must be at least 1, got {look_ahead}"),
            (not 0 <= max_left_out <= 1, f"`max_left_out` must be in [0, 1], got {max_left_out}"),
            (
                not (with_captions or with_text_features),
                "documents have captions; set `with_captions` or `with_text_features`",
            ),
        )
        super().__init__(
            [s if isinstance(s, ShardSource) else PackedSource(**s) for s in sources],
            image_size=image_size,
            num_classes=num_classes,
            with_classes=with_classes,
            with_captions=with_captions,
            with_text_features=with_text_features,
            seed=seed,
            loader=loader,
        )
        self._stage: MeasuringStage | None = None
        self._packs: PackedOrder | None = None
        self._sampler: PackSampler | None = None

    def _plain(self) -> dict[str, Any]:
        return {
            **super()._plain(),
            "token_budget": self.token_budget,
            "look_ahead": self.look_ahead,
            "max_left_out": self.max_left_out,
        }

    # --- documents --------------------------------------------------------------------------------

    def measure_by(self, stage: MeasuringStage) -> None:
        """Measure documents by the tokenizer and the text encoder of a stage.

        A trainer's own is found without it, once its networks are built.
        """
        self._stage = stage

    def _reader(self, source: ShardSource, split: str, *, is_val: bool = False) -> SampleReader:
        if is_val or not isinstance(source, PackedSource):
            return super()._reader(source, split, is_val=is_val)
        try:
            shards = ShardSet.open(source.path, split)
            wanted = self._format(source, codes=holds_codes(shards, source.media))
            check_fields(shards, wanted, name=source.title)
            refuse(
                "packing",
                (
                    wanted.codes and wanted.random_window,
                    "`random_window` needs pixels: codes are those of one stretch of each video",
                ),
                (
                    wanted.random_crop and not wanted.codes,
                    "`random_crop` needs codes, those of `grn encode --crop_scale`",
                ),
                (
                    wanted.codes and source.presets is not None,
                    "`presets` need pixels: codes have a size already",
                ),
            )
            return DocumentReader(  # type: ignore[return-value]
                shards,
                DocumentFormat(
                    sample=wanted, presets=source.presets, allow_shorter=source.allow_shorter
                ),
                seed=self.seed,
                max_samples=source.max_samples,
                cache_decoded=self.loader.cache_decoded,
            )
        except ValueError as error:
            raise ValueError(f"source {source.title!r}: {error}") from error

    def _documents(self) -> list[DocumentReader]:
        """The training sources, measured by the stage at hand."""
        stage = self._stage or getattr(self.trainer, "lightning_module", None)
        if not hasattr(stage, "text_lengths") or not getattr(stage, "is_text", True):
            raise ValueError(
                f"packs are for text-conditional generators, a `LitGenerator` with a `GRNText`, "
                f"got {type(stage).__name__}; take `grn_lightning.lit.data.ShardData`."
            )
        readers: list[DocumentReader] = self._readers["train"]  # type: ignore[assignment]
        for reader in readers:
            reader.strides = stage.strides  # type: ignore[union-attr]
        self._stage = stage
        return readers

    def _measure(self, request: SampleRequest) -> int:
        reader: DocumentReader = self._readers["train"][request.source]  # type: ignore[assignment]
        frames, rows, columns = reader.grid(request.index, number=request.number)
        assert self._stage is not None
        lengths = self._stage.text_lengths
        words = reader.text_length(request.index, lambda text: lengths([text])[0])
        return words + frames * rows * columns + 1

    def _describe(self, request: SampleRequest) -> str:
        return self._readers["train"][request.source].shards.describe(request.index)

    # --- packs ------------------------------------------------------------------------------------

    def _packed_order(self) -> PackedOrder:
        """Packs of all ranks."""
        if self._packs is None or self._packs.num_ranks != self._rank_and_number()[1]:
            stream = [
                OrderedSource(
                    order=SampleOrder(
                        reader.shard_sizes, seed=self.seed, shuffle_shards=source.shuffle_shards
                    ),
                    batch_size=1,
                    weight=source.weight,
                )
                for source, reader in zip(self.sources, self._documents(), strict=True)
            ]
            self._packs = PackedOrder(
                TrainingOrder(stream),
                self._measure,
                token_budget=self.token_budget,
                num_ranks=self._rank_and_number()[1],
                look_ahead=self.look_ahead,
                max_left_out=self.max_left_out,
                describe=self._describe,
            )
        return self._packs

    def train_dataloader(self) -> DataLoader[PackedBatch]:  # type: ignore[override]
        """Endless packs of this rank, from where the training stands."""
        order = self._packed_order()
        self._order = order  # type: ignore[assignment]
        if self._restored is not None:
            self._position = self._restored_position(order, self._restored)  # type: ignore[assignment]
            self._restored = None
        self._sampler = PackSampler(
            order,
            rank=self._rank_and_number()[0],
            position=self.position,  # type: ignore[arg-type]
        )
        has_workers = self.loader.num_workers > 0
        on_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return _ResumableLoader(  # type: ignore[return-value]
            PackDataset(
                self._readers["train"],  # type: ignore[arg-type]
                token_budget=self.token_budget,
                max_bad_fraction=self.loader.max_bad_fraction,
            ),
            sampler=self._sampler,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.loader.num_workers,
            persistent_workers=has_workers and self.loader.persistent_workers,
            multiprocessing_context=self.loader.multiprocessing_context if has_workers else None,
            pin_memory=on_cuda,
        )

    def samples_per_step(self, num_ranks: int) -> float:
        """Mean number of documents of a step over all ranks, by the first packs of a run."""
        return num_ranks * self._packed_order().mean_documents()

    @property
    def left_out(self) -> dict[str, int]:
        """Documents of each source that could not be packed so far."""
        position: PackedPosition = self.position()  # type: ignore[assignment]
        titles = [source.title for source in self.sources]
        return dict(zip(titles, position.left_out, strict=True))

    # --- where the training stands ----------------------------------------------------------------

    def position(self) -> Position:
        """Return what has been drawn and packed by the steps that the trainer has done."""
        if self.trainer is not None and self._sampler is not None:
            steps = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
            passed = self._sampler.position_at(steps)
            if passed is not None:
                self._position = passed  # type: ignore[assignment]
        return super().position()

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what it depends on, as plain data."""
        if self._order is None:
            return dict(self._restored or {})
        position: PackedPosition = self.position()  # type: ignore[assignment]
        titles = [source.title for source in self.sources]
        drawn = position.drawn
        return {
            "seed": self.seed,
            "samples_seen": position.num_samples,
            "sources": {
                title: {"samples_seen": n, "batches": n, "weight": source.weight, "left_out": left}
                for title, n, source, left in zip(
                    titles, drawn.samples, self.sources, position.left_out, strict=True
                )
            },
            "packs": {
                "steps": position.steps,
                "token_budget": self.token_budget,
                "waiting": [
                    [
                        document.request.number,
                        titles[document.request.source],
                        document.request.index,
                    ]
                    for document in position.waiting
                ],
            },
        }

    def _restored_position(self, order: PackedOrder, state: Mapping[str, Any]) -> PackedPosition:
        """Continue every source where it stood, with the documents that wait.

        Raises:
            ValueError: If the seed is another one, or the run was one without packs.
        """
        packs = state.get("packs")
        if packs is None:
            raise ValueError(
                "the checkpoint was trained on batches of one size, not on packs: resume with "
                "`ShardData`, or start a new run from its weights (`init_from`)."
            )
        drawn = self._restore(order.stream, state)
        titles = [source.title for source in self.sources]
        known = [entry for entry in packs["waiting"] if entry[1] in titles]
        if len(known) < len(packs["waiting"]):
            warnings.warn(
                f"{len(packs['waiting']) - len(known)} documents that waited to be packed are of "
                "sources that this run does not have; they are left out.",
                stacklevel=2,
            )
        requests = [SampleRequest(number, titles.index(t), index) for number, t, index in known]
        left = {title: source.get("left_out", 0) for title, source in state["sources"].items()}
        position = PackedPosition(
            drawn=drawn,
            waiting=(),
            steps=packs["steps"],
            packed=state["samples_seen"],
            left_out=tuple(left.get(title, 0) for title in titles),
        )
        return order.resume(position, requests)
