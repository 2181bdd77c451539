"""The tokenizer stage: reconstruct images and clips through quantized latents.

Here with reconstruction losses; perceptual and adversarial terms join `_losses`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from grn_lightning.datasets.samples import Batch
from grn_lightning.lit.base import StageModule, as_config, as_plain
from grn_lightning.lit.checkpoints import (
    averaged_state,
    read_checkpoint,
    select,
    trained_state,
)
from grn_lightning.lit.optim import OptimConfig
from grn_lightning.metrics.codes import CodeStatistics
from grn_lightning.metrics.reconstruction import reconstruction_metrics
from grn_lightning.models.pretrained import is_export, read_pretrained
from grn_lightning.models.tokenizer import HBQTokenizer, TokenizerConfig, TokenizerOutput
from grn_lightning.models.variants import TOKENIZERS, get_variant


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

    def __post_init__(self) -> None:
        """Refuse a loss of nothing."""
        if min(self.l1, self.l2, self.commitment) < 0 or self.l1 + self.l2 == 0:
            raise ValueError(
                "ReconstructionLossConfig: weights must be at least 0 and l1 or l2 positive, "
                f"got l1={self.l1}, l2={self.l2}, commitment={self.commitment}."
            )


class Prediction(NamedTuple):
    """What `predict` returns for a batch, in both stages."""

    keys: list[str]
    """Names of the samples."""
    codes: Tensor
    """`(b, d, f', h', w')` HBQ codes of the tokenizer; of the generator its elements."""
    clips: Tensor
    """`(b, 3, f, h, w)` in [-1, 1]: reconstructions, or samples."""


class LitTokenizer(StageModule):
    """Trains an `HBQTokenizer`; batches are those of `ShardData`.

    Args:
        tokenizer: A configuration, or the name of a row of `models.variants.TOKENIZERS`.
        loss: Weights of the loss terms.
        optim: Optimizer and schedule.
        init_from: Checkpoint or run folder of another tokenizer run whose averaged weights are
            the start, or an export; null starts from random weights.
        seed: Seed of whatever is random in a step.
    """

    averaged = ("tokenizer",)

    def __init__(
        self,
        tokenizer: TokenizerConfig | str,
        *,
        loss: ReconstructionLossConfig | None = None,
        optim: OptimConfig | None = None,
        init_from: str | None = None,
        seed: int = 0,
    ):
        super().__init__(optim=optim, seed=seed)
        name_or_config = (
            get_variant(TOKENIZERS, tokenizer) if isinstance(tokenizer, str) else tokenizer
        )
        self.tokenizer_config = as_config(TokenizerConfig, name_or_config)
        self.loss = as_config(ReconstructionLossConfig, loss)
        self.init_from = init_from
        self.save_hyperparameters(
            {
                "tokenizer": as_plain(self.tokenizer_config),
                "loss": as_plain(self.loss),
                "optim": as_plain(self.optim),
                "init_from": init_from,
                "seed": seed,
            }
        )
        self.val_metrics = reconstruction_metrics()
        self.code_statistics = CodeStatistics(
            num_channels=self.tokenizer_config.latent_channels,
            num_rounds=self.tokenizer_config.num_rounds,
        )

    def configure_model(self) -> None:
        """Build the network, once."""
        if hasattr(self, "tokenizer"):
            return
        self.tokenizer = HBQTokenizer(self.tokenizer_config)
        if self.init_from is not None:
            state = trained_state(self.init_from)
            self.tokenizer.load_state_dict(select(state, "tokenizer"))

    def setup(self, stage: str) -> None:
        """Let DDP pass over parameters without a gradient: images do not use layers over time."""
        if isinstance(self.trainer.strategy, DDPStrategy):
            self.trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)

    def forward(self, clips: Tensor) -> TokenizerOutput:
        """Reconstruct `(b, 3, f, h, w)` clips in [-1, 1]."""
        return self.tokenizer(clips)

    def _losses(self, clips: Tensor, output: TokenizerOutput) -> dict[str, Tensor]:
        """Weighted terms of the loss by name."""
        difference = output.reconstruction.float() - clips
        terms = {
            "l1": (self.loss.l1, difference.abs()),
            "l2": (self.loss.l2, difference.square()),
            # Detached: through the straight-through estimate the distance has no gradient.
            "commitment": (self.loss.commitment, (output.z - output.z_hat.detach()).square()),
        }
        return {name: weight * term.mean() for name, (weight, term) in terms.items() if weight}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Take one step on a batch of one source."""
        output = self(batch["clips"])
        losses = self._losses(batch["clips"], output)
        loss = torch.stack(list(losses.values())).sum()
        self.count_samples(len(batch["clips"]))

        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/loss_{name}": value for name, value in losses.items()})
        self.log("train/quantization_error", (output.z - output.z_hat).detach().square().mean())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Judge reconstructions and codes; padding has weight 0."""
        output = self(batch["clips"])
        reconstruction = output.reconstruction.float()
        self.val_metrics.update(reconstruction, batch["clips"], batch["weights"])
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
        for name, value in self.code_statistics.compute().scalars().items():
            self.log(f"codes/{name}", value)
        self.val_metrics.reset()
        self.code_statistics.reset()


def load_tokenizer(path: str | Any) -> HBQTokenizer:
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
    tokenizer = HBQTokenizer(TokenizerConfig(**config))
    tokenizer.load_state_dict(select(averaged_state(checkpoint), "tokenizer"))
    return tokenizer.eval().requires_grad_(False)
