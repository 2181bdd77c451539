"""Checks on the first batch of a training."""

from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from grn_lightning.lit.preflight import CHECKED_STAGES, LOG, CheckReport, Status, check_module


class Preflight(L.Callback):
    """Before the first step, check on its own batch that training and sampling mean the same.

    The checks are those of `grn check`; they read a few samples, draw no random numbers and change
    nothing. What is wrong stops the run; notes are logged. Modules of other kinds are let pass.

    Args:
        enabled: Whether to check.
        num_samples: Samples of the first batch that are looked at.

    Raises:
        ValueError: If `num_samples` is not positive.
    """

    def __init__(self, enabled: bool = True, num_samples: int = 2):
        if num_samples < 1:
            raise ValueError(f"`preflight.num_samples` must be at least 1, got {num_samples}.")
        self.enabled = enabled
        self.num_samples = num_samples
        self.report: CheckReport | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Check once, on every process; all stop if one has to.

        Raises:
            ValueError: If something is wrong; the message has every finding.
        """
        if not self.enabled or self.report is not None:
            return
        if not isinstance(pl_module, CHECKED_STAGES):
            return
        # ZeRO is a kind of DDP, but stage 3 and FSDP have cut the networks into pieces.
        is_whole = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
        can_forward = is_whole and not getattr(trainer.strategy, "zero_stage_3", False)
        report = check_module(
            pl_module, batch, num_samples=self.num_samples, can_forward=can_forward
        )
        self.report = report
        for finding in report.findings:
            if finding.status is Status.NOTE and trainer.is_global_zero:
                LOG.warning("preflight, %s: %s", finding.name, finding.text)
        if not trainer.strategy.reduce_boolean_decision(report.is_fine, all=True):
            wrong = [f for f in report.findings if f.status is Status.WRONG]
            found = " ".join(f"[{f.name}] {f.text}" for f in wrong) or "[another process]"
            raise ValueError(
                f"the checks before the first step found something wrong: {found} "
                "`--preflight.enabled=false` trains all the same."
            )
