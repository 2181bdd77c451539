"""The learning rate is a function of the samples seen, and of nothing else."""

import math

import pytest

from grn_lightning.functional.lr import lr_multiplier

SCHEDULES = ("constant", "linear", "cosine")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 40])
@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_it_equals_the_definition_written_out(schedule, warmup, fraction):
    total, start = 200, 200 * (1 - fraction)
    for seen in range(0, 260):
        expected = 1.0
        if warmup and seen + 1 < warmup:
            expected *= (seen + 1) / warmup
        if schedule != "constant" and seen > start:
            done = min((seen - start) / (total - start), 1.0)
            expected *= 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        got = lr_multiplier(
            seen,
            warmup_samples=warmup,
            total_samples=total,
            schedule=schedule,
            decay_fraction=fraction,
        )
        assert got == pytest.approx(expected, abs=1e-12), seen


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_ends_at_zero_and_stays_there(schedule):
    for seen in (1000, 1001, 5000):
        assert lr_multiplier(seen, total_samples=1000, schedule=schedule) == 0


def test_the_first_step_of_a_warm_up_moves_and_the_last_is_whole():
    warmup = [lr_multiplier(seen, warmup_samples=10) for seen in range(12)]
    assert warmup[0] > 0
    assert warmup[8] < 1
    assert warmup[9:] == [1, 1, 1]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("total", [None, 0])
def test_a_decay_without_an_end_is_refused(schedule, total):
    with pytest.raises(ValueError, match=f"'{schedule}' schedule needs `total_samples`"):
        lr_multiplier(0, total_samples=total, schedule=schedule)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=rf"decay_fraction.*\(0, 1\], got {fraction}"):
        lr_multiplier(0, total_samples=10, schedule="linear", decay_fraction=fraction)
