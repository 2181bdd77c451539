"""The generator stage: predict every code of a corrupted map, given a class or a caption.

The tokenizer is frozen, is found by its path and never enters a checkpoint; its hash does. All
noise of a training sample (time, mask, random codes, whether the condition is dropped) is a
function of (seed, running number of the sample), so that it depends neither on the number of
devices nor on an interruption.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from grn_lightning.datasets.documents import PackedBatch, Strides, is_pack
from grn_lightning.datasets.samples import Batch
from grn_lightning.functional import (
    Stream,
    accuracy_by_time,
    corrupt,
    keep_mask,
    logit_normal,
    random_codes,
    round_accuracy,
    shift,
    token_accuracy,
    token_cross_entropy,
)
from grn_lightning.lit.base import as_config, as_plain
from grn_lightning.lit.cached import cached_elements
from grn_lightning.lit.checkpoints import (
    averaged_state,
    read_checkpoint,
    select,
    start_from,
)
from grn_lightning.lit.code_stage import CodeStage
from grn_lightning.lit.optim import OptimConfig
from grn_lightning.lit.packed_step import LOSS_WEIGHTS, LossWeights, pack_step, pack_work
from grn_lightning.lit.parts import checkpoint_blocks
from grn_lightning.lit.prediction import PredictionPlan
from grn_lightning.lit.together import in_step
from grn_lightning.lit.tokenizer import Prediction
from grn_lightning.lit.work import Work, text_lengths
from grn_lightning.metrics.accuracy import TimeBinnedAccuracy
from grn_lightning.models.grn_class import GRNClass, GRNClassConfig
from grn_lightning.models.grn_text import GRNText, GRNTextConfig
from grn_lightning.models.pretrained import Pretrained, is_export, read_pretrained
from grn_lightning.models.text_encoder import TextEncoder, TextEncoderConfig, build_text_encoder
from grn_lightning.models.variants import GRN_CLASS, GRN_TEXT, get_variant
from grn_lightning.nn.packed_attention import BACKENDS, Backend
from grn_lightning.pipelines import Condition as Condition
from grn_lightning.pipelines import Drawn, GeneratorPipeline, check_text_channels
from grn_lightning.pipelines import target_of as target_of
from grn_lightning.samplers import RefineConfig, RefineResult


@dataclass(frozen=True, kw_only=True)
class CorruptionConfig:
    """How training samples are corrupted (GRN, training section)."""

    time_mean: float = -0.8
    """Mean of logit(t); the published class-conditional value. Lower is noisier."""
    time_std: float = 0.8
    """Standard deviation of logit(t)."""
    time_shift: float = 1.0
    """alpha of t / (t + alpha (1 - t)); above 1 is noisier, for large maps."""
    condition_dropout: float = 0.1
    """Share of samples that train the unconditional branch."""
    i2v_ratio: float = 0.0
    """Share of packed clips that are given their first latent frame and continue it."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        issues = []
        if self.time_std <= 0:
            issues.append(f"`time_std` must be positive, got {self.time_std}")
        if self.time_shift <= 0:
            issues.append(f"`time_shift` must be positive, got {self.time_shift}")
        if not 0 <= self.condition_dropout <= 1:
            issues.append(f"`condition_dropout` must be in [0, 1], got {self.condition_dropout}")
        if not 0 <= self.i2v_ratio <= 1:
            issues.append(f"`i2v_ratio` must be in [0, 1], got {self.i2v_ratio}")
        if issues:
            raise ValueError("CorruptionConfig: " + "; ".join(issues) + ".")


def _generator_config(value: Any) -> GRNClassConfig | GRNTextConfig:
    """Resolve a row's name, an export, or the plain data of a checkpoint."""
    if isinstance(value, str) and is_export(value):
        config = read_pretrained(value, check=False).config()
        if not isinstance(config, GRNClassConfig | GRNTextConfig):
            raise ValueError(f"`generator`: '{value}' is an export of a tokenizer.")
        return config
    if isinstance(value, str):
        table: dict[str, GRNClassConfig | GRNTextConfig] = {**GRN_CLASS, **GRN_TEXT}
        return get_variant(table, value)
    if isinstance(value, dict):
        return (GRNClassConfig if "num_classes" in value else GRNTextConfig)(**value)
    return value


class LitGenerator(CodeStage):
    """Trains a `GRNClass` on classes or a `GRNText` on captions; images and clips alike.

    Args:
        generator: A configuration, the name of a row of `GRN_CLASS` or `GRN_TEXT`, or an export
            with the wanted sizes.
        tokenizer: Checkpoint of a tokenizer run, or the run's folder.
        text_encoder: Text tower, for a `GRNText`; "tiny" is trained along.
        corruption: Time distribution and condition dropout.
        optim: Optimizer and schedule.
        init_from: Checkpoint or run folder of another generator run whose averaged weights are
            the start, or an export; null starts from random weights.
        cache_codes: Keep the codes of every training sample in memory, by its key. For sets that
            fit and are not augmented.
        loss_weights: What counts the same in the loss of packed documents: "uniform" every
            predicted position, "document" every document, "sqrt" is in between, the published
            choice. Batches of one size know no difference.
        attention_backend: What computes the attention of packed documents: "flex", "documents",
            "dense", or "auto", which is "flex" on CUDA with heads of 16 channels or more, and
            "documents" elsewhere.
        activation_checkpointing: Compute every block once more on the way back instead of keeping
            its activations; gradients are the same.
        seed: Seed of all noise.
    """

    averaged = ("generator", "text_encoder")
    generator: GRNText | GRNClass

    def __init__(
        self,
        generator: GRNClassConfig | GRNTextConfig | str,
        tokenizer: str,
        *,
        text_encoder: TextEncoderConfig | None = None,
        corruption: CorruptionConfig | None = None,
        optim: OptimConfig | None = None,
        init_from: str | None = None,
        cache_codes: bool = False,
        loss_weights: LossWeights = "sqrt",
        attention_backend: Backend = "auto",
        activation_checkpointing: bool = False,
        seed: int = 0,
    ):
        config = _generator_config(generator)
        is_text = isinstance(config, GRNTextConfig)
        super().__init__(
            tokenizer,
            text_config=as_config(TextEncoderConfig, text_encoder) if is_text else None,
            cache_codes=cache_codes,
            optim=optim,
            seed=seed,
        )
        for name, value, known in (
            ("loss_weights", loss_weights, LOSS_WEIGHTS),
            ("attention_backend", attention_backend, BACKENDS),
        ):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
        self.loss_weights, self.attention_backend = loss_weights, attention_backend
        self.generator_config = config
        self.corruption = as_config(CorruptionConfig, corruption)
        self.init_from = init_from
        self.activation_checkpointing = activation_checkpointing
        self.prediction = PredictionPlan()
        self.save_hyperparameters(
            {
                "generator": as_plain(self.generator_config),
                "tokenizer": tokenizer,
                "text_encoder": as_plain(self.text_config),
                "corruption": as_plain(self.corruption),
                "optim": as_plain(self.optim),
                "init_from": init_from,
                "cache_codes": cache_codes,
                "loss_weights": loss_weights,
                "attention_backend": attention_backend,
                "activation_checkpointing": activation_checkpointing,
                "seed": seed,
            }
        )
        self.val_accuracy = TimeBinnedAccuracy()

    # --- building ---------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the networks and load the tokenizer, once.

        Raises:
            ValueError: If tokenizer, generator and text encoder do not fit one another.
        """
        if hasattr(self, "generator"):
            return
        self._adopt_tokenizer()
        self.target = target_of(self.generator_config, self.tokenizer.config)
        if isinstance(self.generator_config, GRNTextConfig):
            assert self.text_config is not None
            self.text_encoder = build_text_encoder(self.text_config)
            check_text_channels(self.generator_config, self.text_encoder)
            self.generator = GRNText(self.generator_config)
            self.generator.packed_backend = self.attention_backend
        else:
            self.generator = GRNClass(self.generator_config)
        if self.init_from is not None:
            parts: dict[str, nn.Module] = {"generator": self.generator}
            if self.is_text:
                parts["text_encoder"] = self.text_encoder
            start_from(self.init_from, parts)
        if self.activation_checkpointing:
            checkpoint_blocks(self.generator)

    def adopt(self, generator: GRNText | GRNClass, text_encoder: TextEncoder | None) -> None:
        """Take over networks that exist, in place of `configure_model`, and load the tokenizer.

        Raises:
            ValueError: If tokenizer, generator and text encoder do not fit one another.
        """
        self._adopt_tokenizer()
        self.target = target_of(self.generator_config, self.tokenizer.config)
        if isinstance(self.generator_config, GRNTextConfig):
            if text_encoder is None:
                raise ValueError("a text-conditional generator needs its text encoder.")
            check_text_channels(self.generator_config, text_encoder)
            self.text_encoder = text_encoder
        self.generator = generator

    def _load_weights(self, state: dict[str, Tensor]) -> None:
        self.generator.load_state_dict(select(state, "generator"))
        if self.is_text:
            self.text_encoder.load_state_dict(select(state, "text_encoder"))

    # --- codes and conditions ---------------------------------------------------------------------

    @property
    def pipeline(self) -> GeneratorPipeline:
        """The networks as they are now, joined for drawing."""
        return GeneratorPipeline(
            self.generator, self.tokenizer, self.text_encoder if self.is_text else None
        )

    def tokenize(self, clips: Tensor) -> Tensor:
        """Map clips `(b, 3, f, h, w)` to the generator's elements `(b, c, *grid)`."""
        return self.pipeline.tokenize(clips)

    def detokenize(self, elements: Tensor) -> Tensor:
        """Map elements `(b, c, *grid)` to clips `(b, 3, f, h, w)`, clamped to [-1, 1]."""
        return self.pipeline.detokenize(elements)

    def _elements_of_codes(self, batch: Batch) -> Tensor:
        return cached_elements(batch, self.pipeline, tokenizer_hash=self.tokenizer_hash)

    def _encode_condition(self, batch: Any) -> Condition:
        return self.pipeline.condition(batch)

    @property
    def null_class(self) -> int:
        """Class that stands for none."""
        assert isinstance(self.generator_config, GRNClassConfig)
        return self.generator_config.num_classes

    def null_condition(self, batch_size: int) -> Condition:
        """Return the condition of the unconditional branch: the null class, or the empty text."""
        return self.pipeline.null_condition(batch_size)

    @property
    def strides(self) -> Strides:
        """Pixels per position of the tokenizer."""
        config = self.tokenizer.config
        return Strides(config.temporal_stride, config.spatial_stride)

    def text_lengths(self, captions: list[str]) -> list[int]:
        """Return the tokens of captions."""
        return text_lengths({"captions": captions}, self.text_encoder)[0]

    # --- training ---------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Refuse data that this stage cannot learn from, besides what `CodeStage` refuses.

        Raises:
            ValueError: If first frames are asked for without packs.
        """
        has_packs = hasattr(getattr(self.trainer, "datamodule", None), "token_budget")
        if self.corruption.i2v_ratio > 0 and not has_packs:
            raise ValueError(
                "`corruption.i2v_ratio` needs packs, in which clips with a first frame stand "
                "beside others: take `grn_lightning.lit.packed.PackedShardData`, or set it to 0."
            )
        super().on_fit_start()

    def _predict(
        self, x_1: Tensor, index: Tensor, batch: Batch, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """Corrupt elements by the noise of their sample and predict them; logits and times."""
        config, shape = self.corruption, tuple(x_1.shape[1:])
        u = self._uniform(index, Stream.TIME, ())
        t = shift(logit_normal(u, mean=config.time_mean, std=config.time_std), config.time_shift)
        u = self._uniform(index, Stream.INITIAL, shape)
        x_0 = random_codes(u, alphabet_size=self.generator_config.alphabet_size)
        x_t = corrupt(x_1, x_0, keep_mask(self._uniform(index, Stream.KEEP, shape), t))
        dropped = self._uniform(index, Stream.DROP, ()) < dropout
        return self.generator(x_t, t, self.condition(batch, dropped)), t

    def training_step(self, batch: Batch | PackedBatch, batch_idx: int) -> Tensor:
        """Take one step on a batch of one source, or on a pack of documents."""
        if is_pack(batch):
            return self._packed_step(cast(PackedBatch, batch))
        return self._plain_step(cast(Batch, batch))

    def _packed_step(self, batch: PackedBatch) -> Tensor:
        result = pack_step(self, batch)
        self.samples_seen += batch["step_samples"]
        number = len(batch["keys"])
        self.log("train/loss", result.own_loss, prog_bar=True, batch_size=number)
        if self.is_logging_step:
            self._log_accuracy(result.accuracy, result.t)
            self._log_rounds(result.predicted, result.targets)
        return result.loss

    def work_of(self, batch: Any) -> Work:
        """Return what the network does with a batch, or with a pack."""
        return pack_work(self, batch) if is_pack(batch) else super().work_of(batch)

    def _plain_step(self, batch: Batch) -> Tensor:
        x_1 = self._training_elements(batch)
        dropout = self.corruption.condition_dropout
        logits, t = self._predict(x_1, batch["sample_index"], batch, dropout)
        loss = token_cross_entropy(logits, x_1).mean()
        self.count_samples(len(x_1))

        self.log("train/loss", loss, prog_bar=True)
        if self.is_logging_step:
            self._log_accuracy(token_accuracy(logits, x_1), t)
            self._log_rounds(logits.detach().argmax(-1), x_1)
        return loss

    def _log_accuracy(self, accuracy: Tensor, t: Tensor) -> None:
        self.log("train/accuracy", accuracy.mean(), prog_bar=True)
        sums, counts = accuracy_by_time(accuracy, t)
        for bin_number in counts.nonzero().flatten().tolist():
            name = f"train_accuracy/t{bin_number / len(counts):.1f}"
            self.log(name, sums[bin_number] / counts[bin_number])

    def _log_rounds(self, predicted: Tensor, x_1: Tensor) -> None:
        """Log the share of right bits by round of the quantizer, `train_accuracy/roundN`."""
        rounds = self.tokenizer.config.num_rounds
        accuracy = round_accuracy(predicted, x_1, num_rounds=rounds, target=self.target).mean(0)
        for number, value in enumerate(accuracy.unbind()):
            self.log(f"train_accuracy/round{number}", value)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy on held-out samples, with the noise of their position in the set."""
        x_1 = self._elements(batch)
        logits, t = self._predict(x_1, batch["sample_index"], batch, 0.0)
        loss = token_cross_entropy(logits, x_1)
        self.val_accuracy.update(loss, token_accuracy(logits, x_1), t, batch["weights"])

    def predict_step(self, batch: Batch, batch_idx: int) -> Prediction:
        """Draw samples for held-out conditions, those that `prediction` asks for."""
        missing = self.prediction.missing(batch)
        size = len(batch["keys"])
        parts = [missing[n : n + size] for n in range(0, len(missing), size)]
        drawn = [self._predict_part(batch, part) for part in parts]
        empty = torch.empty(0)
        return Prediction(
            keys=[batch["keys"][row] for row, _ in missing],
            codes=torch.cat([part.elements for part in drawn]) if drawn else empty,
            clips=torch.cat([part.clips for part in drawn]) if drawn else empty,
            numbers=tuple(number for _, number in missing),
            conditions=tuple(self._condition_of(batch, row) for row, _ in missing),
            num_steps=tuple(n for part in drawn for n in part.num_steps.tolist()),
        )

    def _condition_of(self, batch: Any, row: int) -> str | int:
        return batch["captions"][row] if self.is_text else int(batch["class_labels"][row])

    def _predict_part(self, batch: Any, pairs: list[tuple[int, int]]) -> Drawn:
        """Draw for pairs of a row of the batch and the number of a sample."""
        rows = [row for row, _ in pairs]
        wanted: dict[str, Any] = {}
        if "captions" in batch:
            wanted["captions"] = [batch["captions"][row] for row in rows]
        if "class_labels" in batch:
            wanted["class_labels"] = batch["class_labels"][rows]
        return self.pipeline.draw(
            self.condition(wanted),
            torch.tensor([number for _, number in pairs], device=self.device),
            size=tuple(batch.get("clip_size") or batch["clips"].shape[2:]),
            config=self.prediction.refine,
            seed=self.seed,
        )

    def _log_judgement(self, prefix: str) -> None:
        result = self.val_accuracy.compute()
        self.val_accuracy.reset()
        self.log(f"{prefix}/loss", result.loss, prog_bar=True)
        self.log(f"{prefix}/accuracy", result.accuracy)
        for bin_number, accuracy in enumerate(result.accuracy_by_time.tolist()):
            if accuracy == accuracy:  # bins without a sample are NaN
                self.log(f"{prefix}_accuracy/t{bin_number / 10:.1f}", accuracy)

    # --- sampling ---------------------------------------------------------------------------------

    def sample(
        self,
        condition: Condition,
        sample_index: Tensor,
        *,
        grid: tuple[int, ...],
        config: RefineConfig,
        seed: int,
    ) -> RefineResult:
        """Draw the elements of one sample per row; see `GeneratorPipeline.sample`.

        Where a strategy has divided the weights, all processes have to call it.
        """
        with in_step(self.generator, self.device):
            return self.pipeline.sample(
                condition, sample_index, grid=grid, config=config, seed=seed
            )

    def draw_clips(
        self,
        batch: Any,
        sample_index: Tensor,
        *,
        size: tuple[int, int, int],
        config: RefineConfig,
        seed: int,
    ) -> Tensor:
        """Draw one clip per condition of a batch.

        Args:
            batch: With `captions` or `class_labels`.
            sample_index: `(b,)` long.
            size: Frames, height and width in pixels.
            config: Steps, guidance, temperature.
            seed: Seed of the job.

        Returns:
            Clips `(b, 3, f, h, w)` in [-1, 1].
        """
        grid = self.latent_grid(*size)
        condition = self.condition(batch)
        result = self.sample(condition, sample_index, grid=grid, config=config, seed=seed)
        return self.detokenize(result.codes)

    def latent_grid(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the grid that clips of this size have; `GRNClass` knows no frames."""
        return self.pipeline.latent_grid(num_frames, height, width)


def load_generator(path: str | Any, *, tokenizer: str | None = None) -> LitGenerator:
    """Return a trained generator with averaged weights, its tokenizer and text encoder.

    Args:
        path: Checkpoint of a `LitGenerator`, the folder of its run, or an export.
        tokenizer: Where its tokenizer lies, if not where it lay in training; that of an export is
            looked for in the same folder.

    Raises:
        ValueError: If there is no checkpoint, it is one of another kind, or its tokenizer is gone
            or another one.
    """
    if is_export(path):
        return _load_exported(read_pretrained(path), tokenizer)
    checkpoint = read_checkpoint(path)
    hyper_parameters = dict(checkpoint.get("hyper_parameters", {}))
    if "generator" not in hyper_parameters:
        raise ValueError(
            f"'{path}' is no checkpoint of a generator run: its hyper-parameters are "
            f"{sorted(hyper_parameters)}. Give one that `LitGenerator` has written."
        )
    hyper_parameters["init_from"] = None
    if tokenizer is not None:
        hyper_parameters["tokenizer"] = tokenizer
    module = LitGenerator(**hyper_parameters)
    module.on_load_checkpoint(checkpoint)
    module._load_weights(averaged_state(checkpoint))
    return module.eval().requires_grad_(False)


def _load_exported(pretrained: Pretrained, tokenizer: str | None) -> LitGenerator:
    """Build the stage around the mapped tensors of an export."""
    config = pretrained.config()
    if not isinstance(config, GRNClassConfig | GRNTextConfig):
        raise ValueError(f"'{pretrained.file}' is an export of a tokenizer, not of a generator.")
    found = tokenizer or pretrained.tokenizer_beside()
    if found is None:
        which = pretrained.tokenizer_hash or "that nobody noted"
        raise ValueError(
            f"'{pretrained.file}' was trained on codes of tokenizer {which}, and no export in "
            f"'{pretrained.file.parent}' is known to be that one; say where it lies by `tokenizer`."
        )
    text = pretrained.info["config"].get("text_encoder")
    if text is None and isinstance(config, GRNTextConfig):
        raise ValueError(
            f"'{pretrained.file}' names no text encoder; convert the weights again with "
            "`--text_encoder`."
        )
    module = LitGenerator(config, str(found), text_encoder=text)
    module.adopt(pretrained.network(), pretrained.text_encoder())  # type: ignore[arg-type]
    if pretrained.tokenizer_hash not in (None, module.tokenizer_hash):
        raise ValueError(
            f"'{pretrained.file}' was trained on codes of tokenizer {pretrained.tokenizer_hash}, "
            f"but '{found}' holds tokenizer {module.tokenizer_hash}. Give the former."
        )
    return module.eval().requires_grad_(False)
