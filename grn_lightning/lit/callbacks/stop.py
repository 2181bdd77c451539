"""Signals that ask a training to stop: it saves, and ends as if it had been asked to."""

import os
import signal
import subprocess
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

from grn_lightning.lit.callbacks.checkpoint import Checkpoint
from grn_lightning.lit.preflight import LOG
from grn_lightning.lit.saving import save_whole

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(SystemExit):
    """Ends the process after a signal, with the exit code that shells expect of one.

    Attributes:
        message: What was saved and how to go on; empty on all processes but the first.
    """

    def __init__(self, code: int, message: str = ""):
        super().__init__(code)
        self.message = message


class StopOnSignal(L.Callback):
    """At SIGTERM or SIGUSR1 finish the step, save, and end with exit code 128 + signal.

    A signal to any process stops all of them after the same step: they agree after each. A step is
    one of the optimizer, so nothing that was accumulated is lost; a validation that runs is
    finished first. On SLURM a job that resumes by itself is queued again; another one leaves the
    signal that SLURM sends before the time is up (SIGUSR1) to Lightning, which saves at once and
    queues the job again.

    Args:
        requeue: Whether a job of SLURM goes on by itself when it is started again.
    """

    def __init__(self, requeue: bool = False):
        self.requeue = requeue
        self.received: int = 0
        self._process = 0

    # --- listening --------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen from here on: Lightning has taken the signals shortly before."""
        self._listen(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen, if there was no sanity check."""
        self._listen(trainer)

    def _listen(self, trainer: L.Trainer) -> None:
        """Take the signals over; Lightning gives them back when training ends.

        Its own handler of SIGTERM talks to the other processes from inside the handler, while they
        may be talking about something else, and saves nothing.
        """
        self._process = os.getpid()
        is_left = _slurm(trainer) is not None and not self.requeue
        for number in SIGNALS:
            if not (is_left and number == signal.SIGUSR1):
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's process, which has inherited the handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = number

    # --- stopping ---------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Stop where all processes stop.

        Raises:
            Stopped: When the checkpoint is on the disk.
        """
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        if not trainer.strategy.reduce_boolean_decision(bool(self.received), all=False):
            return
        number = self.received or signal.SIGTERM  # another process was told
        path = self._save(trainer)
        if self.requeue and trainer.is_global_zero and (environment := _slurm(trainer)):
            _queue_again(environment)
        message = _farewell(number, trainer.global_step, path) if trainer.is_global_zero else ""
        raise Stopped(0 if _is_watched(trainer) else 128 + number, message)

    def _save(self, trainer: L.Trainer) -> Path | None:
        """Save this step where the run keeps its checkpoints; None if it keeps none."""
        savers = trainer.checkpoint_callbacks
        if not savers or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        saver = savers[0]
        if isinstance(saver, Checkpoint):
            return saver.save_now(trainer)
        folder = getattr(saver, "dirpath", None) or trainer.default_root_dir
        path = Path(folder) / "interrupted.ckpt"
        save_whole(trainer, path)
        return path


def _farewell(number: int, step: int, path: Path | None) -> str:
    name = signal.Signals(number).name
    if path is None:
        return f"{name}: stopped after step {step:,}; this run keeps no checkpoints."
    return (
        f"{name}: stopped after step {step:,}, saved as '{path}'; the same command with "
        "`--resume auto` goes on."
    )


def _is_watched(trainer: L.Trainer) -> bool:
    """Whether Lightning has started this process, and kills all of them if one fails."""
    environment = trainer._accelerator_connector.cluster_environment
    return isinstance(environment, LightningEnvironment) and trainer.local_rank != 0


# --- SLURM ----------------------------------------------------------------------------------------


def _slurm(trainer: L.Trainer) -> SLURMEnvironment | None:
    """Return SLURM's environment, if it queues jobs again."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment
    return None


def _queue_again(environment: SLURMEnvironment) -> None:
    job = os.environ.get("SLURM_ARRAY_JOB_ID")
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    name = f"{job}_{task}" if job and task else str(environment.job_id())
    done = subprocess.run(["scontrol", "requeue", name], capture_output=True, text=True)
    if done.returncode:
        LOG.warning("job %s could not be queued again: %s", name, done.stderr.strip())
