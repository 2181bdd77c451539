import math

import pytest

from grn_lightning.samplers import PRESETS, get_preset


def test_the_published_class_conditional_settings_guide_27_of_50_steps() -> None:
    steps = get_preset("c2i-b").steps()
    assert [step.number for step in steps if step.is_guided] == list(range(23, 50))
    assert {step.guidance_scale for step in steps[23:]} == {2.35}
    assert {step.temperature for step in steps} == {1.31}
    assert steps[-1].t == 0.98


@pytest.mark.parametrize(("name", "cap"), [("t2i", 0.95), ("t2i-first", 0.999)])
def test_the_published_text_conditional_times_come_out(name: str, cap: float) -> None:
    steps = get_preset(name).steps()
    assert len(steps) == 50
    for i, step in enumerate(steps[:-1]):  # as the published program computes them
        u = min(1.0, (i + 1) / 49)
        assert step.t_next == pytest.approx(cap * (1 - math.cos(math.pi / 2 * u)), abs=1e-12)
        assert steps[i + 1].t == step.t_next
    assert steps[-1].t == cap
    assert steps[-1].t_next == 1


def test_published_times_in_print() -> None:
    times = {step.number: step.t for step in get_preset("t2v-first").steps()}
    printed = {1: 0.00051, 2: 0.00205, 5: 0.0128, 10: 0.0509, 20: 0.198, 25: 0.304, 30: 0.427}
    printed |= {40: 0.715, 45: 0.871, 48: 0.967, 49: 0.999}
    for number, t in printed.items():
        assert times[number] == pytest.approx(t, rel=1e-2)


def test_every_preset_walks_to_the_end() -> None:
    for config in PRESETS.values():
        assert config.steps()[-1].t_next == 1


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="unknown sampling preset 't2x'; known are 'plain', 'c2i-b'"
    ):
        get_preset("t2x")
