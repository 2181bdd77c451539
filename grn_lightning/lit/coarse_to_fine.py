"""The stages of coarse-to-fine prediction: a causal network over coarse labels, a parallel one.

`LitRaster` learns code maps in raster order: coarse labels (stage 1), or without a split all codes
(the plain autoregressive baseline). `LitFine` learns all fine labels at once, given the true coarse
map (stage 2). Both train on their own, from the same codes; `load_coarse_to_fine` joins them.

Source: arXiv 2503.16194; bit prefixes and latent clusters of HBQ codes are ours.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from grn_lightning.datasets.codes import check_hash
from grn_lightning.datasets.samples import Batch
from grn_lightning.functional import Stream, random_codes, token_accuracy, token_cross_entropy
from grn_lightning.lit.base import as_config, as_plain
from grn_lightning.lit.checkpoints import averaged_state, read_checkpoint, select, start_from
from grn_lightning.lit.code_stage import CodeStage
from grn_lightning.lit.optim import OptimConfig
from grn_lightning.lit.parts import checkpoint_blocks
from grn_lightning.models.clusters import read_clusters
from grn_lightning.models.coarse_split import CoarseSplit, MapSizes, PrefixSplit
from grn_lightning.models.code_transformer import CodeTransformer, CodeTransformerConfig
from grn_lightning.models.pretrained import is_export
from grn_lightning.models.text_encoder import TextEncoderConfig, build_text_encoder
from grn_lightning.models.variants import BACKBONES, BackboneConfig, get_variant
from grn_lightning.pipelines.coarse_to_fine import CoarseToFinePipeline, FineMask, code_sizes
from grn_lightning.samplers.coarse_to_fine import CoarseToFineConfig


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """What is coarse: clusters from a file, or the first bits of every channel."""

    clusters: str | None = None
    """File that `grn cluster` has written, of codewords or of latents."""
    coarse_rounds: int | None = None
    """Bits per channel that are coarse, for HBQ codes."""
    is_joint: bool = False
    """Predict the coarse bits of all channels of a position as one label."""

    def __post_init__(self) -> None:
        """Refuse both and neither."""
        if (self.clusters is None) == (self.coarse_rounds is None):
            raise ValueError(
                "SplitConfig: one of `clusters` and `coarse_rounds` must be given and the other be "
                f"null, got clusters={self.clusters!r}, coarse_rounds={self.coarse_rounds!r}; "
                "options are merged with what files say, so set the other one to null."
            )

    def build(self, codes: MapSizes, *, tokenizer_hash: str) -> CoarseSplit:
        """Return the split of a tokenizer's codes.

        Raises:
            ValueError: If the clusters belong to another tokenizer, or the codes have no bits.
        """
        if self.clusters is not None:
            return read_clusters(self.clusters, tokenizer_hash=tokenizer_hash).split()
        rounds = int(math.log2(codes.size))
        if 2**rounds != codes.size:
            raise ValueError(
                f"`coarse_rounds` needs codes of whole bits, got {codes.size} values per code; "
                "use `clusters`."
            )
        assert self.coarse_rounds is not None
        return PrefixSplit(codes.channels, rounds, self.coarse_rounds, self.is_joint)


class _PredictionStage(CodeStage):
    """What both stages share: one network, a cross-entropy, bits per position."""

    averaged = ("network", "text_encoder")
    network: CodeTransformer

    def __init__(
        self,
        backbone: BackboneConfig | str,
        tokenizer: str,
        *,
        grid_size: tuple[int, int],
        split: SplitConfig | None,
        num_classes: int | None,
        text_encoder: TextEncoderConfig | None,
        condition_dropout: float,
        optim: OptimConfig | None,
        init_from: str | None,
        cache_codes: bool,
        activation_checkpointing: bool,
        seed: int,
    ):
        text_config = None if text_encoder is None else as_config(TextEncoderConfig, text_encoder)
        super().__init__(
            tokenizer, text_config=text_config, cache_codes=cache_codes, optim=optim, seed=seed
        )
        if (num_classes is None) == (text_config is None):
            raise ValueError("one of `num_classes` and `text_encoder` must be given.")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"`num_classes` must be at least 1, got {num_classes}.")
        if min(grid_size) < 1:
            raise ValueError(f"`grid_size` must be positive, got {tuple(grid_size)}.")
        if not 0 <= condition_dropout <= 1:
            raise ValueError(f"`condition_dropout` must be in [0, 1], got {condition_dropout}.")
        self.backbone = as_config(BackboneConfig, _named(backbone))
        self.grid_size = (grid_size[0], grid_size[1])
        self.split_config = None if split is None else as_config(SplitConfig, split)
        self.num_classes = num_classes
        self.condition_dropout = condition_dropout
        self.init_from = init_from
        self.activation_checkpointing = activation_checkpointing
        self.val_bits, self.val_accuracy = MeanMetric(), MeanMetric()

    def _plain(self) -> dict[str, Any]:
        """Hyper-parameters as plain data."""
        return {
            "backbone": as_plain(self.backbone),
            "tokenizer": self.tokenizer_path,
            "grid_size": list(self.grid_size),
            "split": as_plain(self.split_config),
            "num_classes": self.num_classes,
            "text_encoder": as_plain(self.text_config),
            "condition_dropout": self.condition_dropout,
            "optim": as_plain(self.optim),
            "init_from": self.init_from,
            "cache_codes": self.cache_codes,
            "activation_checkpointing": self.activation_checkpointing,
            "seed": self.seed,
        }

    def _is_of_this_stage(self, hyper_parameters: dict[str, Any]) -> bool:
        """Whether a run with these hyper-parameters was one of this class."""
        return _stage_of(hyper_parameters) is type(self)

    # --- building ---------------------------------------------------------------------------------

    @abstractmethod
    def _sizes(self, codes: MapSizes) -> tuple[MapSizes, MapSizes]:
        """Return what the network reads and what it predicts."""

    @property
    @abstractmethod
    def _is_causal(self) -> bool:
        """Whether a position sees only those before it."""

    _sees_earlier = False

    def configure_model(self) -> None:
        """Build the network and load the tokenizer, once."""
        if hasattr(self, "network"):
            return
        self._adopt_tokenizer()
        codes = code_sizes(self.tokenizer)
        self.split: CoarseSplit | None = None
        if self.split_config is not None:
            self.split = self.split_config.build(codes, tokenizer_hash=self.tokenizer_hash)
        text_channels = 0
        if self.text_config is not None:
            self.text_encoder = build_text_encoder(self.text_config)
            text_channels = self.text_encoder.text_channels
        reads, predicts = self._sizes(codes)
        self.network = CodeTransformer(
            CodeTransformerConfig(
                input_channels=reads.channels,
                input_size=reads.size,
                output_channels=predicts.channels,
                output_size=predicts.size,
                is_causal=self._is_causal,
                sees_earlier=self._sees_earlier,
                grid_size=self.grid_size,
                num_classes=self.num_classes or 0,
                text_channels=text_channels,
                **as_plain(self.backbone),
            )
        )
        if self.init_from is not None:
            # An export calls every network that draws the generator.
            name = "generator" if is_export(self.init_from) else "network"
            parts: dict[str, nn.Module] = {name: self.network}
            if self.is_text:
                parts["text_encoder"] = self.text_encoder
            start_from(self.init_from, parts)
        if self.activation_checkpointing:
            checkpoint_blocks(self.network)

    def _load_weights(self, state: dict[str, Tensor]) -> None:
        self.network.load_state_dict(select(state, "network"))
        if self.is_text:
            self.text_encoder.load_state_dict(select(state, "text_encoder"))

    # --- codes and conditions ---------------------------------------------------------------------

    @property
    def null_class(self) -> int:
        """Class that stands for none."""
        assert self.num_classes is not None
        return self.num_classes

    @torch.no_grad()
    def tokenize(self, clips: Tensor) -> Tensor:
        """Map pictures `(b, 3, 1, h, w)` to codes `(b, c, h, w)`."""
        return self._of_grid(self.tokenizer.to(self.device).tokenize(clips).squeeze(2))

    def _elements_of_codes(self, batch: Batch) -> Tensor:
        check_hash(batch["tokenizer_hash"], self.tokenizer_hash)
        return self._of_grid(batch["codes"].squeeze(2))

    def _of_grid(self, codes: Tensor) -> Tensor:
        """Refuse codes of other pictures than `grid_size` is meant for."""
        if tuple(codes.shape[-2:]) != self.grid_size:
            raise ValueError(
                f"`model.grid_size` must be the map of codes of these pictures, "
                f"{list(codes.shape[-2:])}, got {list(self.grid_size)}; set it, or take pictures "
                "of the size that it is meant for."
            )
        return codes

    def _encode_condition(self, batch: Any) -> Any:
        if not self.is_text:
            return batch["class_labels"]
        return self.text_encoder(self.text_encoder.tokenize(batch["captions"]).to(self.device))

    def null_condition(self, batch_size: int) -> Any:
        """Return the condition of the unconditional branch: the null class, or the empty text."""
        if self.is_text:
            return self._encode_condition({"captions": [""] * batch_size})
        return torch.full((batch_size,), self.null_class, device=self.device)

    # --- training ---------------------------------------------------------------------------------

    @abstractmethod
    def _predict(self, codes: Tensor, condition: Any, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `(b, c, h, w, k)` and targets `(b, c, h, w)`."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Take one step on a batch of one source."""
        codes, index = self._training_elements(batch), batch["sample_index"]
        dropped = self._uniform(index, Stream.DROP, ()) < self.condition_dropout
        logits, targets = self._predict(codes, self.condition(batch, dropped), index)
        loss = token_cross_entropy(logits, targets).mean()
        self.count_samples(len(codes))
        self.log("train/loss", loss, prog_bar=True)
        if self.is_logging_step:
            self.log("train/bits_per_position", _bits(loss.detach(), targets))
            self.log("train/accuracy", token_accuracy(logits, targets).mean())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Bits per position and accuracy on held-out samples; padding has weight 0."""
        codes, index = self._elements(batch), batch["sample_index"]
        logits, targets = self._predict(codes, self.condition(batch), index)
        self.val_bits.update(_bits(token_cross_entropy(logits, targets), targets), batch["weights"])
        self.val_accuracy.update(token_accuracy(logits, targets), batch["weights"])

    def _log_judgement(self, prefix: str) -> None:
        self.log(f"{prefix}/bits_per_position", self.val_bits.compute(), prog_bar=True)
        self.log(f"{prefix}/accuracy", self.val_accuracy.compute())
        self.val_bits.reset()
        self.val_accuracy.reset()


def _named(backbone: BackboneConfig | str) -> BackboneConfig:
    try:
        return get_variant(BACKBONES, backbone) if isinstance(backbone, str) else backbone
    except ValueError as error:
        raise ValueError(f"`model.backbone`: {error}") from error


def _bits(nats_per_label: Tensor, targets: Tensor) -> Tensor:
    """Turn the mean cross-entropy of a label into bits of all labels of a position."""
    return nats_per_label * targets.shape[1] / math.log(2)


class LitRaster(_PredictionStage):
    """Trains a causal `CodeTransformer`: stage 1 of coarse-to-fine prediction, or the baseline.

    Args:
        backbone: Sizes, or the name of a row of `models.variants.BACKBONES`.
        tokenizer: Checkpoint of a tokenizer run, the run's folder, or an export.
        grid_size: Height and width of the code map.
        split: What is coarse; null learns all codes, which is the plain baseline.
        num_classes: Classes of the data; null for captions.
        text_encoder: Text tower; null for classes.
        condition_dropout: Share of samples that train the unconditional branch.
        optim: Optimizer and schedule.
        init_from: Run, checkpoint or export whose averaged weights are the start.
        cache_codes: Keep the codes of every training sample in memory.
        activation_checkpointing: Compute every block once more on the way back instead of keeping
            its activations.
        seed: Seed of all noise.
    """

    def __init__(
        self,
        backbone: BackboneConfig | str,
        tokenizer: str,
        *,
        grid_size: tuple[int, int],
        split: SplitConfig | None = None,
        num_classes: int | None = None,
        text_encoder: TextEncoderConfig | None = None,
        condition_dropout: float = 0.1,
        optim: OptimConfig | None = None,
        init_from: str | None = None,
        cache_codes: bool = False,
        activation_checkpointing: bool = False,
        seed: int = 0,
    ):
        super().__init__(
            backbone,
            tokenizer,
            grid_size=grid_size,
            split=split,
            num_classes=num_classes,
            text_encoder=text_encoder,
            condition_dropout=condition_dropout,
            optim=optim,
            init_from=init_from,
            cache_codes=cache_codes,
            activation_checkpointing=activation_checkpointing,
            seed=seed,
        )
        self.save_hyperparameters(self._plain())

    @property
    def _is_causal(self) -> bool:
        return True

    def _sizes(self, codes: MapSizes) -> tuple[MapSizes, MapSizes]:
        sizes = codes if self.split is None else self.split.coarse_sizes
        return sizes, sizes

    def _predict(self, codes: Tensor, condition: Any, index: Tensor) -> tuple[Tensor, Tensor]:
        targets = codes if self.split is None else self.split.coarse(codes)
        return self.network(targets, condition), targets


class LitFine(_PredictionStage):
    """Trains a bidirectional `CodeTransformer`: stage 2 of coarse-to-fine prediction.

    Args:
        backbone: Sizes, or the name of a row of `models.variants.BACKBONES`.
        tokenizer: As in `LitRaster`.
        grid_size: Height and width of the code map.
        split: What is coarse; the one of stage 1.
        fine_mask: Keep predictions within the coarse map: never ("none"), when drawing ("sample"),
            or in training as well ("train+sample").
        coarse_noise: Share of coarse labels that are replaced by random ones in training, since
            those of stage 1 are drawn, too; at most 0.05 is advised.
        sees_earlier: Let a position see the codes before it besides the coarse map: a control whose
            bits tell what independence given the coarse map costs. It cannot draw.
        num_classes: As in `LitRaster`.
        text_encoder: As in `LitRaster`.
        condition_dropout: As in `LitRaster`.
        optim: Optimizer and schedule.
        init_from: As in `LitRaster`.
        cache_codes: As in `LitRaster`.
        activation_checkpointing: As in `LitRaster`.
        seed: Seed of all noise.
    """

    def __init__(
        self,
        backbone: BackboneConfig | str,
        tokenizer: str,
        *,
        grid_size: tuple[int, int],
        split: SplitConfig,
        fine_mask: FineMask = "train+sample",
        coarse_noise: float = 0.0,
        sees_earlier: bool = False,
        num_classes: int | None = None,
        text_encoder: TextEncoderConfig | None = None,
        condition_dropout: float = 0.1,
        optim: OptimConfig | None = None,
        init_from: str | None = None,
        cache_codes: bool = False,
        activation_checkpointing: bool = False,
        seed: int = 0,
    ):
        super().__init__(
            backbone,
            tokenizer,
            grid_size=grid_size,
            split=split,
            num_classes=num_classes,
            text_encoder=text_encoder,
            condition_dropout=condition_dropout,
            optim=optim,
            init_from=init_from,
            cache_codes=cache_codes,
            activation_checkpointing=activation_checkpointing,
            seed=seed,
        )
        if not 0 <= coarse_noise <= 1:
            raise ValueError(f"`coarse_noise` must be in [0, 1], got {coarse_noise}.")
        self.fine_mask, self.coarse_noise, self._sees_earlier = (
            fine_mask,
            coarse_noise,
            sees_earlier,
        )
        own = {"fine_mask": fine_mask, "coarse_noise": coarse_noise, "sees_earlier": sees_earlier}
        self.save_hyperparameters(self._plain() | own)

    @property
    def _is_causal(self) -> bool:
        return False

    def _sizes(self, codes: MapSizes) -> tuple[MapSizes, MapSizes]:
        assert self.split is not None
        return self.split.coarse_sizes, self.split.fine_sizes

    def _predict(self, codes: Tensor, condition: Any, index: Tensor) -> tuple[Tensor, Tensor]:
        assert self.split is not None
        coarse, fine = self.split.coarse(codes), self.split.fine(codes)
        earlier = fine if self._sees_earlier else None
        logits = self.network(self._disturbed(coarse, index), condition, earlier)
        allowed = self.split.allowed(coarse)
        if allowed is not None and self.fine_mask == "train+sample":
            logits = logits.masked_fill(~allowed, -math.inf)
        return logits, fine

    def _disturbed(self, coarse: Tensor, index: Tensor) -> Tensor:
        """Replace some coarse labels by random ones, in training."""
        if not self.training or self.coarse_noise == 0:
            return coarse
        assert self.split is not None
        shape = tuple(coarse.shape[1:])
        u = self._uniform(index, Stream.INITIAL, shape)
        random = random_codes(u, alphabet_size=self.split.coarse_sizes.size)
        is_noise = self._uniform(index, Stream.KEEP, shape) < self.coarse_noise
        return torch.where(is_noise, random, coarse)


def _stage_of(hyper_parameters: dict[str, Any]) -> type[LitRaster | LitFine] | None:
    """Return the class of a run with these hyper-parameters, if it is one of this file."""
    if "backbone" not in hyper_parameters:
        return None
    return LitFine if "fine_mask" in hyper_parameters else LitRaster


def load_stage(path: str | Any, *, tokenizer: str | None = None) -> LitRaster | LitFine:
    """Return a trained stage with averaged weights, frozen and in eval mode.

    Args:
        path: Checkpoint of a `LitRaster` or `LitFine`, or the folder of its run.
        tokenizer: Where its tokenizer lies, if not where it lay in training.

    Raises:
        ValueError: If there is no checkpoint, or it is one of another kind.
    """
    checkpoint = read_checkpoint(path)
    options = dict(checkpoint.get("hyper_parameters", {}))
    stage = _stage_of(options)
    if stage is None:
        raise ValueError(
            f"'{path}' is no checkpoint of a stage of coarse-to-fine prediction: its "
            f"hyper-parameters are {sorted(options)}. Give one that `LitRaster` or `LitFine` has "
            "written."
        )
    options["init_from"] = None
    if tokenizer is not None:
        options["tokenizer"] = tokenizer
    module = stage(**options)
    module.on_load_checkpoint(checkpoint)
    module._load_weights(averaged_state(checkpoint))
    return module.eval().requires_grad_(False)


def load_coarse_to_fine(
    raster: str | Any,
    fine: str | Any | None = None,
    *,
    tokenizer: str | None = None,
    sampling: CoarseToFineConfig | None = None,
) -> CoarseToFinePipeline:
    """Join trained stages.

    Args:
        raster: Run of a `LitRaster`: stage 1, or without `fine` the baseline.
        fine: Run of a `LitFine` with the same split.
        tokenizer: Where their tokenizer lies, if not where it lay in training.
        sampling: How labels are drawn where nothing else is asked for.

    Raises:
        ValueError: If a run is of another kind, or the stages do not fit one another.
    """
    first = load_stage(raster, tokenizer=tokenizer)
    second = None if fine is None else load_stage(fine, tokenizer=tokenizer)
    if not isinstance(first, LitRaster) or isinstance(second, LitRaster):
        raise ValueError(
            "stage 1 must be a run of LitRaster and stage 2 one of LitFine, got "
            f"{type(first).__name__} and {type(second).__name__}."
        )
    if second is not None and second.split_config != first.split_config:
        raise ValueError(
            f"both stages must have one split, got {first.split_config} and {second.split_config}."
        )
    return CoarseToFinePipeline(
        first.network,
        first.tokenizer,
        fine=None if second is None else second.network,
        split=None if second is None else second.split,
        text_encoder=first.text_encoder if first.is_text else None,
        sampling=sampling or CoarseToFineConfig(),
        fine_mask="train+sample" if second is None else second.fine_mask,
    )
