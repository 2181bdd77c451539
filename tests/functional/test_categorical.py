"""Categorical: frequencies follow the softmax, the impossible is never drawn, nothing is NaN."""

import math

import pytest
import torch

from grn_lightning.functional.categorical import (
    draw,
    entropy,
    log_prob_of,
    log_probs,
    mean_entropy,
)

INF = math.inf
HUGE = 3.4e38


def midpoints(num):
    """Evenly spread stand-ins for uniform numbers: frequencies without noise."""
    return (torch.arange(num, dtype=torch.float64) + 0.5) / num


def first_to_exceed(probs, u):
    """Inverse cumulative distribution, one row, as told in words."""
    total = 0.0
    for value, p in enumerate(probs):
        total += p
        if total > u:
            return value
    raise AssertionError("u is below 1")


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.31, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_are_the_softmax_computed_in_float32(dtype, temperature):
    logits = (torch.randn(3, 4, 16) * 5).to(dtype)
    found = log_probs(logits, temperature=temperature)
    assert found.dtype == torch.float32
    expected = torch.log_softmax(logits.double() / temperature, -1).float()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize(
    ("row", "probs"),
    [
        ([0.0, -INF, -INF], [1, 0, 0]),
        ([0.0, 0.0, -INF], [0.5, 0.5, 0]),
        ([5.0, INF, -INF], [0, 1, 0]),
        ([INF, INF, 0.0], [0.5, 0.5, 0]),
        ([HUGE, -HUGE, 0.0], [1, 0, 0]),
        ([3e38, 2e38, 1e38], [1, 0, 0]),
        ([-HUGE, -HUGE, -INF], [0.5, 0.5, 0]),
    ],
)
def test_extreme_logits_have_the_probabilities_of_their_limit(row, probs, temperature):
    found = log_probs(torch.tensor([row]), temperature=temperature)
    assert not found.isnan().any()
    torch.testing.assert_close(found.exp(), torch.tensor([probs], dtype=torch.float32))
    h = entropy(torch.tensor([row]))
    assert h.item() == pytest.approx(-sum(p * math.log(p, 3) for p in probs if p), abs=1e-6)
    possible = {value for value, p in enumerate(probs) if p}
    u = torch.cat((torch.tensor([0.0, 1 - 2.0**-24]), midpoints(64).float()))
    drawn = draw(torch.tensor(row).expand(len(u), 3), u, temperature=temperature)
    assert set(drawn.tolist()) == possible


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_draw_is_the_inverse_of_the_cumulative_distribution(temperature):
    logits, u = torch.randn(200, 7), torch.rand(200)
    drawn = draw(logits, u, temperature=temperature)
    probs = torch.softmax(logits.double() / temperature, -1).tolist()
    expected = [first_to_exceed(p, x) for p, x in zip(probs, u.tolist(), strict=True)]
    assert drawn.tolist() == expected


@pytest.mark.parametrize("k", [2, 3, 16, 200])
def test_frequencies_match_the_softmax(k):
    logits, num = torch.randn(k), 20_000
    drawn = draw(logits.expand(num, k), torch.rand(num), temperature=1.3)
    p = torch.softmax(logits.double() / 1.3, -1)
    counts = drawn.bincount(minlength=k)
    chi_square = ((counts - num * p) ** 2 / (num * p)).sum().item()
    assert chi_square < (k - 1) + 5 * math.sqrt(2 * (k - 1))  # five standard deviations
    exact = draw(logits.expand(num, k), midpoints(num), temperature=1.3).bincount(minlength=k)
    assert (exact - num * p).abs().max() <= 1.01  # stratified numbers: at most one too many


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_two_values_are_drawn_as_the_general_path_draws_them(temperature):
    logits, u = torch.randn(5000, 2) * 4, torch.rand(5000)
    never = torch.full((5000, 1), -INF)
    general = draw(torch.cat((logits, never), -1), u, temperature=temperature)
    p_0 = torch.softmax(logits.double() / temperature, -1)[:, 0]
    is_clear = (u - p_0).abs() > 1e-6  # float32 probabilities differ in the last digit
    assert is_clear.float().mean() > 0.999
    found = draw(logits, u, temperature=temperature)
    torch.testing.assert_close(found[is_clear], general[is_clear])


@pytest.mark.parametrize(
    ("row", "possible"),
    [
        ([-INF, 0.0], {1}),
        ([0.0, -INF], {0}),
        ([INF, 0.0], {0}),
        ([HUGE, -HUGE], {0}),
        ([-200.0, 0.0], {1}),
        ([INF, INF], {0, 1}),
        ([0.0, 0.0], {0, 1}),
    ],
)
def test_of_two_values_the_impossible_one_is_never_drawn(row, possible):
    u = torch.tensor([0.0, 0.3, 0.7, 1 - 2.0**-24])
    assert set(draw(torch.tensor(row).expand(4, 2), u).tolist()) == possible


@pytest.mark.parametrize("k", [3, 16, 300, 4096])
def test_values_of_probability_zero_are_never_drawn(k):
    logits = torch.randn(500, k) * 3
    logits[torch.rand(500, k) < 0.7] = -INF
    logits[:, k // 2] = 0.0  # something is always possible
    for u in (torch.zeros(500), torch.rand(500), torch.full((500,), 1 - 2.0**-24)):
        assert log_prob_of(logits, draw(logits, u)).isfinite().all()


def test_a_number_that_rounds_up_to_one_draws_the_last_possible_value():
    u = torch.tensor([1 - 2.0**-53]).double()
    assert draw(torch.tensor([[0.0, 0.0, -INF]]), u).item() == 1
    assert draw(torch.tensor([[0.0, -INF]]), u).item() == 0


@pytest.mark.parametrize("k", [2, 5])
def test_temperature_zero_is_greedy(k):
    logits = torch.randn(4, 6, k)
    torch.testing.assert_close(draw(logits, torch.rand(4, 6), temperature=0.0), logits.argmax(-1))
    cold = draw(logits, torch.rand(4, 6), temperature=1e-6)
    torch.testing.assert_close(cold, logits.argmax(-1))  # and the limit of small temperatures


@pytest.mark.parametrize("k", [2, 3])
def test_broken_logits_give_no_invalid_index(k):
    drawn = draw(torch.full((9, k), math.nan), torch.rand(9))
    assert 0 <= drawn.min() <= drawn.max() < k


def test_rows_do_not_depend_on_their_neighbours_or_on_memory_layout():
    logits, u = torch.randn(4, 5, 6, 16), torch.rand(4, 5, 6)
    drawn = draw(logits, u)
    torch.testing.assert_close(drawn[1:2], draw(logits[1:2], u[1:2]))
    strided = logits.movedim(-1, 1).contiguous().movedim(1, -1)
    torch.testing.assert_close(draw(strided, u), drawn)


def test_log_prob_of_picks_the_drawn_value():
    logits, codes = torch.randn(2, 3, 4), torch.randint(4, (2, 3))
    found = log_prob_of(logits, codes, temperature=2.0)
    for b in range(2):
        for i in range(3):
            p = torch.softmax(logits[b, i] / 2, -1)[codes[b, i]]
            torch.testing.assert_close(found[b, i], p.log())


@pytest.mark.parametrize("k", [2, 16, 300])
def test_entropy_runs_from_certainty_to_uniformity(k):
    certain = torch.zeros(1, k)
    certain[0, 0] = 1e4
    assert entropy(certain).item() == 0
    torch.testing.assert_close(entropy(torch.zeros(3, k)), torch.ones(3))
    logits = torch.randn(50, k)
    p = torch.softmax(logits.double(), -1)
    expected = -(p * p.log()).sum(-1) / math.log(k)
    torch.testing.assert_close(entropy(logits), expected.float())


def test_refusals_name_what_is_allowed():
    logits, u = torch.zeros(1, 3), torch.zeros(1)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        log_probs(logits, temperature=0.0)
    with pytest.raises(ValueError, match=r"temperature must be 0 \(greedy\) or positive, got -1"):
        draw(logits, u, temperature=-1.0)
    with pytest.raises(ValueError, match="got nan"):
        draw(logits, u, temperature=math.nan)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("k", [2, 3, 16, 300, 4096, 16384])
def test_a_gpu_never_draws_the_impossible_and_agrees_with_the_cpu(k):
    # A parallel cumulative sum adds in another order than a loop does.
    logits, u = torch.randn(500, k) * 3, torch.rand(500)
    logits[torch.rand(500, k) < 0.7] = -INF
    logits[:, k // 2] = 0.0
    for v in (u, torch.zeros(500), torch.full((500,), 1 - 2.0**-24)):
        drawn = draw(logits.cuda(), v.cuda()).cpu()
        assert log_prob_of(logits, drawn).isfinite().all()
    assert (draw(logits.cuda(), u.cuda()).cpu() == draw(logits, u)).float().mean() > 0.99


@pytest.mark.parametrize("k", [2, 5])
def test_the_mean_entropy_does_not_depend_on_order_or_batch(k: int) -> None:
    logits = torch.randn(3, 40, 7, k, generator=torch.Generator().manual_seed(0)) * 4
    mean = mean_entropy(logits)
    torch.testing.assert_close(mean, entropy(logits).flatten(1).mean(1), atol=1e-6, rtol=0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(mean_entropy(logits[:, order]), mean)
    assert torch.equal(mean_entropy(logits[1:2]), mean[1:2])


@pytest.mark.parametrize("k", [2, 3, 16])
def test_the_entropy_is_that_of_the_definition(k: int) -> None:
    logits = torch.randn(500, k, generator=torch.Generator().manual_seed(0)) * 30
    logits[0, 1:] = -torch.inf
    p = torch.softmax(logits.double(), -1)
    expected = torch.special.entr(p).sum(-1) / math.log(k)
    torch.testing.assert_close(entropy(logits).double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("k", [2, 6])
def test_every_sample_can_have_its_temperature(k: int) -> None:
    rng = torch.Generator().manual_seed(0)
    logits, u = torch.randn(3, 50, k, generator=rng), torch.rand(3, 50, generator=rng)
    temperatures = torch.tensor([0.3, 1.0, 2.0])
    together = draw(logits, u, temperature=temperatures)
    for row, temperature in enumerate(temperatures.tolist()):
        alone = draw(logits[row : row + 1], u[row : row + 1], temperature=temperature)
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("k", [2, 9])
@pytest.mark.parametrize("temperature", [0.7, None])
def test_large_inputs_are_computed_in_parts_that_change_nothing(
    k: int, temperature: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = torch.Generator().manual_seed(0)
    logits, u = torch.randn(7, 30, k, generator=rng), torch.rand(7, 30, generator=rng)
    given = torch.linspace(0.3, 2, 7) if temperature is None else temperature
    whole, uncertain = draw(logits, u, temperature=given), entropy(logits)
    monkeypatch.setattr("grn_lightning.functional.categorical._CACHED_LOGITS", 30 * k * 2)
    assert torch.equal(draw(logits, u, temperature=given), whole)
    assert torch.equal(entropy(logits), uncertain)
    assert draw(logits[0, 0], u[0, 0]) == draw(logits[:1, :1], u[:1, :1])
