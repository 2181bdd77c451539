"""Speed, waiting, utilization: by a clock that is set by hand, and in real runs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grn_lightning.lit import devices
from grn_lightning.lit.callbacks import Throughput
from grn_lightning.lit.callbacks import throughput as throughput_module
from grn_lightning.lit.work import Work
from tests.tiny_runs import callback, fit, generator_config, logger

WORK = Work(3, 30, 40, 6e12)


class Run:
    """A training whose clock, steps and processes are set by hand."""

    trainer: Any
    module: Any

    def __init__(self, monkeypatch: pytest.MonkeyPatch, callback: Throughput, *, world_size: int):
        self.clock, self.logs = 0.0, list[dict[str, float]]()
        monkeypatch.setattr(throughput_module.time, "perf_counter", lambda: self.clock)
        strategy = SimpleNamespace(reduce=self._reduce)
        self.world_size, self.callback = world_size, callback
        self.trainer = SimpleNamespace(
            world_size=world_size, log_every_n_steps=2, global_step=0, precision="bf16-mixed",
            strategy=strategy,
        )  # fmt: skip
        self.module = SimpleNamespace(
            log=self._note, work_of=lambda batch: batch, device=torch.device("cpu")
        )
        callback.on_train_start(self.trainer, self.module)

    def _reduce(self, sums: torch.Tensor, reduce_op: str) -> torch.Tensor:
        """The other processes have nothing but the same time."""
        assert reduce_op == "sum"
        others = torch.zeros_like(sums)
        others[-1] = sums[-1] * (self.world_size - 1)
        return sums + others

    def _note(self, name: str, value: float, **_: Any) -> None:
        if name == "perf/samples_per_second":
            self.logs.append({})
        self.logs[-1][name.removeprefix("perf/")] = value

    def batch(self, *, steps: bool = True, work: Work = WORK) -> None:
        """Wait 1 s for data and work 3 s."""
        self.clock += 1
        self.callback.on_train_batch_start(self.trainer, self.module, work, 0)
        self.clock += 3
        self.trainer.global_step += steps
        self.callback.on_train_batch_end(self.trainer, self.module, None, work, 0)

    def validate(self) -> None:
        """Take 1000 s."""
        self.callback.on_validation_start(self.trainer, self.module)
        self.clock += 1000
        self.callback.on_validation_end(self.trainer, self.module)


def test_counts_are_those_between_two_logs(monkeypatch):
    run = Run(monkeypatch, Throughput(peak_tflops=3.0), world_size=1)
    for _ in range(4):
        run.batch()
    assert len(run.logs) == 2
    for log in run.logs:
        assert log["samples_per_second"] == 6 / 8
        assert log["tokens_per_second"] == 60 / 8
        assert log["fill"] == 0.75
        assert log["data_wait"] == 2 / 8
        assert log["tflops_per_device"] == 12 / 8
        assert log["utilization"] == 0.5


@pytest.mark.parametrize("when", [1, 2])
def test_validation_is_no_training_wherever_it_falls(monkeypatch, when):
    run = Run(monkeypatch, Throughput(), world_size=1)
    for number in range(1, 5):
        run.batch()
        if number == when:
            run.validate()
    assert [log["samples_per_second"] for log in run.logs] == [6 / 8, 6 / 8]
    assert [log["data_wait"] for log in run.logs] == [2 / 8, 2 / 8]


def test_batches_that_only_accumulate_count_for_the_next_step_and_log_nothing(monkeypatch):
    run = Run(monkeypatch, Throughput(), world_size=1)
    for _ in range(4):
        run.batch(steps=False)
        run.batch()
    run.batch(steps=False)  # the step stands at a logging step, but was logged before
    assert [log["samples_per_second"] for log in run.logs] == [12 / 16, 12 / 16]


def test_devices_add_up_and_utilization_is_their_mean(monkeypatch):
    run = Run(monkeypatch, Throughput(peak_tflops=3.0), world_size=2)
    run.batch()
    run.batch()
    (log,) = run.logs  # the other process had no work at all
    assert log["samples_per_second"] == 6 / 8
    assert log["utilization"] == 0.25
    assert log["data_wait"] == 1 / 8


def test_what_is_unknown_is_not_logged(monkeypatch):
    run = Run(monkeypatch, Throughput(), world_size=1)
    run.batch(work=Work(3))
    run.batch(work=Work(3))
    (log,) = run.logs
    assert log.keys() == {"samples_per_second", "data_wait", "peak_memory_gib"}


def test_a_peak_that_is_none_is_refused():
    with pytest.raises(ValueError, match="`peak_tflops` must be positive or null, got 0"):
        Throughput(peak_tflops=0)


@pytest.mark.parametrize(
    ("name", "precision", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989e12),
        ("NVIDIA A100-SXM4-40GB", "32-true", 19.5e12),
        ("NVIDIA GeForce RTX 4090", "bf16-true", 165e12),
        ("NVIDIA Nothing 1", "bf16-mixed", None),
    ],
)
def test_a_device_is_known_by_the_name_of_its_driver(monkeypatch, name, precision, rate):
    monkeypatch.setattr(devices.torch.cuda, "get_device_name", lambda device: name)
    assert devices.peak_rate(torch.device("cuda", 0), precision) == rate
    assert devices.peak_rate(torch.device("cpu"), precision) is None


def test_a_run_logs_its_speed(digits, tokenizer_run, tmp_path):
    speed = callback("Throughput", peak_tflops=0.01)
    config = generator_config(tmp_path, digits, tokenizer_run, kind="text", callbacks=[speed])
    config["trainer"] |= {
        "logger": logger("TensorBoardLogger", tmp_path),
        "log_every_n_steps": 2,
        "max_steps": 4,
        "accumulate_grad_batches": 2,
    }
    fit(tmp_path, config)
    found = EventAccumulator(str(tmp_path / "log")).Reload()
    for tag in ("samples_per_second", "tokens_per_second", "tflops_per_device", "peak_memory_gib"):
        points = found.Scalars(f"perf/{tag}")
        assert [event.step for event in points] == [1, 3]
        assert all(event.value > 0 for event in points)
    for tag in ("data_wait", "fill", "utilization"):
        assert all(0 <= event.value < 1 for event in found.Scalars(f"perf/{tag}"))
    tokens, samples = (
        found.Scalars(f"perf/{tag}_per_second")[0].value for tag in ("tokens", "samples")
    )
    assert 13 + 3 <= tokens / samples <= 13 + 9  # a map, the time, and a caption
