"""How codes are used, to look at, and an alarm when they collapse."""

import warnings

import lightning as L
import torch
from PIL import Image

from grn_lightning.lit.base import require_stage
from grn_lightning.lit.callbacks.tensorboard import log_picture, log_text
from grn_lightning.lit.tokenizer import LitTokenizer
from grn_lightning.media.heat_maps import heat_map
from grn_lightning.metrics.codes import CodeAlarms, CodeReport

_MAX_COLUMNS = 64  # channels on one picture; the first ones of more


class WatchCodes(L.Callback):
    """Draw the entropy of every channel and round at each validation; warn of collapsed codes.

    The scalars `codes/...` are those of `LitTokenizer`. The picture is `codes/entropy`; alarms are
    warnings, the TensorBoard text `codes/alarms`, and their number `codes/num_alarms`.

    Args:
        alarms: Limits; null takes the defaults.
    """

    def __init__(self, alarms: CodeAlarms | None = None):
        self.alarms = alarms or CodeAlarms()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a run of another stage."""
        require_stage(self, pl_module, LitTokenizer)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at what the module has counted; it forgets right after."""
        assert isinstance(pl_module, LitTokenizer)
        statistics = pl_module.code_statistics
        if statistics is None or trainer.sanity_checking:
            return
        report: CodeReport = statistics.compute()
        log_picture(trainer, "codes/entropy", entropy_picture(report))
        found = self.alarms.sentences(report)
        pl_module.log("codes/num_alarms", float(len(found)))
        log_text(trainer, "codes/alarms", "\n".join(f"- {text}" for text in found) or "none")
        if trainer.is_global_zero:
            for text in found:
                warnings.warn(f"codes at step {trainer.global_step}: {text}", stacklevel=2)


def entropy_picture(report: CodeReport) -> Image.Image:
    """Draw the entropy of every round (rows) and channel (columns), and below it of the codes."""
    whole = report.channel_entropy.reshape(1, -1)
    rounds = report.bit_entropy.reshape(-1, whole.shape[1])
    labels = [*(f"round {index}" for index in range(len(rounds))), "code"]
    values = torch.cat([rounds, whole])[:, :_MAX_COLUMNS]
    return heat_map(
        values,
        title="entropy of bits and codes, as a share of the largest",
        rows=labels,
        x_label="code channel",
        limits=(0.0, 1.0),
    )
