"""Laws of continuous batching; the generator is the stub of adaptive steps."""

import pytest
import torch
from torch import Tensor

from grn_lightning.samplers import (
    AdaptiveSteps,
    Constraint,
    RefineConfig,
    RefinedSample,
    StepInfo,
    refine,
    refine_queue,
)

SHAPE = (2, 4, 3)
RULE = AdaptiveSteps(slope=20.0, offset=-2.0, decision_step=3, min_steps=5)
GUIDED = {"guidance_scale": 2.0, "guidance_schedule": "interval", "guidance_interval": (0.3, 0.9)}
LABELS = torch.tensor([1, 12, 2, 9, 4, 6, 5, 1])


def generator(codes: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    per_row = (labels * 5 + (t * 100).round().long()).view(-1, *[1] * codes.ndim)
    mixed = (codes * 7 + codes.flatten(1).roll(1, 1).view_as(codes) * 3)[..., None]
    logits = ((mixed + per_row + torch.arange(4) * 11) % 13) / 3
    return logits * (labels / 3).view(-1, *[1] * codes.ndim)


def settings(**config) -> dict:
    return {
        "null_condition": torch.tensor([3]),
        "sample_index": torch.arange(len(LABELS)) + 50,
        "seed": 3,
        "alphabet_size": 4,
        "config": RefineConfig(**{"num_steps": 16, "adaptive": RULE, **config}),
    }


@pytest.mark.parametrize(
    ("max_batch", "is_lazy", "in_order"), [(1, False, False), (3, True, True), (100, True, False)]
)
@pytest.mark.parametrize("config", [{}, GUIDED, {"compact": False}, {"adaptive": None}])
def test_a_queue_gives_the_samples_of_one_large_batch(
    max_batch: int, is_lazy: bool, in_order: bool, config: dict
) -> None:
    options = settings(**config)
    whole = refine(generator, SHAPE, condition=LABELS, **options)
    condition = (lambda rows: LABELS[rows]) if is_lazy else LABELS
    samples = list(
        refine_queue(
            generator, SHAPE, condition=condition, max_batch=max_batch, in_order=in_order, **options
        )
    )
    rows = [sample.row for sample in samples]
    assert sorted(rows) == list(range(len(LABELS)))
    if in_order:
        assert rows == sorted(rows)
    for sample in samples:
        assert torch.equal(sample.codes, whole.codes[sample.row])
        assert torch.equal(sample.entropy, whole.entropy_curve(sample.row))
        assert sample.num_steps == whole.num_steps[sample.row]
        assert sample.num_evaluations == whole.num_evaluations[sample.row]


def test_the_batch_stays_full_while_there_is_work() -> None:
    sizes: list[int] = []

    def observe(info: StepInfo) -> None:
        sizes.append(len(info.sample_index))

    options = settings()
    samples = list(
        refine_queue(generator, SHAPE, condition=LABELS, max_batch=3, observer=observe, **options)
    )
    assert sum(sizes) == sum(sample.num_steps for sample in samples)
    assert set(sizes[: -max(sample.num_steps for sample in samples)]) == {3}
    assert sizes == sorted(sizes, reverse=True)


def test_short_samples_wait_so_that_the_end_is_not_left_to_long_ones() -> None:
    sizes: list[int] = []
    labels, places = LABELS.repeat(6), 4
    options = settings(**GUIDED) | {"sample_index": torch.arange(len(labels))}
    samples = refine_queue(
        generator,
        SHAPE,
        condition=labels,
        max_batch=places,
        observer=lambda info: sizes.append(len(info.sample_index)),
        in_order=False,
        **options,
    )
    whole = refine(generator, SHAPE, condition=labels, **options)
    for sample in samples:
        assert torch.equal(sample.codes, whole.codes[sample.row])
        assert torch.equal(sample.entropy, whole.entropy_curve(sample.row))
    assert len(set(whole.num_steps.tolist())) >= 4
    assert sum(sizes) == whole.num_steps.sum()
    assert sum(sizes) >= 0.95 * places * len(sizes)


def test_who_is_done_first_comes_first() -> None:
    samples = refine_queue(
        generator, SHAPE, condition=LABELS, max_batch=100, in_order=False, **settings()
    )
    steps = [sample.num_steps for sample in samples]
    assert steps == sorted(steps)


def test_samples_stay_what_they_were_when_others_take_their_place() -> None:
    options = settings(adaptive=None, num_steps=2)
    kept: list[tuple[RefinedSample, Tensor]] = []
    for sample in refine_queue(generator, SHAPE, condition=LABELS, max_batch=2, **options):
        kept.append((sample, sample.codes.clone()))
    assert all(torch.equal(sample.codes, copy) for sample, copy in kept)


def test_the_conditions_of_the_caller_are_left_alone() -> None:
    labels = LABELS.clone()
    list(refine_queue(generator, SHAPE, condition=labels, max_batch=2, **settings(**GUIDED)))
    assert torch.equal(labels, LABELS)


@pytest.mark.parametrize("rows", [1, len(LABELS)])
def test_constraints_go_with_their_samples(rows: int) -> None:
    codes = torch.randint(0, 4, (rows, *SHAPE), generator=torch.Generator().manual_seed(1))
    mask = torch.rand(codes.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    options = settings() | {"constraint": Constraint(codes, mask)}
    whole = refine(generator, SHAPE, condition=LABELS, **options)
    for sample in refine_queue(generator, SHAPE, condition=LABELS, max_batch=3, **options):
        known = mask[sample.row % rows]
        assert torch.equal(sample.codes[known], codes[sample.row % rows][known])
        assert torch.equal(sample.codes, whole.codes[sample.row])


def test_nothing_is_asked_before_the_first_sample_is() -> None:
    def refusing(rows: slice) -> Tensor:
        raise AssertionError

    refine_queue(generator, SHAPE, condition=refusing, max_batch=2, **settings())


def test_an_empty_queue_is_empty() -> None:
    options = settings() | {"sample_index": torch.arange(0)}
    nothing = torch.arange(0)
    assert not list(refine_queue(generator, SHAPE, condition=nothing, max_batch=2, **options))


def test_conditions_of_other_sizes_are_refused() -> None:
    def growing(rows: slice) -> tuple[Tensor, Tensor]:
        count = rows.stop - rows.start
        return LABELS[rows], torch.zeros(count, 3 + rows.start)

    def reading(codes: Tensor, t: Tensor, condition: tuple[Tensor, Tensor]) -> Tensor:
        return generator(codes, t, condition[0])

    options = settings() | {"null_condition": None}
    with pytest.raises(ValueError, match="same fields and sizes.*Pad captions to one length"):
        list(refine_queue(reading, SHAPE, condition=growing, max_batch=2, **options))


def test_places_for_nobody_are_refused() -> None:
    with pytest.raises(ValueError, match="max_batch must be at least 1, got 0"):
        refine_queue(generator, SHAPE, condition=LABELS, max_batch=0, **settings())
