"""Coarse-to-fine sampling: oracles, marginals, seeds, and what it costs."""

import pytest
import torch

from grn_lightning.functional import Stream, counter_uniform, draw, guide
from grn_lightning.samplers.coarse_to_fine import DrawConfig, draw_fine, draw_raster

SHAPE = (2, 2, 3)


class Stub:
    """A causal network that answers from a function; remembers its calls."""

    def __init__(self, logits_of, *, is_chain=False):
        self.logits_of, self.is_chain, self.calls = logits_of, is_chain, []

    def prefill(self, condition):
        self.calls.append(len(condition))
        return condition[:, None].float(), (torch.zeros(len(condition), 0, dtype=torch.long),)

    def advance(self, codes, position, cache):
        self.calls.append(len(codes))
        # what is known: condition is lost on purpose, position and codes are enough for the stubs
        return torch.cat([torch.full((len(codes), 1), float(position + 1)), codes.float()], dim=1)

    def channel_logits(self, known, codes):
        logits = self.logits_of(known, codes)
        return logits[:, codes.shape[1] : codes.shape[1] + 1] if self.is_chain else logits


def raster(network, config=DrawConfig(), index=(0, 1, 2), **options):  # noqa: B008 frozen
    index = torch.tensor(index)
    options = {"condition": torch.zeros(len(index), dtype=torch.long), "seed": 5} | options
    return draw_raster(network, SHAPE, sample_index=index, config=config, **options)


@pytest.mark.parametrize("is_chain", [False, True])
def test_a_network_that_knows_the_answer_is_believed(is_chain):
    answer = torch.randint(4, (6, 2), generator=torch.Generator().manual_seed(0))

    def logits_of(known, codes):
        position = known[:, 0].long() if known.shape[1] > 1 else torch.zeros(len(known)).long()
        return 100.0 * torch.nn.functional.one_hot(answer[position], 4)

    drawn = raster(Stub(logits_of, is_chain=is_chain)).coarse
    assert torch.equal(drawn, answer.T.reshape(1, *SHAPE).expand(3, -1, -1, -1))


def test_a_network_that_ignores_everything_gives_its_marginal():
    probabilities = torch.tensor([0.1, 0.2, 0.7])
    network = Stub(lambda known, codes: probabilities.log().expand(len(known), 2, 3))
    drawn = raster(network, index=range(500)).coarse
    counts = drawn.flatten().bincount(minlength=3).double()
    expected = probabilities.double() * drawn.numel()
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 13.8  # 0.1 % of draws with two degrees of freedom exceed it


def test_draws_are_those_of_a_slow_loop_over_positions_and_channels():
    torch.manual_seed(0)
    table = torch.randn(7, 2, 5)

    def logits_of(known, codes):
        position = known[:, 0].long() if known.shape[1] > 1 else torch.zeros(len(known)).long()
        return table[position] + 0.3 * known[:, -1:, None]

    drawn = raster(Stub(logits_of), index=(4, 9)).coarse.flatten(2)
    for row, index in enumerate((4, 9)):
        last = 0.0
        for i in range(6):
            u = counter_uniform(
                torch.tensor([index]), seed=5, step=i, stream=Stream.DRAW, shape=(2,)
            )
            expected = draw(table[i] + 0.3 * last, u[0])
            assert torch.equal(drawn[row, :, i], expected)
            last = expected[-1].item()


def test_a_sample_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    table = torch.randn(7, 2, 5)
    network = Stub(lambda known, codes: table[known[:, -1].long() % 7])
    together = raster(network, index=(3, 1, 8)).coarse
    for row, index in enumerate((3, 1, 8)):
        assert torch.equal(raster(network, index=(index,)).coarse[0], together[row])
    assert not torch.equal(raster(network, index=(3, 1, 8), seed=6).coarse, together)


def test_both_branches_go_into_one_call_until_guidance_ends():
    network = Stub(lambda known, codes: torch.zeros(len(known), 2, 3))
    null = torch.ones(1, dtype=torch.long)
    config = DrawConfig(guidance_scale=2.0, guidance_interval=(0.0, 0.5))
    result = raster(network, config, null_condition=null)
    # Positions 0, 1, 2 of 6 are guided; the reading of position 2 still serves both branches.
    assert network.calls == [6, 6, 6, 6, 3, 3]
    assert (result.num_steps, result.num_rows) == (6, (6 + 3) * 3)
    plain = Stub(network.logits_of)
    assert raster(plain).num_rows == 18
    assert set(plain.calls) == {3}


def test_guided_logits_are_those_of_the_rule():
    torch.manual_seed(0)
    table = torch.randn(2, 2, 3)  # by condition

    class Conditional(Stub):
        def advance(self, codes, position, cache):
            half = len(codes) // 2
            return torch.arange(2).repeat_interleave(half)[:, None].float()

    network = Conditional(lambda known, codes: table[known[:, 0].long()])
    config = DrawConfig(guidance_scale=3.0, temperature=0.5)
    drawn = raster(network, config, null_condition=torch.ones(1, dtype=torch.long)).coarse
    guided = guide(table[0], table[1], 3.0) / 0.5
    always = Stub(lambda known, codes: guided.expand(len(known), 2, 3))
    assert torch.equal(drawn, raster(always).coarse)


def test_greedy_and_truncated_draws_stay_within_what_is_likely():
    logits = torch.tensor([0.1, 0.5, 0.4]).log()
    network = Stub(lambda known, codes: logits.expand(len(known), 2, 3))
    assert (raster(network, DrawConfig(temperature=0.0)).coarse == 1).all()
    assert (raster(network, DrawConfig(top_k=1)).coarse == 1).all()
    drawn = raster(network, DrawConfig(top_p=0.8), index=range(50)).coarse
    assert set(drawn.flatten().tolist()) == {1, 2}


def fine(network, coarse, config=DrawConfig(), **options):  # noqa: B008 frozen
    index = torch.arange(len(coarse))
    return draw_fine(
        network,
        coarse,
        condition=torch.zeros(len(coarse), dtype=torch.long),
        sample_index=index,
        seed=5,
        config=config,
        **options,
    )


def test_fine_labels_are_drawn_in_one_call_within_what_is_allowed():
    calls = []

    def network(coarse, condition):
        calls.append((len(coarse), condition.tolist()))
        return torch.zeros(len(coarse), 2, 2, 3, 6)

    coarse = torch.randint(3, (40, 1, 2, 3), generator=torch.Generator().manual_seed(0))
    allowed = (torch.arange(6) // 2 == coarse[..., None]).expand(-1, 2, -1, -1, -1)
    drawn = fine(network, coarse, allowed=allowed)
    assert torch.equal(drawn // 2, coarse.expand(-1, 2, -1, -1))
    assert set(drawn.flatten().tolist()) == set(range(6))
    assert [count for count, _ in calls] == [40]

    guided = DrawConfig(guidance_scale=2.0)
    fine(network, coarse[:2], guided, null_condition=torch.tensor([7]))
    assert calls[-1] == (4, [0, 0, 7, 7])


def test_guidance_without_a_null_condition_is_refused():
    with pytest.raises(ValueError, match="null_condition is missing"):
        raster(Stub(None), DrawConfig(guidance_scale=2.0))


def test_settings_that_cannot_be_meant_are_refused_together():
    with pytest.raises(ValueError, match=r"got \(0.5, 1.5\); temperature .* got -1; top_p"):
        DrawConfig(guidance_interval=(0.5, 1.5), temperature=-1, top_p=0)
