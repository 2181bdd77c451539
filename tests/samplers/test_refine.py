"""Laws of the sampler; the generators are stubs whose answers are known."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from grn_lightning.functional import counter_uniform, draw, keep_mask, random_codes
from grn_lightning.functional.random import Stream
from grn_lightning.samplers import AdaptiveSteps, RefineConfig, RefineResult, StepInfo, refine

GRIDS = {"line": (5,), "image": (4, 3), "video": (2, 3, 4)}
INTERVAL = {"guidance_scale": 2.35, "guidance_schedule": "interval"}


class Caption(NamedTuple):
    embeds: Tensor
    mask: Tensor


def hashing_generator(alphabet_size: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return a generator whose logits depend on all it is given, row by row, without rounding."""

    def generator(codes: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        assert t.dtype == torch.float32
        per_row = (labels * 5 + (t * 100).round().long()).view(-1, *[1] * codes.ndim)
        mixed = (codes * 7 + codes.flatten(1).roll(1, 1).view_as(codes) * 3)[..., None]
        values = torch.arange(alphabet_size, device=codes.device) * 11
        return ((mixed + per_row + values) % 13) / 3

    return generator


def run(
    generator: Callable, *, samples: list[int], k: int = 4, grid: str = "image", **settings
) -> RefineResult:
    names = ("observer", "null_condition", "constraint")
    options = {key: settings.pop(key) for key in names if key in settings}
    index = torch.tensor(samples)
    return refine(
        generator,
        (2, *GRIDS[grid]),
        condition=settings.pop("condition", index % 3),
        sample_index=index,
        seed=settings.pop("seed", 7),
        alphabet_size=k,
        config=RefineConfig(num_steps=settings.pop("num_steps", 6), **settings),
        **options,
    )


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("num_steps", [1, 2, 9])
def test_an_oracle_gets_its_answer_back(grid: str, num_steps: int) -> None:
    truth = torch.randint(0, 4, (3, 2, *GRIDS[grid]))

    def oracle(codes: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return torch.where(torch.nn.functional.one_hot(condition, 4) == 1, 0.0, -torch.inf)

    result = run(oracle, samples=[4, 1, 9], grid=grid, num_steps=num_steps, condition=truth)
    assert torch.equal(result.codes, truth)
    assert torch.equal(result.entropy, torch.zeros(num_steps, 3))


@pytest.mark.parametrize("k", [2, 16])
@pytest.mark.parametrize("grid", ["image", "video"])
@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 3.0}, INTERVAL])
def test_a_sample_depends_neither_on_its_batch_nor_on_its_place(
    k: int, grid: str, guidance: dict
) -> None:
    samples = [0, 1, 2, 3, 70000]
    null = torch.tensor([9])
    together = run(
        hashing_generator(k), samples=samples, k=k, grid=grid, null_condition=null, **guidance
    )
    backwards = run(
        hashing_generator(k), samples=samples[::-1], k=k, grid=grid, null_condition=null, **guidance
    )
    assert torch.equal(backwards.codes.flip(0), together.codes)
    assert torch.equal(backwards.entropy.flip(1), together.entropy)
    for row, sample in enumerate(samples):
        alone = run(
            hashing_generator(k), samples=[sample], k=k, grid=grid, null_condition=null, **guidance
        )
        assert torch.equal(alone.codes[0], together.codes[row])


def slow_loop(generator: Callable, sample: int, label: int, config: RefineConfig) -> Tensor:
    """Walk through the algorithm for one sample, with two forwards per step, on the plain grid."""
    index, shape, label_row = torch.tensor([sample]), (2, 4, 3), torch.tensor([label])
    options = {"seed": 7, "shape": shape}
    u = counter_uniform(index, step=0, stream=Stream.INITIAL, **options)
    r = random_codes(u, alphabet_size=4)
    z, num_steps = r, config.num_steps
    for i in range(num_steps):
        t, t_next = torch.tensor([i / num_steps]), torch.tensor([(i + 1) / num_steps])
        cond, uncond = (generator(z, t, row) for row in (label_row, torch.tensor([9])))
        low, high = config.guidance_interval
        w = config.guidance_scale if (low == 0 or i / num_steps > low) and t < high else 1.0
        logits = (uncond + w * (cond - uncond)) / config.temperature
        u = counter_uniform(index, step=i, stream=Stream.DRAW, **options)
        x_hat = draw(logits, u)
        keep = keep_mask(counter_uniform(index, step=i, stream=Stream.KEEP, **options), t_next)
        z = torch.where(keep, x_hat, r)
    return z[0]


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 1.0), (0.3, 0.7)])
def test_it_equals_the_slow_loop_that_always_asks_both_branches(interval: tuple) -> None:
    settings = {**INTERVAL, "guidance_interval": interval, "temperature": 1.31, "num_steps": 8}
    config = RefineConfig(**settings)
    result = run(
        hashing_generator(4), samples=[3, 4, 5], null_condition=torch.tensor([9, 9, 9]), **settings
    )
    expected = [slow_loop(hashing_generator(4), i, i % 3, config) for i in (3, 4, 5)]
    assert torch.equal(result.codes, torch.stack(expected))


@pytest.mark.parametrize(
    ("guidance", "num_guided"),
    [
        ({}, 0),
        ({"guidance_scale": 2.35}, 50),
        ({**INTERVAL, "guidance_interval": (0.44, 1.0)}, 27),  # as published: i = 23 .. 49
        ({"guidance_scale": 2.0, "guidance_schedule": "power_cosine"}, 49),  # 1 at t = 0
        ({"guidance_scale": 0.0, "guidance_schedule": "power_cosine"}, 0),
    ],
)
def test_both_branches_share_one_call_and_only_where_guidance_has_a_weight(
    guidance: dict, num_guided: int
) -> None:
    rows_of_calls = []

    def generator(codes: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        assert len(codes) == len(t) == len(labels)
        assert labels[len(labels) // 2 :].tolist() == [9, 9] or len(labels) == 2
        rows_of_calls.append(len(codes))
        return hashing_generator(4)(codes, t, labels)

    settings = {"num_steps": 50, "null_condition": torch.tensor([9]), **guidance}
    result = run(generator, samples=[0, 1], **settings)
    assert len(rows_of_calls) == 50
    assert rows_of_calls.count(4) == num_guided
    assert result.num_forwards == (50, sum(rows_of_calls))


def test_without_guidance_the_null_condition_changes_nothing() -> None:
    plain = run(hashing_generator(4), samples=[0, 1])
    with_null = run(hashing_generator(4), samples=[0, 1], null_condition=torch.tensor([9]))
    assert torch.equal(plain.codes, with_null.codes)


def watch(**settings) -> tuple[RefineResult, list[StepInfo]]:
    seen: list[StepInfo] = []
    result = run(hashing_generator(4), grid="video", observer=seen.append, **settings)
    return result, seen


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_every_step_keeps_its_share_and_the_last_one_everything(schedule: str) -> None:
    _, seen = watch(samples=list(range(200)), num_steps=5, schedule=schedule, alpha=2.0)
    for info in seen:
        kept, count = info.keep.float().mean().item(), info.keep.numel()
        [t_next] = info.t_next.unique().tolist()
        assert abs(kept - t_next) <= 5 * (t_next * (1 - t_next) / count) ** 0.5
    assert (seen[-1].t_next == 1).all()
    assert seen[-1].keep.all()
    assert torch.equal(seen[-1].x_t, seen[-1].codes)


def test_the_random_map_is_fixed_and_the_masks_are_fresh() -> None:
    _, seen = watch(samples=list(range(20)), num_steps=6)
    u = counter_uniform(
        torch.arange(20), seed=7, step=0, stream=Stream.INITIAL, shape=(2, *GRIDS["video"])
    )
    x_0 = random_codes(u, alphabet_size=4)
    for info in seen:
        assert torch.equal(info.x_t[~info.keep], x_0[~info.keep])
        assert torch.equal(info.x_t[info.keep], info.codes[info.keep])
    for info, following in zip(seen[:-2], seen[1:-1], strict=True):
        assert (info.keep & ~following.keep).any()  # what is kept once is not kept for good
    differs = (seen[0].codes != x_0).flatten(1).float().mean(1)
    torch.testing.assert_close(seen[0].changed_fraction, differs)


def test_an_observer_sees_what_is_returned_and_changes_nothing() -> None:
    result, seen = watch(samples=[5, 6], num_steps=4)
    assert [info.step.tolist() for info in seen] == [[i, i] for i in range(4)]
    assert all(info.num_steps.tolist() == [4, 4] for info in seen)
    for info, following in zip(seen[:-1], seen[1:], strict=True):
        assert torch.equal(info.t_next, following.t)
    assert torch.equal(seen[-1].codes, result.codes)
    assert torch.equal(torch.stack([info.entropy for info in seen]), result.entropy)
    unwatched = run(hashing_generator(4), grid="video", samples=[5, 6], num_steps=4)
    assert torch.equal(unwatched.codes, result.codes)


def test_the_entropy_is_that_of_the_condition_before_guidance_and_temperature() -> None:
    p = torch.tensor([[0.9, 0.1], [0.5, 0.5]])  # condition: certain and undecided
    bits = torch.special.entr(p).sum(1) / torch.log(torch.tensor(2.0))

    def generator(codes: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return rows.log().view(len(rows), 1, 1, 1, 2).expand(*codes.shape, 2)

    settings = {"guidance_scale": 4.0, "temperature": 0.3, "num_steps": 3}
    null = torch.tensor([[0.2, 0.8]])
    result = run(generator, samples=[0, 1], k=2, condition=p, null_condition=null, **settings)
    torch.testing.assert_close(result.entropy, bits.expand(3, 2))


@pytest.mark.parametrize("p", [(0.1, 0.2, 0.3, 0.4), (0.3, 0.7)])
@pytest.mark.parametrize("grid", ["image", "video"])
def test_a_generator_that_ignores_its_input_yields_its_marginal(p: tuple, grid: str) -> None:
    chances, count = torch.tensor(p), 400

    def generator(codes: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return chances.log().expand(*codes.shape, len(p))

    settings = {"k": len(p), "num_steps": 12, "schedule": "cosine", "time_cap": 0.95}
    codes = run(generator, samples=list(range(count)), grid=grid, **settings).codes
    # One test per element and one for all; elements and samples are independent.
    counts = torch.nn.functional.one_hot(codes, len(p)).sum(0).double()
    for observed in (counts, counts.flatten(0, -2).sum(0)):
        expected = observed.sum(-1, keepdim=True) * chances.double()
        chi_square = ((observed - expected) ** 2 / expected).sum()
        degrees = (len(p) - 1) * observed[..., 0].numel()
        tail = torch.special.gammaincc(
            torch.tensor(degrees / 2, dtype=torch.float64), chi_square / 2
        )
        assert 1e-4 < tail < 1 - 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"num_steps": 1},
        {"num_steps": 12, "schedule": "cosine", "time_cap": 0.999, "realised_time": True},
        {"adaptive": AdaptiveSteps(slope=0.0, offset=4.0, decision_step=2, min_steps=3)},
        {"num_steps": 300, "adaptive": AdaptiveSteps(slope=0.0, offset=295.0, min_steps=20)},
    ],
)
def test_no_element_of_the_answer_is_left_from_the_random_map(settings: dict) -> None:
    index = torch.arange(4)
    u = counter_uniform(index, seed=7, step=0, stream=Stream.INITIAL, shape=(2, 4, 3))
    x_0 = random_codes(u, alphabet_size=4)

    def contrary(codes: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        is_start = torch.nn.functional.one_hot(x_0[rows], 4) == 1
        return torch.where(is_start, -torch.inf, 0.0)

    codes = run(contrary, samples=index.tolist(), condition=index, **settings).codes
    assert (codes != x_0).all()


def test_temperature_zero_takes_the_most_likely_value() -> None:
    def generator(codes: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return torch.tensor([0.0, 0.1, 0.3, 0.2]).expand(*codes.shape, 4)

    assert (run(generator, samples=[0, 1], temperature=0.0).codes == 2).all()


def test_another_seed_gives_other_samples() -> None:
    a, b = (run(hashing_generator(16), samples=[0], k=16, seed=seed).codes for seed in (0, 1))
    assert not torch.equal(a, b)


def test_a_condition_of_several_tensors_reaches_the_generator_whole() -> None:
    condition = Caption(torch.randn(2, 3, 8), torch.tensor([[True, True, False]] * 2))
    null = Caption(torch.zeros(1, 3, 8), torch.tensor([[True, False, False]]))

    def generator(codes: Tensor, t: Tensor, caption: Caption) -> Tensor:
        assert torch.equal(caption.embeds, torch.cat([condition.embeds, torch.zeros(2, 3, 8)]))
        assert caption.mask.sum(1).tolist() == [2, 2, 1, 1]
        return hashing_generator(4)(codes, t, caption.mask.sum(1))

    run(generator, samples=[0, 1], condition=condition, null_condition=null, guidance_scale=2.0)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_no_graph_is_built_in_any_mode(mode: Callable) -> None:
    weight = torch.ones((), requires_grad=True)

    def generator(codes: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        logits = weight * hashing_generator(4)(codes, t, labels)
        assert not logits.requires_grad
        return logits

    with mode():
        result = run(generator, samples=[0, 1])
    assert torch.equal(result.codes, run(hashing_generator(4), samples=[0, 1]).codes)


@pytest.mark.gpu
def test_a_gpu_draws_the_same_samples() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    settings = {
        "seed": 3,
        "alphabet_size": 4,
        "config": RefineConfig(num_steps=8, guidance_scale=2.0),
    }
    on_cpu, on_gpu = (
        refine(
            hashing_generator(4),
            (2, 4, 3),
            condition=torch.arange(5, device=device),
            null_condition=torch.tensor([9], device=device),
            sample_index=torch.arange(5, device=device),
            **settings,
        )
        for device in ("cpu", "cuda")
    )
    assert torch.equal(on_gpu.codes.cpu(), on_cpu.codes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"schedule": "quadratic"}, "schedule must be one of .*'quadratic'"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"guidance_scale": -1.0}, "guidance_scale must be finite and at least 0, got -1.0"),
        ({"guidance_schedule": "linear"}, "guidance_schedule must be one of .*'power_cosine'"),
        ({"guidance_interval": (0.7, 0.3)}, "guidance_interval must be .*low < high"),
        ({"guidance_power": -2.0}, "guidance_power must be positive"),
        ({"temperature": -1.0}, "temperature must be finite and at least 0, got -1.0"),
        ({"temperature": float("nan"), "num_steps": -1}, "num_steps .*; temperature .*got nan"),
    ],
)
def test_impossible_settings_are_refused_all_at_once(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RefineConfig(**settings)


def test_an_interval_that_nothing_reads_is_mentioned() -> None:
    with pytest.warns(UserWarning, match="guidance_interval=.* is ignored"):
        RefineConfig(guidance_interval=(0.2, 0.8), guidance_scale=2.0)


def test_guidance_without_a_null_condition_is_refused() -> None:
    with pytest.raises(ValueError, match="null_condition is missing"):
        run(hashing_generator(4), samples=[0], guidance_scale=2.0)


def test_a_condition_for_other_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="1 row or one for each of the 3 samples.*got 2 rows"):
        run(hashing_generator(4), samples=[0, 1, 2], condition=torch.tensor([0, 1]))


def test_logits_of_another_alphabet_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits \(1, 2, 4, 3, 4\).*got \(1, 2, 4, 3, 2\)"):
        run(hashing_generator(2), samples=[0], k=4)
