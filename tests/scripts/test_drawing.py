"""Drawing in parts: a queue where steps are adaptive gives the samples of the batches."""

from dataclasses import replace

import pytest
import torch

from grn_lightning.lit.generator import load_generator
from grn_lightning.pipelines import GeneratorPipeline
from grn_lightning.samplers import AdaptiveSteps, RefineConfig, StepInfo
from grn_lightning.scripts.drawing import RefinedPart, draw_parts
from grn_lightning.scripts.runs import ClipSize
from tests.scripts.conftest import Runs

PROMPTS = ["the digit seven moves left", "one", "the digit two moves up", "a zero", "", "the digit"]
# The tiny generators hardly differ in entropy: the rule takes the differences apart.
WALK = RefineConfig(num_steps=9, guidance_scale=2.0, rows_per_call=16)


def adaptive(pipeline: GeneratorPipeline, wanted: dict, size: ClipSize) -> RefineConfig:
    """Steps between 3 and 9, as far apart as the entropies of these samples allow."""
    seen: list[float] = []

    def observe(info: StepInfo) -> None:
        if int(info.step[0]) == 1:
            seen.extend(info.entropy.tolist())

    drawn(pipeline, wanted, size, WALK, 16, observer=observe)
    low, high = min(seen), max(seen)
    slope = 7 / (high - low)
    rule = AdaptiveSteps(slope=slope, offset=1.5 - slope * low, decision_step=1, min_steps=3)
    return replace(WALK, adaptive=rule)


def drawn(
    pipeline: GeneratorPipeline, wanted: dict, size: ClipSize, config, batch_size: int, **rest
) -> list[RefinedPart]:
    [values] = wanted.values()
    index = torch.arange(len(values)) + 4
    return list(
        draw_parts(
            pipeline, wanted, index, size=size, config=config, seed=1, batch_size=batch_size, **rest
        )
    )


@pytest.mark.parametrize("attention", ["full", "prefix", "class"])
def test_a_queue_draws_what_batches_draw(trained: Runs, attention: str) -> None:
    is_text = attention != "class"
    pipeline = load_generator(trained.text if is_text else trained.classes).pipeline
    size = ClipSize(5 if is_text else 1, 16, 16)
    wanted: dict = {"captions": PROMPTS * 2} if is_text else {"class_labels": [*range(10), 3, 4]}
    if is_text:
        object.__setattr__(pipeline.generator.config, "attention", attention)
    config = adaptive(pipeline, wanted, size)
    batches = drawn(pipeline, wanted, size, replace(config, compact=False), 5)
    queue = drawn(pipeline, wanted, size, config, 5)

    assert [part.rows for part in queue] == [range(0, 5), range(5, 10), range(10, 12)]
    steps = torch.cat([part.num_steps for part in queue])
    assert len(set(steps.tolist())) > 2, "nothing to wait for"
    for part, same in zip(queue, batches, strict=True):
        assert part.elements.equal(same.elements)
        assert part.clips is not None
        assert same.clips is not None
        assert part.clips.equal(same.clips)
        assert part.num_steps.equal(same.num_steps)
        assert part.entropy.equal(same.entropy)
        assert part.num_forwards == 2 * int(part.num_steps.sum())  # every step is guided


def test_a_queue_keeps_its_places_at_work(trained: Runs) -> None:
    """More samples under way per call than batches have, which shrink until they are done."""
    pipeline = load_generator(trained.classes).pipeline
    wanted, size = {"class_labels": [*range(10)] * 3}, ClipSize(1, 16, 16)
    config = adaptive(pipeline, wanted, size)
    calls: list[int] = []

    def observe(info: StepInfo) -> None:
        calls.append(len(info.sample_index))

    parts = drawn(pipeline, wanted, size, config, 6, observer=observe)
    rows = sum(int(part.num_steps.sum()) for part in parts)
    assert sum(calls) == rows
    assert rows / len(calls) > 0.9 * 6
