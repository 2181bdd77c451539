"""The tokenizer's opponents: discriminators of frames and of clips, and what both sides minimize.

The published setting (GRN, arXiv 2604.13030) is the default: a patch discriminator that sees every
frame, hinge loss, weight 0.3, from the first step. Whether to begin at once, later, or gently is a
matter of `start_samples` and `ramp_samples`: begin at once only from weights that reconstruct.

Different on purpose: discriminators get no gradients in the generator's step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import torch
from einops import rearrange
from torch import Tensor, nn

from grn_lightning.functional.adversarial import (
    DiscriminatorLoss,
    discriminator_loss,
    generator_loss,
    lecam_penalty,
    r1_penalty,
)
from grn_lightning.lit.base import as_config
from grn_lightning.lit.checkpoints import read_checkpoint, select
from grn_lightning.lit.optim import OptimConfig
from grn_lightning.nn.batch_norm import mean_over_ranks
from grn_lightning.nn.discriminator import DiscriminatorConfig, build_discriminator

_LECAM_DECAY = 0.99


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """Who judges, how much it counts, and since when."""

    image: DiscriminatorConfig | None = DiscriminatorConfig()
    """Discriminator of frames: of pictures, and of every frame of a clip; null for none."""
    video: DiscriminatorConfig | None = None
    """Discriminator of whole clips, which pictures pass by; null for none."""
    weight: float = 0.3
    """Weight of the frames' judgement in the tokenizer's loss."""
    video_weight: float = 0.3
    """Weight of the clips' judgement."""
    loss: DiscriminatorLoss = "hinge"
    """What discriminators minimize."""
    start_samples: int = 0
    """Samples seen before the game begins; until then discriminators do not even run."""
    ramp_samples: int = 0
    """Samples after the start over which both weights grow linearly from 0, while discriminators
    learn at full speed."""
    is_adaptive: bool = False
    """Multiply the weights by the ratio of the gradients of all other terms to those of the
    discriminators, at the decoder's last layer."""
    r1: float = 0.0
    """Weight of the penalty on the discriminators' gradient at real samples."""
    lecam: float = 0.0
    """Weight of the penalty on logits that leave the moving average of the other side."""
    optim: OptimConfig = OptimConfig(lr=1e-4)
    """Optimizer of the discriminators; its schedule counts samples since the start."""
    init_from: str | None = None
    """Checkpoint or run folder whose discriminators are the start; null starts new ones."""

    def __post_init__(self) -> None:
        """Take plain data, as checkpoints hold them, and refuse what cannot be meant."""
        for name, kind in (("image", DiscriminatorConfig), ("video", DiscriminatorConfig)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, as_config(kind, getattr(self, name)))
        object.__setattr__(self, "optim", as_config(OptimConfig, self.optim))
        numbers = ("weight", "video_weight", "start_samples", "ramp_samples", "r1", "lecam")
        issues = [
            f"`{name}` must be at least 0, got {getattr(self, name)}"
            for name in numbers
            if getattr(self, name) < 0
        ]
        if self.loss not in get_args(DiscriminatorLoss):
            issues.append(f"`loss` must be one of {get_args(DiscriminatorLoss)}, got {self.loss!r}")
        if self.image is None and self.video is None:
            issues.append("`image` and `video` are both null; for no game set `adversarial: null`")
        kinds = [part.kind for part in (self.image, self.video) if part is not None]
        if self.r1 and "patch" in kinds:
            issues.append(
                "`r1` needs discriminators whose logits depend on one sample only, which batch "
                "norm does not give: take `kind: spectral` or `kind: stylegan`, or `lecam`"
            )
        if issues:
            raise ValueError("AdversarialConfig: " + "; ".join(issues) + ".")


class Adversary(nn.Module):
    """The discriminators of one run, and the terms of both players' losses.

    Args:
        config: Who judges, and how.
    """

    averages: Tensor

    def __init__(self, config: AdversarialConfig) -> None:
        super().__init__()
        self.config = config
        parts = {"image": config.image, "video": config.video}
        self.discriminators = nn.ModuleDict(
            {
                name: build_discriminator(part, num_axes=2 if name == "image" else 3)
                for name, part in parts.items()
                if part is not None
            }
        )
        self._weights = {"image": config.weight, "video": config.video_weight}
        if config.lecam:  # of the mean logits: a row for each discriminator, real and fake
            self.register_buffer("averages", torch.zeros(len(self.discriminators), 2))

    def load_from(self, path: str) -> None:
        """Take the discriminators of another run.

        Raises:
            ValueError: If it had none, or others.
        """
        state = select(read_checkpoint(path)["state_dict"], "adversary.discriminators")
        try:
            self.discriminators.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"'{path}' has not the discriminators that `adversarial` describes; take its "
                f"settings, or set `adversarial.init_from: null`. {error}"
            ) from error

    def strength(self, samples_seen: int) -> float:
        """Return the factor of the generator's weights, 0 before the start; negative means idle."""
        since = samples_seen - self.config.start_samples
        if since < 0:
            return -1.0
        return min(1.0, since / self.config.ramp_samples) if self.config.ramp_samples else 1.0

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Keep discriminators from getting gradients; they are handed through all the same."""
        self.requires_grad_(False)
        try:
            yield
        finally:
            self.requires_grad_(True)

    def _views(self, clips: Tensor) -> dict[str, Tensor]:
        """What each discriminator sees of clips `(b, 3, f, h, w)`."""
        views = {"image": rearrange(clips, "b c f h w -> (b f) c h w"), "video": clips}
        if clips.shape[2] == 1:
            del views["video"]
        return {name: view for name, view in views.items() if name in self.discriminators}

    def generator_terms(self, reconstruction: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of the tokenizer's loss, by discriminator."""
        return {
            name: self._weights[name] * generator_loss(self.discriminators[name](view))
            for name, view in self._views(reconstruction).items()
        }

    def discriminator_terms(
        self, clips: Tensor, fakes: Tensor
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return the sum of the discriminators' losses, and what is to be logged.

        Args:
            clips: Data `(b, 3, f, h, w)`.
            fakes: Their reconstructions, detached.

        Returns:
            The loss, None if no discriminator has anything to see; and the logs.
        """
        losses: list[Tensor] = []
        logs: dict[str, Tensor] = {}
        fake_views = self._views(fakes)
        for name, real in self._views(clips).items():
            terms = self._terms(name, real, fake_views[name], logs)
            losses.append(torch.stack(list(terms.values())).sum())
            logs |= {f"gan/{term}_{name}": value.detach() for term, value in terms.items()}
        return (torch.stack(losses).sum() if losses else None), logs

    def _terms(
        self, name: str, real: Tensor, fake: Tensor, logs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        judge, config = self.discriminators[name], self.config
        real = real.detach().requires_grad_(config.r1 > 0)
        real_logits, fake_logits = judge(real), judge(fake)
        terms = {"loss": discriminator_loss(real_logits, fake_logits, kind=config.loss)}
        if config.r1:
            terms["r1"] = config.r1 * r1_penalty(real_logits, real)
        if config.lecam:
            terms["lecam"] = config.lecam * self._lecam(name, real_logits, fake_logits)
        logits = {"real": real_logits.detach().float(), "fake": fake_logits.detach().float()}
        right = [(logits["real"] > 0).float().mean(), (logits["fake"] < 0).float().mean()]
        logs |= {f"gan/logits_{side}_{name}": values.mean() for side, values in logits.items()}
        logs[f"gan/accuracy_{name}"] = torch.stack(right).mean()
        return terms

    def _lecam(self, name: str, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Penalize by the averages so far, then move them."""
        row = list(self.discriminators).index(name)
        real_average, fake_average = self.averages[row].clone()
        penalty = lecam_penalty(
            real_logits, fake_logits, real_average=real_average, fake_average=fake_average
        )
        means = torch.stack([real_logits.detach().mean(), fake_logits.detach().mean()]).float()
        self.averages[row].lerp_(mean_over_ranks(means), 1 - _LECAM_DECAY)
        return penalty
