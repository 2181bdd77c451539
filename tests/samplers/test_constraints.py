"""Laws of constraints; the generators are stubs whose answers are known."""

import pytest
import torch
from torch import Tensor

from grn_lightning.samplers import Constraint, RefineConfig, RefineResult, StepInfo, refine

MODES = ["clean", "renoised"]
GRIDS = {"image": (6, 5), "video": (3, 4, 5)}


def generator(codes: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Logits that depend on all that is given, row by row, without rounding."""
    per_row = (labels * 5 + (t * 100).round().long()).view(-1, *[1] * codes.ndim)
    mixed = (codes * 7 + codes.flatten(1).roll(1, 1).view_as(codes) * 3)[..., None]
    return ((mixed + per_row + torch.arange(4) * 11) % 13) / 3


def run(
    constraint: Constraint | None, *, samples: int = 3, grid: str = "image", num_steps: int = 6
) -> tuple[RefineResult, list[StepInfo]]:
    seen: list[StepInfo] = []
    result = refine(
        generator,
        (2, *GRIDS[grid]),
        condition=torch.arange(samples) % 3,
        sample_index=torch.arange(samples) + 10,
        seed=3,
        alphabet_size=4,
        config=RefineConfig(num_steps=num_steps),
        observer=seen.append,
        constraint=constraint,
    )
    return result, seen


def known(grid: str = "image", samples: int = 3, share: float = 0.4) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    shape = (samples, 2, *GRIDS[grid])
    codes = torch.randint(0, 4, shape, generator=rng)
    return codes, torch.rand(shape, generator=rng) < share


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", GRIDS)
def test_the_answer_has_exactly_the_known_codes(mode: str, grid: str) -> None:
    codes, mask = known(grid)
    result, seen = run(Constraint(codes, mask, mode), grid=grid)
    assert torch.equal(result.codes[mask], codes[mask])
    assert not torch.equal(result.codes[~mask], codes[~mask])
    for info in seen:
        assert torch.equal(info.codes[mask], codes[mask])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_steps", [1, 5])
def test_where_all_is_known_nothing_else_comes_back(mode: str, num_steps: int) -> None:
    codes, mask = known()
    result, _ = run(Constraint(codes, torch.ones_like(mask), mode), num_steps=num_steps)
    assert torch.equal(result.codes, codes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", GRIDS)
def test_where_nothing_is_known_nothing_changes(mode: str, grid: str) -> None:
    codes, mask = known(grid)
    free, free_steps = run(None, grid=grid)
    result, steps = run(Constraint(codes, torch.zeros_like(mask), mode), grid=grid)
    assert torch.equal(result.codes, free.codes)
    assert torch.equal(result.entropy, free.entropy)
    for info, free_info in zip(steps, free_steps, strict=True):
        assert torch.equal(info.x_t, free_info.x_t)


def test_clean_elements_stand_in_every_input_renoised_ones_with_their_share() -> None:
    codes, mask = known(samples=200)
    asked: list[Tensor] = []

    def watching(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        asked.append(x_t.clone())
        return generator(x_t, t, labels)

    for mode in MODES:
        asked.clear()
        refine(
            watching,
            (2, *GRIDS["image"]),
            condition=torch.zeros(200, dtype=torch.long),
            sample_index=torch.arange(200),
            seed=3,
            alphabet_size=4,
            config=RefineConfig(num_steps=4),
            constraint=Constraint(codes, mask, mode),
        )
        for step, x_t in enumerate(asked):
            share = (x_t[mask] == codes[mask]).double().mean().item()
            expected = 1.0 if mode == "clean" else step / 4 + (1 - step / 4) / 4
            assert abs(share - expected) <= 5 * (expected * (1 - expected) / mask.sum()) ** 0.5


def test_one_row_and_one_channel_serve_all() -> None:
    codes, mask = known()
    row, channel = codes[:1], mask[:1, :1]
    result, _ = run(Constraint(row, channel))
    whole, _ = run(Constraint(row.expand_as(codes).clone(), channel.expand_as(mask).clone()))
    assert torch.equal(result.codes, whole.codes)


def test_a_late_start_leaves_out_steps_and_keeps_its_share_of_the_given_map() -> None:
    codes, mask = known(samples=200)
    nothing = torch.zeros_like(mask)
    first: list[Tensor] = []

    def watching(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        if not first:
            first.extend([x_t.clone(), t.clone()])
        return generator(x_t, t, labels)

    result = refine(
        watching,
        (2, *GRIDS["image"]),
        condition=torch.zeros(200, dtype=torch.long),
        sample_index=torch.arange(200),
        seed=3,
        alphabet_size=4,
        config=RefineConfig(num_steps=8),
        constraint=Constraint(codes, nothing, start_time=0.6),
    )
    assert result.num_steps.tolist() == [4] * 200  # from 0.6, 0.625, 0.75 and 0.875
    assert result.num_forwards == (4, 800)
    assert torch.equal(first[1], torch.full((200,), 0.6))
    share = (first[0] == codes).double().mean().item()
    assert abs(share - (0.6 + 0.4 / 4)) <= 5 * (0.7 * 0.3 / codes.numel()) ** 0.5


@pytest.mark.parametrize("mode", MODES)
def test_a_late_start_keeps_what_is_known(mode: str) -> None:
    codes, mask = known()
    result, seen = run(Constraint(codes, mask, mode, start_time=0.5), num_steps=4)
    assert torch.equal(result.codes[mask], codes[mask])
    assert [info.step.tolist() for info in seen] == [[2] * 3, [3] * 3]
    assert result.entropy.shape == (2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "soft"}, "mode must be one of .*got 'soft'"),
        ({"start_time": 1.0}, r"start_time must be in \[0, 1\), got 1.0"),
        ({"known_mask": torch.zeros(3, 2, 6, 5)}, "known_mask bool, got .*float32"),
        ({"known_mask": torch.zeros(3, 2, 5, 5) > 0}, "same axes and grid"),
        ({"known_mask": torch.zeros(2, 2, 6, 5) > 0}, "known_mask must fit samples"),
        ({"known_codes": torch.zeros(3, 1, 6, 5).long()}, "known_codes must fit samples"),
        ({"known_codes": torch.full((3, 2, 6, 5), 4)}, r"must be in \[0, 4\), got .* to 4"),
    ],
)
def test_constraints_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    codes, mask = known()
    with pytest.raises(ValueError, match=message):
        run(Constraint(**{"known_codes": codes, "known_mask": mask, **change}))


def test_what_is_not_known_may_hold_anything() -> None:
    codes, mask = known()
    result, _ = run(Constraint(codes.where(mask, -1), mask))
    assert torch.equal(result.codes, run(Constraint(codes, mask))[0].codes)
