"""A signal ends a training with a checkpoint of its last step, on every process alike."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from grn_lightning.lit.callbacks import Checkpoint, StopOnSignal
from grn_lightning.lit.callbacks import stop as stopping
from grn_lightning.lit.callbacks.keys import STATE
from grn_lightning.lit.callbacks.stop import Stopped
from tests.tiny_runs import call_grn, callback, kill, start_grn, tokenizer_config, write_yaml

PATIENCE_SECONDS = 120

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty"),
    pytest.mark.filterwarnings("ignore:The `train_dataloader` does not have many workers"),
]


class Line(L.LightningModule):
    """Learns a slope; remembers which samples it has seen since when."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.slope - batch.mean()) ** 2

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Tell(L.Callback):
    """Sends a signal to this process at the beginning of a batch, or of the sanity check."""

    def __init__(self, number: int, *, batch: int | None = None, sanity: bool = False):
        self.number, self.batch, self.sanity = number, batch, sanity

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batch:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self.sanity and trainer.sanity_checking:
            os.kill(os.getpid(), self.number)


def train(
    folder: Path, *callbacks: L.Callback, ckpt_path: Path | None = None, **options: Any
) -> tuple[L.Trainer, Line]:
    module = Line()
    samples = torch.arange(40.0)
    defaults: dict[str, Any] = {"max_steps": 12, "num_sanity_val_steps": 0}
    trainer = L.Trainer(
        accelerator="cpu", devices=1, callbacks=list(callbacks), default_root_dir=folder,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        **(defaults | options),
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(samples, batch_size=2)  # type: ignore[arg-type]
    trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
    return trainer, module


def stopped(folder: Path, *callbacks: L.Callback, **options: Any) -> Stopped:
    with pytest.raises(Stopped) as stop:
        train(folder, *callbacks, StopOnSignal(), **options)
    return stop.value


def saved(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "last.ckpt", weights_only=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_finishes_the_step_saves_and_tells(tmp_path, number, code):
    before = [signal.getsignal(one) for one in stopping.SIGNALS]
    stop = stopped(tmp_path, Tell(number, batch=5), Checkpoint(tmp_path, save_last=True))
    assert stop.code == code
    assert saved(tmp_path)["global_step"] == 5
    assert f"{signal.Signals(number).name}: stopped after step 5, saved as" in stop.message
    assert "last.ckpt'; the same command with `--resume auto` goes on" in stop.message
    assert [signal.getsignal(one) for one in stopping.SIGNALS] == before  # given back


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    _, straight = train(tmp_path / "straight")
    stopped(tmp_path, Tell(signal.SIGTERM, batch=7), Checkpoint(tmp_path, save_last=True))
    loop = saved(tmp_path)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert loop["total"]["processed"] == 7
    # An ordinary loader starts over; seven batches are left out of its samples by hand.
    rest = Line()
    rest.load_state_dict(saved(tmp_path)["state_dict"])
    optimizer = rest.configure_optimizers()
    optimizer.load_state_dict(saved(tmp_path)["optimizer_states"][0])
    for batch in torch.arange(40.0).split(2)[7:12]:
        optimizer.zero_grad()
        rest.training_step(batch, 0).backward()
        optimizer.step()
    assert rest.slope.equal(straight.slope)


def test_gradients_that_are_being_accumulated_are_not_lost(tmp_path):
    stop = stopped(
        tmp_path,
        Tell(signal.SIGTERM, batch=4),
        Checkpoint(tmp_path, save_last=True),
        accumulate_grad_batches=3,
    )
    assert "after step 2" in stop.message
    loop = saved(tmp_path)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert loop["total"]["processed"] == 6


@pytest.mark.parametrize(
    ("saver", "name"),
    [
        (lambda folder: Checkpoint(folder, every_n_train_steps=50), "last.ckpt"),
        (lambda folder: Checkpoint(folder, save_last="link"), "last.ckpt"),
        (lambda folder: ModelCheckpoint(folder), "interrupted.ckpt"),
    ],
)
def test_every_run_that_keeps_checkpoints_is_saved(tmp_path, saver, name):
    stop = stopped(tmp_path, Tell(signal.SIGTERM, batch=5), saver(tmp_path))
    assert torch.load(tmp_path / name, weights_only=True)["global_step"] == 5
    assert str(tmp_path) in stop.message
    assert not list(tmp_path.glob(".*"))


def test_a_step_that_was_just_saved_is_not_saved_again(tmp_path):
    saver = Checkpoint(tmp_path, every_n_train_steps=5, save_last=True, save_top_k=0)
    stopped(tmp_path, Tell(signal.SIGTERM, batch=5), saver)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_run_without_checkpoints_stops_and_says_so(tmp_path):
    stop = stopped(tmp_path, Tell(signal.SIGTERM, batch=5), enable_checkpointing=False)
    assert "keeps no checkpoints" in stop.message
    assert list(tmp_path.iterdir()) == []


def test_a_signal_before_the_first_step_waits_for_it(tmp_path):
    tell = Tell(signal.SIGTERM, sanity=True)
    stop = stopped(tmp_path, tell, Checkpoint(tmp_path, save_last=True), num_sanity_val_steps=1)
    assert "after step 1," in stop.message


def test_a_signal_to_another_process_stops_this_one_too(tmp_path, monkeypatch):
    told = []

    def decide(self: Any, decision: bool, all: bool = True) -> bool:
        told.append((decision, all))
        return len(told) == 3  # somebody else was told

    monkeypatch.setattr(
        L.pytorch.strategies.SingleDeviceStrategy, "reduce_boolean_decision", decide
    )
    stop = stopped(tmp_path, Checkpoint(tmp_path, save_last=True, every_n_train_steps=100))
    assert told[:3] == [(False, False)] * 3
    assert "after step 3," in stop.message


def test_a_process_of_a_loader_ends_as_ever(tmp_path):
    listener = StopOnSignal()
    listener._process = os.getpid() + 1  # as after a fork
    before = signal.getsignal(signal.SIGUSR2)
    ended = []
    signal.signal(signal.SIGUSR2, lambda *_: ended.append("default"))
    patch = pytest.MonkeyPatch()
    patch.setattr(signal, "signal", lambda number, handler: ended.append(handler))
    try:
        listener._note(signal.SIGUSR2, None)
    finally:
        patch.undo()
        signal.signal(signal.SIGUSR2, before)
    assert ended == [signal.SIG_DFL, "default"]
    assert listener.received == 0


@pytest.mark.scale
@pytest.mark.parametrize("told", ["first", "second"])
def test_two_processes_stop_behind_the_same_step(digits, tmp_path, told):
    config = tokenizer_config(
        tmp_path,
        digits,
        callbacks=[callback("Checkpoint", dirpath=str(tmp_path), every_n_train_steps=2)],
        trainer={"max_steps": 1_000_000, "devices": 2, "strategy": "ddp"},
    )
    log = tmp_path / "output.txt"
    process = start_grn("fit", "-c", write_yaml(tmp_path, config), log=log)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not list(tmp_path.glob("*step=*.ckpt")):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(process.pid if told == "first" else int(children[0]), signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 143, log.read_text()
    finally:
        kill(process)
    assert log.read_text().count("grn: SIGTERM: stopped after step") == 1
    state = saved(tmp_path)
    assert state["samples_seen"] == state[STATE]["num_samples"] == state["global_step"] * 8


# --- SLURM ----------------------------------------------------------------------------------------


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What a job of SLURM with automatic requeueing has asked of `scontrol`."""
    asked: list[list[str]] = []
    environment = SimpleNamespace(job_id=lambda: 77, auto_requeue=True)
    monkeypatch.setattr(stopping, "_slurm", lambda trainer: environment)

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(stopping.subprocess, "run", run)
    return asked


def test_a_job_that_goes_on_by_itself_is_queued_again_when_it_is_saved(tmp_path, slurm):
    saver = Checkpoint(tmp_path, save_last=True)
    with pytest.raises(Stopped, match="138"):
        train(tmp_path, Tell(signal.SIGUSR1, batch=2), saver, StopOnSignal(requeue=True))
    assert slurm == [["scontrol", "requeue", "77"]]
    assert saved(tmp_path)["global_step"] == 2


def test_another_job_leaves_its_signal_to_lightning(tmp_path, slurm):
    """Which saves at once, and queues the job again."""
    received = []
    before = signal.signal(signal.SIGUSR1, lambda *_: received.append("lightning"))
    try:
        train(tmp_path, Tell(signal.SIGUSR1, batch=2), StopOnSignal(), max_steps=3)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert received == ["lightning"]
    assert slurm == []


# --- the command line -----------------------------------------------------------------------------


def test_the_command_ends_with_the_code_of_the_signal_and_a_sentence(digits, tmp_path, capsys):
    config = tokenizer_config(
        tmp_path,
        digits,
        callbacks=[callback("Checkpoint", dirpath=str(tmp_path / "saved"), save_last=True)],
        trainer={"max_steps": 1_000_000},
    )
    with pytest.MonkeyPatch.context() as patch:
        step = stopping.StopOnSignal.on_train_batch_end

        def tell_at_the_third(self: Any, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            step(self, trainer, *args)

        patch.setattr(stopping.StopOnSignal, "on_train_batch_end", tell_at_the_third)
        with pytest.raises(SystemExit) as stop:
            call_grn("fit", "-c", write_yaml(tmp_path, config))
    assert stop.value.code == 143
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("grn: ")]
    assert lines == [
        f"grn: SIGTERM: stopped after step 3, saved as '{tmp_path}/saved/last.ckpt'; the same "
        "command with `--resume auto` goes on."
    ]
    assert torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)["global_step"] == 3
