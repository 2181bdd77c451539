"""What the modules share that learn the codes of a frozen tokenizer.

The tokenizer is found by its path and never enters a checkpoint; its hash does. Codes come from
clips or from a cache, conditions are classes or captions, and all noise of a sample is a function
of (seed, running number of the sample).
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from grn_lightning.datasets.samples import Batch
from grn_lightning.functional import Stream, counter_uniform
from grn_lightning.lit.base import StageModule
from grn_lightning.lit.cached import (
    cached_condition,
    is_cached_already,
    refuse_foreign_cache,
)
from grn_lightning.lit.checkpoints import weights_hash
from grn_lightning.lit.optim import OptimConfig
from grn_lightning.lit.tokenizer import load_tokenizer
from grn_lightning.lit.work import Work, text_lengths, work_of_elements
from grn_lightning.models.text_encoder import TextEncoder, TextEncoderConfig
from grn_lightning.models.tokenizer import HBQTokenizer


def refuse_other_kind(checkpoint: Mapping[str, Any], data: Any) -> None:
    """Refuse to go on from packs with batches of one size, or the other way.

    Lightning finds the place of the training by the class of the data, and where that is another
    one begins at the first sample without a word.

    Args:
        checkpoint: That of the run so far.
        data: The data module at hand; one without sources is let pass.

    Raises:
        ValueError: Saying which data can go on.
    """
    kept = [one for one in checkpoint.values() if isinstance(one, Mapping)]
    states = [one for one in kept if isinstance(one.get("sources"), Mapping)]
    if not states or not hasattr(data, "sources"):
        return
    has_packs = hasattr(data, "token_budget")
    if has_packs == any("packs" in state for state in states):
        return
    before, now = ("batches of one size", "packs") if has_packs else ("packs", "batches")
    wanted = "data.ShardData" if has_packs else "packed.PackedShardData"
    raise ValueError(
        f"the checkpoint was trained on {before}, and {now} cannot go on from its place in the "
        f"data: resume with `grn_lightning.lit.{wanted}`, or start a new run from its weights "
        "(`init_from`)."
    )


class CodeStage(StageModule):
    """Base of the generator stages.

    Args:
        tokenizer: Checkpoint of a tokenizer run, the run's folder, or an export.
        text_config: Text tower; None for classes.
        cache_codes: Keep the codes of every training sample in memory, by its key.
        optim: Optimizer and schedule.
        seed: Seed of all noise.
    """

    reads_codes = True
    """Batches may hold codes in place of clips; `ShardData` asks."""

    tokenizer: HBQTokenizer
    text_encoder: TextEncoder

    def __init__(
        self,
        tokenizer: str,
        *,
        text_config: TextEncoderConfig | None,
        cache_codes: bool,
        optim: OptimConfig | None,
        seed: int,
    ):
        super().__init__(optim=optim, seed=seed)
        self.tokenizer_path = tokenizer
        self.text_config = text_config
        self.cache_codes = cache_codes
        self._codes: dict[tuple[str, torch.Size], Tensor] = {}

    @property
    def is_text(self) -> bool:
        """Whether it learns from captions; else from classes."""
        return self.text_config is not None

    @property
    @abstractmethod
    def null_class(self) -> int:
        """Class that stands for none."""

    @abstractmethod
    def tokenize(self, clips: Tensor) -> Tensor:
        """Map clips `(b, 3, f, h, w)` to the maps of codes that are learned, `(b, c, *grid)`."""

    @abstractmethod
    def _elements_of_codes(self, batch: Batch) -> Tensor:
        """Return the maps of a batch of cached codes."""

    @abstractmethod
    def _encode_condition(self, batch: Any) -> Any:
        """Encode captions or class labels."""

    @abstractmethod
    def null_condition(self, batch_size: int) -> Any:
        """Return the condition of the unconditional branch: the null class, or the empty text."""

    # --- tokenizer --------------------------------------------------------------------------------

    def _adopt_tokenizer(self) -> None:
        """Load the tokenizer as a plain attribute: neither checkpoints nor strategies see it."""
        tokenizer = load_tokenizer(self.tokenizer_path)
        object.__setattr__(self, "tokenizer", tokenizer)
        self.tokenizer_hash = weights_hash(tokenizer)

    def on_fit_start(self) -> None:
        """Refuse a memory that would mix samples up, and what other networks have cached.

        Raises:
            ValueError: If samples of `cache_codes` are augmented, or may share a key and a size; or
                if cached codes or text features are not those of the networks at hand.
        """
        refuse_foreign_cache(
            getattr(self.trainer, "datamodule", None),
            tokenizer_hash=self.tokenizer_hash,
            text_encoder=self.text_encoder if self.is_text else None,
        )
        sources = getattr(getattr(self.trainer, "datamodule", None), "sources", [])
        if not self.cache_codes or is_cached_already(getattr(self.trainer, "datamodule", None)):
            return
        if any(source.horizontal_flip or source.random_window for source in sources):
            raise ValueError(
                "`cache_codes` must be false where `horizontal_flip` or `random_window` is set: "
                "a sample would be remembered as it was seen first."
            )
        media = [source.media for source in sources]
        is_packed = hasattr(getattr(self.trainer, "datamodule", None), "token_budget")
        if len(set(media)) < len(media) and not is_packed:
            raise ValueError(
                f"`cache_codes` must be false with several sources of one medium, got {media}: "
                "samples are remembered by key, and two sources may use the same."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the count and which tokenizer the codes come from."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["tokenizer_hash"] = self.tokenizer_hash
        checkpoint["tokenizer_config"] = asdict(self.tokenizer.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the count; refuse another tokenizer, and batches where there were packs.

        Raises:
            ValueError: If the tokenizer at hand is not the one of the checkpoint, or training would
                go on from packs with batches of one size, or the other way.
        """
        super().on_load_checkpoint(checkpoint)
        if self._is_resuming:
            refuse_other_kind(checkpoint, getattr(self.trainer, "datamodule", None))
        self.configure_model()
        if checkpoint["tokenizer_hash"] != self.tokenizer_hash:
            raise ValueError(
                f"the checkpoint was trained on codes of tokenizer {checkpoint['tokenizer_hash']}, "
                f"but '{self.tokenizer_path}' holds tokenizer {self.tokenizer_hash}. Set "
                "`model.tokenizer` to the former's checkpoint, or start a new run."
            )

    # --- codes and conditions ---------------------------------------------------------------------

    def _elements(self, batch: Batch) -> Tensor:
        """Elements of a batch of clips or of cached codes."""
        if "codes" in batch:
            return self._elements_of_codes(batch)
        return self.tokenize(batch["clips"])

    def _training_elements(self, batch: Batch) -> Tensor:
        """Elements of a training batch, remembered by key and size if `cache_codes`."""
        if "codes" in batch:
            return self._elements(batch)
        clips = batch["clips"]
        if not self.cache_codes:
            return self.tokenize(clips)
        names = [(key, clips.shape[2:]) for key in batch["keys"]]  # stills and films may share keys
        if any(name not in self._codes for name in names):
            elements = self.tokenize(clips)
            small = torch.uint8 if elements.max() < 256 else torch.int32
            self._codes.update(zip(names, elements.to(small).cpu(), strict=True))
            return elements
        return torch.stack([self._codes[name] for name in names]).long().to(self.device)

    def condition(self, batch: Any, dropped: Tensor | None = None) -> Any:
        """Return what a batch's samples are generated from.

        Args:
            batch: With `captions` or their features, or with `class_labels`.
            dropped: `(b,)` bool, True where the condition is replaced by the null condition.

        Raises:
            ValueError: If the batch lacks them.
        """
        if self.is_text and "text_embeds" in batch:
            return cached_condition(batch, dropped, lambda: self.null_condition(1))
        field = "captions" if self.is_text else "class_labels"
        if field not in batch:
            option = "with_captions" if self.is_text else "with_classes"
            raise ValueError(f"batches have no {field!r}; set `data.{option}: true`.")
        if dropped is not None:
            batch = {field: self._drop(batch[field], dropped)}
        return self._encode_condition(batch)

    def _drop(self, values: Any, dropped: Tensor) -> Any:
        """Replace classes by the null class, captions by the empty text."""
        if not self.is_text:
            return values.masked_fill(dropped, self.null_class)
        pairs = zip(values, dropped.tolist(), strict=True)
        return ["" if is_dropped else caption for caption, is_dropped in pairs]

    def work_of(self, batch: Any) -> Work:
        """Return what the network does with a batch; tokenizer and text encoder are left out."""
        number = len(batch["keys"])
        if "codes" in batch:
            shape = tuple(batch["codes"].shape)
        else:
            shape = (number, *self.tokenizer.config.latent_shape(*batch["clips"].shape[2:]))
        lengths, room = text_lengths(batch, self.text_encoder) if self.is_text else ([], 0)
        return work_of_elements(getattr(self, self.averaged[0]), shape, lengths, room)

    # --- judging ----------------------------------------------------------------------------------

    @abstractmethod
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Judge held-out samples; padding has weight 0."""

    @abstractmethod
    def _log_judgement(self, prefix: str) -> None:
        """Log the means over all devices, and forget them."""

    def on_validation_epoch_end(self) -> None:
        """Log the means over all devices."""
        self._log_judgement("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Judge as in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log as in validation, under `test/`."""
        self._log_judgement("test")

    # --- noise ------------------------------------------------------------------------------------

    def _uniform(self, sample_index: Tensor, stream: Stream, shape: tuple[int, ...]) -> Tensor:
        return counter_uniform(sample_index, seed=self.seed, step=0, stream=stream, shape=shape)
