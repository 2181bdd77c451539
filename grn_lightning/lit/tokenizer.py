"""The tokenizer stage: reconstruct images and clips through quantized latents.

Source: the tokenizer training published with GRN (arXiv 2604.13030): a tokenizer's update, then one
of the discriminators on the same batch and on the reconstructions made before. Optimization is
manual, with or without discriminators; what is counted is the tokenizer's updates (`stepping.py`).
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from einops import rearrange
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer

from grn_lightning.datasets.samples import Batch
from grn_lightning.functional.adversarial import adaptive_weight
from grn_lightning.lit.adversarial import AdversarialConfig, Adversary
from grn_lightning.lit.base import StageModule, as_config, as_plain
from grn_lightning.lit.checkpoints import (
    averaged_state,
    read_checkpoint,
    select,
    start_from,
)
from grn_lightning.lit.optim import OptimConfig, SampleSchedule
from grn_lightning.lit.stepping import (
    ProcedureConfig,
    checkpoint_activations,
    clip,
    parts_of,
    refuse_trainer_flags,
    step,
    unsynchronized,
)
from grn_lightning.lit.work import Work
from grn_lightning.metrics.codes import CodeStatistics
from grn_lightning.metrics.reconstruction import reconstruction_metrics
from grn_lightning.models import vq_tokenizer
from grn_lightning.models.costs import encoder_flops, tokenizer_flops
from grn_lightning.models.pretrained import is_export, read_pretrained
from grn_lightning.models.tokenizer import TokenizerOutput
from grn_lightning.models.tokenizers import (
    AnyTokenizerConfig,
    Tokenizer,
    as_tokenizer_config,
    build_tokenizer,
)
from grn_lightning.nn import blocks3d
from grn_lightning.nn.perceptual import LPIPS


@dataclass(frozen=True, kw_only=True)
class ReconstructionLossConfig:
    """Weights of the terms; pixels in [-1, 1]."""

    l1: float = 1.0
    """Weight of the mean absolute difference (the published setting)."""
    l2: float = 0.0
    """Weight of the mean squared difference, which is what PSNR measures."""
    commitment: float = 0.0
    """Weight of the mean squared distance of latents to their quantized values; the published
    training measures it but leaves it out. It narrows the gap to the unquantized decoder."""
    perceptual: float = 0.0
    """Weight of LPIPS, mean over frames; the published setting is 1. Needs `vgg_weights`."""
    vgg_weights: str | None = None
    """File of torchvision's VGG-16; null looks into torchvision's own folder."""

    def __post_init__(self) -> None:
        """Refuse a loss of nothing."""
        weights = (self.l1, self.l2, self.commitment, self.perceptual)
        if min(weights) < 0 or self.l1 + self.l2 == 0:
            raise ValueError(
                "ReconstructionLossConfig: weights must be at least 0 and l1 or l2 positive, "
                f"got l1={self.l1}, l2={self.l2}, commitment={self.commitment}, "
                f"perceptual={self.perceptual}."
            )


class Prediction(NamedTuple):
    """What `predict` returns for a batch, in both stages."""

    keys: list[str]
    """Names of the samples."""
    codes: Tensor
    """`(b, d, f', h', w')` HBQ codes of the tokenizer; of the generator its elements."""
    clips: Tensor
    """`(b, 3, f, h, w)` in [-1, 1]: reconstructions, or samples."""
    numbers: tuple[int, ...] = ()
    """Of the samples that a generator has drawn; they name noise and files."""
    conditions: tuple[str | int, ...] = ()
    """What these were drawn for: captions, or classes."""
    num_steps: tuple[int, ...] = ()
    """How many steps these took."""


class LitTokenizer(StageModule):
    """Trains an `HBQTokenizer` or a `VQTokenizer`; batches are those of `ShardData`.

    Args:
        tokenizer: A configuration, or the name of a row of `models.variants.TOKENIZERS` or
            `VQ_TOKENIZERS`.
        loss: Weights of the loss terms that need no discriminator.
        adversarial: Discriminators and their weight; null trains without any.
        optim: Optimizer and schedule of the tokenizer.
        procedure: Clipping, micro-batches, what is trained, and how memory is saved.
        init_from: Checkpoint or run folder of another tokenizer run whose averaged weights are
            the start, or an export; null starts from random weights.
        seed: Seed of whatever is random in a step.
    """

    averaged = ("tokenizer",)
    tokenizer: Tokenizer
    lpips: LPIPS

    def __init__(
        self,
        tokenizer: AnyTokenizerConfig | str,
        *,
        loss: ReconstructionLossConfig | None = None,
        adversarial: AdversarialConfig | None = None,
        optim: OptimConfig | None = None,
        procedure: ProcedureConfig | None = None,
        init_from: str | None = None,
        seed: int = 0,
    ):
        super().__init__(optim=optim, seed=seed)
        self.automatic_optimization = False
        self.tokenizer_config = as_tokenizer_config(tokenizer)
        self.loss = as_config(ReconstructionLossConfig, loss)
        self.procedure = as_config(ProcedureConfig, procedure)
        self.adversarial = adversarial and as_config(AdversarialConfig, adversarial)
        self.init_from = init_from
        self.save_hyperparameters(
            {
                "tokenizer": as_plain(self.tokenizer_config),
                "loss": as_plain(self.loss),
                "adversarial": as_plain(self.adversarial),
                "optim": as_plain(self.optim),
                "procedure": as_plain(self.procedure),
                "init_from": init_from,
                "seed": seed,
            }
        )
        self.val_metrics = reconstruction_metrics()
        self.code_statistics = _code_statistics(self.tokenizer_config)

    # --- building ---------------------------------------------------------------------------------

    def configure_callbacks(self) -> Sequence[L.Callback]:
        """Refuse what the trainer could not do; this is the first hook that knows the trainer."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            refuse_trainer_flags(self.trainer)
        return super().configure_callbacks()

    def configure_model(self) -> None:
        """Build the networks, once."""
        if hasattr(self, "tokenizer"):
            return
        self.tokenizer = build_tokenizer(self.tokenizer_config)
        if self.init_from is not None:
            start_from(self.init_from, {"tokenizer": self.tokenizer})
        if self.adversarial is not None:
            self.adversary = Adversary(self.adversarial)
            if self.adversarial.init_from is not None:
                self.adversary.load_from(self.adversarial.init_from)
        self._apply_procedure()

    def _apply_procedure(self) -> None:
        """Freeze, save memory and compile as the procedure asks."""
        tokenizer, procedure = self.tokenizer, self.procedure
        if procedure.trains == "decoder":
            for part in tokenizer.encoder_parts:
                part.requires_grad_(False)
        if procedure.activation_checkpointing:
            for kind in (blocks3d.ResidualBlock, vq_tokenizer.ResidualBlock):
                checkpoint_activations(tokenizer, kind)
        if procedure.compile is not None:
            tokenizer.encoder.compile(backend=procedure.compile)
            tokenizer.decoder.compile(backend=procedure.compile)

    def setup(self, stage: str) -> None:
        """Load LPIPS; let DDP pass over parameters without a gradient.

        Images do not use layers over time, and each player's step leaves the other's alone.

        Raises:
            ValueError: If LPIPS is wanted and its weights are nowhere.
        """
        # It advises to keep older weights; the ones after the step are those to be kept.
        warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
        if isinstance(self.trainer.strategy, DDPStrategy):
            self.trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
        if stage == "fit" and self.loss.perceptual and not hasattr(self, "lpips"):
            # A plain attribute: no submodule, so neither checkpoints nor strategies see it.
            object.__setattr__(self, "lpips", LPIPS.load(self.loss.vgg_weights))

    def on_train_start(self) -> None:
        """Keep a frozen quantizer from learning: codebooks that follow their codes would move."""
        if self.procedure.trains == "decoder":
            self.tokenizer.encoder_parts[-1].eval()

    def on_fit_start(self) -> None:
        """Bring LPIPS to where the tokenizer is."""
        if self.loss.perceptual:
            self.lpips.to(self.device)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build optimizer and schedule of the tokenizer and, if there are any, discriminators."""
        tokenizer = self.optimizer_of(self.tokenizer, self.optim)
        if self.adversarial is None:
            return tokenizer
        config = self.adversarial
        opponent = self.optimizer_of(
            self.adversary, config.optim, first_sample=config.start_samples
        )
        return [tokenizer, opponent]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log nothing here: gradients have been clipped, and there may be two optimizers."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the count, and in checkpoints of automatic optimization that of the trainer.

        Raises:
            ValueError: If training is resumed with discriminators that were not there, or without
                those that were.
        """
        super().on_load_checkpoint(checkpoint)
        before = checkpoint["hyper_parameters"].get("adversarial") is not None
        if self._is_resuming and before != (self.adversarial is not None):
            raise ValueError(
                f"the checkpoint was trained {'with' if before else 'without'} discriminators, "
                "which this run does otherwise: start a new run from its weights by "
                "`model.init_from` instead of resuming it."
            )
        if not self._is_resuming:  # discriminators judge nothing outside of training
            state = {k: v for k, v in checkpoint["state_dict"].items() if k[:10] != "adversary."}
            own = self.state_dict()
            checkpoint["state_dict"] = state | {k: own[k] for k in own if k[:10] == "adversary."}
        loops = checkpoint.get("loops", {}).get("fit_loop", {})
        steps = loops.get("epoch_loop.manual_optimization.optim_step_progress")
        if steps and not steps["total"]["completed"]:
            done = checkpoint["global_step"]
            steps["total"].update(ready=done, completed=done)

    # --- training ---------------------------------------------------------------------------------

    def forward(self, clips: Tensor) -> TokenizerOutput:
        """Reconstruct `(b, 3, f, h, w)` clips in [-1, 1]."""
        return self.tokenizer(clips)

    def _losses(self, clips: Tensor, output: TokenizerOutput) -> dict[str, Tensor]:
        """Weighted terms of the loss by name."""
        config, difference = self.loss, output.reconstruction.float() - clips
        losses = {}
        if config.l1:
            losses["l1"] = config.l1 * difference.abs().mean()
        if config.l2:
            losses["l2"] = config.l2 * difference.square().mean()
        if config.commitment:
            # Detached: through the straight-through estimate the distance has no gradient.
            distance = (output.z - output.z_hat.detach()).square()
            losses["commitment"] = config.commitment * distance.mean()
        if config.perceptual:
            losses["perceptual"] = config.perceptual * self._lpips(clips, output).mean()
        return losses | dict(output.auxiliary_terms)

    def work_of(self, batch: Batch) -> Work:
        """Return what the tokenizer does with a batch; discriminators and LPIPS are left out."""
        number, size = len(batch["clips"]), tuple(batch["clips"].shape[2:])
        flops = tokenizer_flops(self.tokenizer_config, size).total
        if self.procedure.trains == "decoder":
            flops -= encoder_flops(self.tokenizer_config, size).backward
        tokens = number * math.prod(self.tokenizer_config.latent_shape(*size)[1:])
        return Work(number, tokens, tokens, number * flops)

    def _lpips(self, clips: Tensor, output: TokenizerOutput) -> Tensor:
        """Perceptual distance of every frame, `(b f,)`."""
        frames = [rearrange(x, "b c f h w -> (b f) c h w") for x in (output.reconstruction, clips)]
        return self.lpips(*frames)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the tokenizer, then the discriminators, on a batch of one source."""
        clips, strength = batch["clips"], -1.0
        optimizers = self.optimizers(use_pl_optimizer=True)
        players = optimizers if isinstance(optimizers, list) else [optimizers]
        if self.adversarial is not None:
            strength = self.adversary.strength(self.samples_seen)
        fakes = self._update_tokenizer(clips, players[0], strength)
        if strength >= 0:
            self._update_adversary(clips, fakes, players[1])
        self.count_samples(len(clips))
        schedules = self.lr_schedulers()
        for schedule in schedules if isinstance(schedules, list) else [schedules]:
            assert isinstance(schedule, SampleSchedule)
            schedule.refresh()
        self.log("train/samples_seen", float(self.samples_seen))

    def _update_tokenizer(
        self, clips: Tensor, optimizer: LightningOptimizer, strength: float
    ) -> list[Tensor]:
        """Take a step; return the reconstructions made before it, by micro-batch."""
        fakes: list[Tensor] = []

        def loss_of(part: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            output = self(part)
            fakes.append(output.reconstruction.detach())
            losses = self._losses(part, output)
            if strength >= 0:
                factor, terms = self._adversarial_terms(losses, output, strength)
                losses |= {f"adversarial_{name}": factor * term for name, term in terms.items()}
            loss = torch.stack(list(losses.values())).sum()
            logs = {f"train/loss_{name}": value.detach() for name, value in losses.items()}
            logs["train/loss"] = loss.detach()
            logs["train/quantization_error"] = (output.z - output.z_hat).detach().square().mean()
            if strength >= 0:
                logs["gan/weight_factor"] = factor
            return loss, logs

        logs = self._backward(list(parts_of(clips, self.procedure.micro_batches)), loss_of)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        logs["train/grad_norm"] = clip(parameters, self.procedure.gradient_clip_val)
        step(self, optimizer, is_counted=True)
        self.log("train/loss", logs.pop("train/loss"), prog_bar=True)
        self.log_dict(logs)
        return fakes

    def _adversarial_terms(
        self, losses: dict[str, Tensor], output: TokenizerOutput, strength: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Factor and terms of the discriminators, which learn nothing from them."""
        assert self.adversarial is not None
        with self.adversary.frozen():
            terms = self.adversary.generator_terms(output.reconstruction)
        factor = torch.as_tensor(strength, device=output.z.device)
        if self.adversarial.is_adaptive and terms:
            last = self.tokenizer.last_layer.get_parameter("weight")
            others, judged = (torch.stack(list(t.values())).sum() for t in (losses, terms))
            factor = factor * adaptive_weight(others, judged, last)
        return factor, terms

    def _update_adversary(
        self, clips: Tensor, fakes: list[Tensor], optimizer: LightningOptimizer
    ) -> None:
        """Take a step of the discriminators that have something to see in these clips."""
        parts = list(parts_of(clips, self.procedure.micro_batches))
        made = iter(fakes)
        logs = self._backward(
            parts, lambda part: self.adversary.discriminator_terms(part, next(made))
        )
        if not logs:
            return
        for name, judge in self.adversary.discriminators.items():
            if f"gan/loss_{name}" in logs:
                norm = clip(judge.parameters(), self.procedure.gradient_clip_val)
                logs[f"gan/grad_norm_{name}"] = norm
        step(self, optimizer, is_counted=False)
        self.log_dict(logs)

    def _backward(
        self,
        parts: list[tuple[Tensor, float]],
        loss_of: Callable[[Tensor], tuple[Tensor | None, dict[str, Tensor]]],
    ) -> dict[str, Tensor]:
        """Add up the gradients of the parts of a batch; return what they log, likewise."""
        total: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        for index, (part, share) in enumerate(parts):
            loss, logs = loss_of(part)
            if loss is None:
                continue
            with unsynchronized(self.trainer, is_last=index == len(parts) - 1):
                self.manual_backward(share * loss)
            for name, value in logs.items():
                total[name] = total[name] + share * value
        return dict(total)

    # --- judging ----------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Judge reconstructions and codes; padding has weight 0."""
        output = self(batch["clips"])
        reconstruction = output.reconstruction.float()
        self.val_metrics.update(reconstruction, batch["clips"], batch["weights"])
        if self.code_statistics is not None:
            self.code_statistics.update(self.tokenizer.quantize(output.z), batch["weights"])

    def on_validation_epoch_end(self) -> None:
        """Log the means over all devices, and how the bits of every round are used."""
        self._log_judgement("val")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Judge as in validation."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log as in validation, under `test/`."""
        self._log_judgement("test")

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Prediction:
        """Return codes and reconstructions of held-out samples, padding left out."""
        real = batch["weights"] > 0
        codes = self.tokenizer.tokenize(batch["clips"][real])
        keys = [key for key, is_real in zip(batch["keys"], real.tolist(), strict=True) if is_real]
        return Prediction(keys, codes, self.tokenizer.detokenize(codes).float().clamp(-1, 1))

    def _log_judgement(self, prefix: str) -> None:
        for name, value in self.val_metrics.compute().items():
            self.log(f"{prefix}/{name}", value, prog_bar=name == "psnr")
        self.val_metrics.reset()
        if self.code_statistics is not None:
            for name, value in self.code_statistics.compute().scalars().items():
                self.log(f"codes/{name}", value)
            self.code_statistics.reset()


def _code_statistics(config: AnyTokenizerConfig) -> CodeStatistics | None:
    """Return an empty count of a tokenizer's codes, if it has any."""
    if not config.has_codes:
        return None
    return CodeStatistics(
        num_channels=config.code_channels,
        num_rounds=config.code_sizes.num_rounds,
        alphabet_size=config.alphabet_size,
    )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return a trained tokenizer with averaged weights, frozen and in eval mode.

    Args:
        path: Checkpoint of a `LitTokenizer`, the folder of its run, or an export.

    Raises:
        ValueError: If there is no checkpoint, or it is one of another kind.
    """
    if is_export(path):
        return read_pretrained(path).tokenizer()
    checkpoint = read_checkpoint(path)
    hyper_parameters = checkpoint.get("hyper_parameters", {})
    config = hyper_parameters.get("tokenizer")
    if not isinstance(config, dict):
        raise ValueError(
            f"'{path}' is no checkpoint of a tokenizer run: its hyper-parameters are "
            f"{sorted(hyper_parameters)}. Give one that `LitTokenizer` has written."
        )
    tokenizer = build_tokenizer(as_tokenizer_config(config))
    tokenizer.load_state_dict(select(averaged_state(checkpoint), "tokenizer"))
    return tokenizer.eval().requires_grad_(False)
