"""What every training from the command line can do: go on from a checkpoint, stop when told to."""

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from grn_lightning.lit.callbacks.keys import KeyHash
from grn_lightning.lit.callbacks.resume import SameStart, SaveSettings
from grn_lightning.lit.callbacks.stop import StopOnSignal
from grn_lightning.lit.resume import Start, choose, go_on_in_place, is_own

_HELP = (
    "What training goes on from. auto: the newest whole checkpoint of this run's folder; if there "
    "is none yet, the run begins. PATH: that checkpoint, or the newest under that folder. none: "
    "nothing, and a new folder."
)


class ResumableCLI(LightningCLI):
    """LightningCLI with `--resume`, signals, and the fingerprint of samples; see `docs/resume.md`.

    The callbacks are not part of the configuration and cannot be left out of it.
    """

    def __init__(self, *args: Any, **settings: Any):
        self._same_start, self._stop = SameStart(), StopOnSignal()
        settings["trainer_defaults"] = {"callbacks": [self._same_start, KeyHash(), self._stop]}
        settings["save_config_callback"] = SaveSettings
        super().__init__(*args, **settings)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--resume`; validation and prediction accept it too, and the file of a training."""
        parser.add_argument("--resume", type=str | None, default=None, help=_HELP)

    def before_fit(self) -> None:
        """Find what to go on from, before anything is written.

        Raises:
            ValueError: If it is given twice, or there is nothing fit; see `choose`.
        """
        options = self.config_init["fit"]
        mode, path = options["resume"], options["ckpt_path"]
        goes_on = mode not in (None, "none")
        if goes_on and path is not None:
            raise ValueError(f"give either `resume` ('{mode}') or `ckpt_path` ('{path}').")
        saved = choose(mode, self.trainer, self.model)
        if saved is not None:
            go_on_in_place(self.trainer, saved)
            start = Start(saved, is_auto=mode == "auto", is_own=is_own(self.trainer, saved))
            options["ckpt_path"] = str(start.path)
            self._same_start.start = start
        self._stop.requeue = goes_on
