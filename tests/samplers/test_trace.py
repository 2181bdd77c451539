"""A trace remembers what the sampler did, and four masks part every map."""

import pytest
import torch
from torch import Tensor

from grn_lightning.samplers import RefineConfig, StepInfo, refine
from grn_lightning.samplers.stopping import AdaptiveSteps
from grn_lightning.samplers.trace import Trace, element_masks, observers


def draw(samples: list[int], observer=None, num_steps: int = 7, **settings):
    def generator(codes: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        values = torch.arange(4) * 11
        per_row = labels.view(-1, *[1] * codes.ndim)
        return ((codes[..., None] * 7 + per_row + values) % 13) / 3

    return refine(
        generator,
        (2, 3, 4),
        condition=torch.tensor(samples) % 3,
        sample_index=torch.tensor(samples),
        seed=7,
        alphabet_size=4,
        config=RefineConfig(num_steps=num_steps, **settings),
        observer=observer,
    )


def test_the_four_masks_part_the_map() -> None:
    keep, before = (torch.rand(5, 2, 3, 4) < 0.5 for _ in range(2))
    masks = element_masks(keep, before)
    assert (sum(mask.int() for mask in masks) == 1).all()
    assert (masks.filled | masks.kept).equal(keep)
    assert (masks.erased | masks.kept).equal(before)


def test_a_trace_tells_sample_by_sample_what_the_observer_saw() -> None:
    seen: list[StepInfo] = []
    trace = Trace()

    def both(info: StepInfo) -> None:
        seen.append(info)
        trace(info)

    result = draw([9, 2, 5], both)
    assert list(trace) == [9, 2, 5]
    assert len(trace) == 3
    for row, number in enumerate([9, 2, 5]):
        one = trace[number]
        assert one.num_steps == 7
        assert one.codes[-1].equal(result.codes[row])
        assert one.entropy.equal(result.entropy[:, row])
        assert one.codes.equal(torch.stack([info.codes[row] for info in seen]))
        assert one.flips.equal(torch.stack([info.changed_fraction[row] for info in seen]))
        keep = torch.stack([info.keep[row] for info in seen])
        assert (one.masks.filled | one.masks.kept).equal(keep)
        assert (one.masks.kept | one.masks.erased)[1:].equal(keep[:-1])
        assert not (one.masks.kept | one.masks.erased)[0].any()
        torch.testing.assert_close(one.t, torch.arange(7) / 7)
        torch.testing.assert_close(one.t_next, torch.arange(1, 8) / 7)


def test_shares_add_up_and_end_with_everything_drawn() -> None:
    trace = Trace()
    draw([0], trace)
    shares = trace[0].shares
    torch.testing.assert_close(sum(shares.values()), torch.ones(7))
    assert shares["filled"][-1] + shares["kept"][-1] == 1
    assert shares["erased"][1:-1].sum() > 0  # refinement takes back


def test_a_trace_does_not_care_for_batches() -> None:
    together, apart = Trace(), Trace()
    draw([4, 8], together)
    for number in (8, 4):
        draw([number], apart)
    for number in (4, 8):
        assert together[number].codes.equal(apart[number].codes)
        assert together[number].masks.erased.equal(apart[number].masks.erased)


def test_what_was_not_seen_is_not_known() -> None:
    with pytest.raises(KeyError):
        Trace()[3]


def test_a_trace_may_be_told_whom_to_watch() -> None:
    trace, everyone = Trace(only=range(5, 7)), Trace()
    draw([9, 5, 2], observers(trace, everyone))
    assert list(trace) == [5]
    assert list(everyone) == [9, 5, 2]
    assert trace[5].codes.equal(everyone[5].codes)


def test_samples_that_leave_the_batch_are_traced_to_their_end() -> None:
    trace = Trace()
    rule = AdaptiveSteps(slope=40.0, offset=-25.0, decision_step=2, min_steps=3)
    result = draw(list(range(8)), trace, num_steps=12, adaptive=rule)
    assert len(set(result.num_steps.tolist())) > 1
    for row, number in enumerate(range(8)):
        assert trace[number].num_steps == result.num_steps[row]
        assert trace[number].codes[-1].equal(result.codes[row])
        assert trace[number].masks.blank[-1].sum() == 0
