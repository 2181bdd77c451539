"""Laws of prompt-to-prompt editing; the generators are stubs whose answers are known."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grn_lightning.samplers import RefineConfig, refine
from grn_lightning.samplers.edit import EditConfig, EditResult, EditStep, edit
from grn_lightning.samplers.stopping import AdaptiveSteps

GRIDS = {"image": (4, 3), "video": (2, 3, 4)}
ALL = EditConfig(position_threshold=-torch.inf, element_threshold=-torch.inf, lock_steps=0)
SAMPLES = torch.tensor([3, 0, 70000])


def hashing_generator(alphabet_size: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return a generator whose logits depend on all it is given, row by row, without rounding."""

    def generator(codes: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        per_row = (labels * 5 + (t * 100).round().long()).view(-1, *[1] * codes.ndim)
        mixed = (codes * 7 + codes.flatten(1).roll(1, 1).view_as(codes) * 3)[..., None]
        values = torch.arange(alphabet_size, device=codes.device) * 11
        return ((mixed + per_row + values) % 13) / 3

    return generator


def run(
    *,
    k: int = 4,
    grid: str = "image",
    generator: Callable | None = None,
    source: int = 1,
    target: int = 2,
    given: Tensor | None = None,
    samples: Tensor = SAMPLES,
    num_steps: int = 6,
    observer: Any = None,
    scale: float = 2.0,
    edit_config: EditConfig | None = None,
    settings: dict[str, Any] | None = None,
    **rules: Any,
) -> EditResult:
    return edit(
        generator or hashing_generator(k),
        (2, *GRIDS[grid]),
        source_condition=torch.tensor([source]),
        target_condition=torch.tensor([target]),
        null_condition=torch.tensor([9]),
        source_codes=given,
        sample_index=samples,
        seed=7,
        alphabet_size=k,
        config=RefineConfig(num_steps=num_steps, guidance_scale=scale, **(settings or {})),
        edit_config=edit_config or EditConfig(**rules),
        observer=observer,
    )


def plain(label: int, *, k: int, grid: str, scale: float = 2.0, **settings: Any) -> Tensor:
    return refine(
        hashing_generator(k),
        (2, *GRIDS[grid]),
        condition=torch.tensor([label]),
        null_condition=torch.tensor([9]),
        sample_index=SAMPLES,
        seed=7,
        alphabet_size=k,
        config=RefineConfig(num_steps=6, guidance_scale=scale, **settings),
    ).codes


def given_codes(k: int, grid: str) -> Tensor:
    return torch.randint(0, k, (len(SAMPLES), 2, *GRIDS[grid]))


CASES = [
    pytest.param(k, grid, is_given, id=f"{target}-{grid}-{'given' if is_given else 'drawn'}")
    for k, target in ((2, "bit"), (16, "index"))
    for grid in GRIDS
    for is_given in (False, True)
]


@pytest.mark.parametrize(("k", "grid", "is_given"), CASES)
def test_equal_prompts_return_the_source(k: int, grid: str, is_given: bool) -> None:
    given = given_codes(k, grid) if is_given else None
    source = given if is_given else plain(1, k=k, grid=grid)
    result = run(k=k, grid=grid, given=given, target=1, position_threshold=0.0)
    if is_given:  # both see the same map only as long as nothing was edited
        assert not result.editable.any()
    assert result.codes.equal(source)
    assert result.source.equal(source)


@pytest.mark.parametrize(("k", "grid", "is_given"), CASES)
@pytest.mark.parametrize("name", ["position_threshold", "element_threshold"])
def test_an_infinite_threshold_returns_the_source(
    k: int, grid: str, is_given: bool, name: str
) -> None:
    given = given_codes(k, grid) if is_given else None
    result = run(k=k, grid=grid, given=given, **{name: torch.inf})
    assert result.codes.equal(given if is_given else plain(1, k=k, grid=grid))
    assert not result.editable.any()


@pytest.mark.parametrize(("k", "grid", "is_given"), CASES)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_without_thresholds_the_target_is_drawn_as_if_there_were_no_source(
    k: int, grid: str, is_given: bool, scale: float
) -> None:
    given = given_codes(k, grid) if is_given else None
    result = run(k=k, grid=grid, given=given, edit_config=ALL, scale=scale)
    assert result.codes.equal(plain(2, k=k, grid=grid, scale=scale))
    assert result.editable.all()


@pytest.mark.parametrize(
    "settings",
    [
        {"realised_time": True},
        {"time_cap": 0.95, "schedule": "cosine"},
        {"temperature": 0.0},
        {"temperature": 1.3, "guidance_schedule": "power_cosine"},
    ],
)
def test_steps_are_those_of_drawing(settings: dict[str, Any]) -> None:
    result = run(edit_config=ALL, settings=settings)
    assert result.codes.equal(plain(2, k=4, grid="image", **settings))
    assert result.source.equal(plain(1, k=4, grid="image", **settings))


@pytest.mark.parametrize(("k", "grid", "is_given"), CASES)
def test_what_is_not_edited_is_the_source_at_every_step(k: int, grid: str, is_given: bool) -> None:
    seen: list[EditStep] = []
    given = given_codes(k, grid) if is_given else None
    rules = {"position_threshold": 0.1, "lock_steps": 0}
    result = run(k=k, grid=grid, given=given, observer=seen.append, **rules)
    assert result.editable.any()
    assert not result.editable.all()
    assert not result.codes.equal(result.source)
    for info in seen:
        assert info.codes[~info.editable].equal(info.source[~info.editable])
        assert given is None or info.source.equal(given)
    assert seen[-1].codes.equal(result.codes)
    assert [(info.step, info.num_steps) for info in seen] == [(i, 6) for i in range(6)]
    assert given is not None or result.source.equal(plain(1, k=k, grid=grid))


def slow_masks(seen: list[EditStep], config: EditConfig) -> list[Tensor]:
    """Walk through 2d and 2e position by position, element by element, for the first sample."""
    c, *grid = seen[0].codes.shape[1:]
    places = [tuple(p) for p in torch.ones(grid).nonzero().tolist()]
    last: dict[tuple, int] = {}
    frozen: set[tuple] | None = None
    is_switched = False
    masks = []
    for info in seen:
        d = info.difference[0]
        chosen = {p for p in places if sum(float(d[(e, *p)]) for e in range(c)) / c > 0.01}
        if frozen is not None:
            chosen = frozen
        if not is_switched and info.t >= config.freeze_time:
            is_switched = True
            excess = [float(d[(slice(None), *p)].mean()) for p in chosen]
            if excess and sum(excess) / len(excess) > config.freeze_threshold:
                frozen = chosen
        mask = torch.zeros_like(info.editable[0])
        for p in places:
            for e in range(c):
                if p in chosen and d[(e, *p)] > config.element_threshold:
                    last[(e, *p)] = info.step
                may = info.step - last.get((e, *p), -99) <= config.lock_steps
                mask[(e, *p)] = may and (frozen is None or p in frozen)
        masks.append(mask)
    return masks


@pytest.mark.parametrize(
    ("lock_steps", "freeze_time", "freeze_threshold", "freezes"),
    [(0, 1.0, 0.0, False), (2, 1.0, 0.0, False), (1, 0.4, 0.0, True), (1, 0.4, 0.9, False)],
)
def test_masks_are_those_of_a_slow_loop(
    lock_steps: int, freeze_time: float, freeze_threshold: float, freezes: bool
) -> None:
    config = EditConfig(
        position_threshold=0.01,
        element_threshold=0.05,
        lock_steps=lock_steps,
        freeze_time=freeze_time,
        freeze_threshold=freeze_threshold,
    )
    seen: list[EditStep] = []
    result = run(num_steps=10, observer=seen.append, edit_config=config, grid="video")
    assert bool(result.is_frozen[0]) == freezes
    expected = slow_masks(seen, config)
    assert any(mask.any() for mask in expected)
    for info, mask in zip(seen, expected, strict=True):
        assert info.editable[0].equal(mask), info.step


def test_the_difference_is_what_the_source_loses() -> None:
    p = torch.tensor([[0.7, 0.3], [0.2, 0.8]])  # of both prompts

    def generator(codes: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return p.log()[labels].view(len(labels), 1, 1, 1, 2).expand(*codes.shape, 2)

    seen: list[EditStep] = []
    run(k=2, generator=generator, source=0, target=1, scale=1.0, observer=seen.append)
    for info in seen:
        expected = torch.where(info.source == 0, 0.7 - 0.2, 0.3 - 0.8)
        torch.testing.assert_close(info.difference, expected)


def test_only_what_the_target_denies_is_edited() -> None:
    truth = torch.randint(0, 4, (2, 1, 2, 4, 3))  # a map per prompt; they differ in one column
    truth[1] = truth[0]
    truth[1, ..., 2] = (truth[0, ..., 2] + 1) % 4

    def oracle(codes: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        rows = torch.nn.functional.one_hot(truth[labels, 0], 4)
        return torch.where(rows == 1, 0.0, -torch.inf)

    for given in (None, truth[0].expand(3, -1, -1, -1)):
        result = run(generator=oracle, source=0, target=1, scale=1.0, given=given)
        assert result.source.equal(truth[0].expand_as(result.source))
        assert result.codes.equal(truth[1].expand_as(result.codes))
        assert result.editable[..., 2].all()
        assert not result.editable[..., :2].any()


def test_an_edit_depends_neither_on_its_batch_nor_on_its_place() -> None:
    rules = {"position_threshold": 0.05, "freeze_time": 0.3}
    together = run(**rules)
    backwards = run(samples=SAMPLES.flip(0), **rules)
    assert backwards.codes.flip(0).equal(together.codes)
    for row in range(len(SAMPLES)):
        alone = run(samples=SAMPLES[row : row + 1], **rules)
        assert alone.codes[0].equal(together.codes[row])
        assert alone.is_frozen[0] == together.is_frozen[row]


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 2), (2.0, 4)])
def test_both_prompts_share_one_call(scale: float, rows: int) -> None:
    calls = []

    def generator(codes: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        calls.append(labels.tolist())
        assert len(codes) == len(t) == len(labels)
        return hashing_generator(4)(codes, t, labels)

    result = run(generator=generator, scale=scale, num_steps=5)
    assert calls == [[1] * 3 + [2] * 3 + [9] * (3 * (rows - 2))] * 5
    assert result.num_forwards == (5, 5 * 3 * rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lock_steps": -1}, "lock_steps must be at least 0, got -1"),
        ({"freeze_time": 1.5, "position_threshold": float("nan")}, "position.*nan; freeze_time"),
    ],
)
def test_impossible_rules_are_refused_all_at_once(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EditConfig(**settings)


def test_codes_of_another_map_are_refused() -> None:
    with pytest.raises(ValueError, match=r"source_codes must be \(3, 2, 4, 3\).*got \(3, 2, 3, 4"):
        run(given=torch.zeros(3, 2, 3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"source_codes must be in \[0, 4\), got 0 to 7"):
        run(given=torch.arange(8).repeat(9).view(3, 2, 4, 3))


def test_adaptive_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="set adaptive to null"):
        run(settings={"adaptive": AdaptiveSteps(slope=1.0, offset=1.0, min_steps=6)})


def test_guidance_without_a_null_condition_is_refused() -> None:
    with pytest.raises(ValueError, match="null_condition is missing"):
        edit(
            hashing_generator(4),
            (2, 4, 3),
            source_condition=torch.tensor([0]),
            target_condition=torch.tensor([1]),
            sample_index=SAMPLES,
            seed=0,
            alphabet_size=4,
            config=RefineConfig(num_steps=2, guidance_scale=2.0),
            edit_config=EditConfig(),
        )
