"""What an inspection says is what happened: slow loops over the steps, and counts by hand."""

import math

import pytest
import torch
from PIL import ImageColor

from grn_lightning.functional import codes_to_bits, elements_to_codes, pairwise_difference
from grn_lightning.media.refinement import COLOURS
from grn_lightning.metrics.rounds import RoundAccuracy
from grn_lightning.pipelines import knowledge
from grn_lightning.pipelines.inspection import (
    OVER,
    STATES,
    Inspection,
    inspect_accuracy,
    inspect_refinement,
)
from grn_lightning.pipelines.knowledge import count_accuracy
from grn_lightning.samplers import AdaptiveSteps, RefineConfig
from tests.pipelines.conftest import Build

SIZES = {"class": (1, 16, 16), "prefix": (5, 16, 16)}
ASKED = {"class": [3, 5, 0, 7], "prefix": ["a", "b", "the digit", ""]}
CONFIG = RefineConfig(num_steps=9, guidance_scale=2.0)
INDEX = torch.tensor([4, 1, 9, 2])
KINDS = ("class", "prefix")


def look(build: Build, kind: str, config: RefineConfig = CONFIG) -> Inspection:
    return inspect_refinement(build(kind), ASKED[kind], INDEX, size=SIZES[kind], config=config)


@pytest.fixture(scope="module")
def adaptive(build: Build) -> Inspection:
    """Four samples, not all of as many steps."""
    plain = look(build, "class")
    values = plain.entropy[2]
    slope = 6 / float(values.max() - values.min())
    rule = AdaptiveSteps(
        slope=slope, offset=1 - slope * float(values.min()), decision_step=2, min_steps=3
    )
    config = RefineConfig(num_steps=9, guidance_scale=2.0, adaptive=rule)
    return look(build, "class", config)


@pytest.mark.parametrize("kind", KINDS)
def test_every_element_is_in_the_state_that_two_maps_say(kind: str, build: Build) -> None:
    found = look(build, kind)
    for row, trace in enumerate(found.traces):
        held = torch.zeros_like(trace.masks.kept[0])
        for step in range(trace.num_steps):
            now = trace.masks.filled[step] | trace.masks.kept[step]
            for place in torch.ones_like(now).nonzero().tolist():
                at = tuple(place)
                name = {(1, 0): "filled", (1, 1): "kept", (0, 1): "erased", (0, 0): "blank"}[
                    int(now[at]), int(held[at])
                ]
                assert STATES[found.states[step, row][at]] == name
            held = now
        assert held.all()  # the last step keeps everything


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_that_drawing_gives(kind: str, build: Build) -> None:
    pipeline, found = build(kind), look(build, kind)
    name = "captions" if pipeline.is_text else "class_labels"
    condition = pipeline.condition({name: ASKED[kind]})
    drawn = pipeline.draw(condition, INDEX, size=SIZES[kind], config=CONFIG)
    assert found.codes.equal(drawn.elements)
    assert found.entropy.equal(drawn.entropy)
    assert found.labels == tuple(map(str, ASKED[kind]))


def test_curves_and_shares_are_those_of_a_slow_loop(adaptive: Inspection) -> None:
    assert len(set(adaptive.num_steps.tolist())) > 1
    for row, trace in enumerate(adaptive.traces):
        before = None
        for step in range(int(adaptive.num_steps.max())):
            if step >= trace.num_steps:
                assert adaptive.entropy[step, row].isnan()
                assert adaptive.flips[step, row].isnan()
                assert adaptive.shares[step, row].isnan().all()
                assert (adaptive.states[step, row] == OVER).all()
                continue
            states = adaptive.states[step, row].flatten().tolist()
            expected = [states.count(n) / len(states) for n in range(4)]
            assert adaptive.shares[step, row].tolist() == pytest.approx(expected)
            assert sum(adaptive.shares[step, row].tolist()) == pytest.approx(1)
            assert adaptive.entropy[step, row] == trace.entropy[step]
            if before is not None:
                changed = (trace.codes[step] != before).double().mean()
                assert float(adaptive.flips[step, row]) == pytest.approx(float(changed))
            before = trace.codes[step]


def test_bits_are_entropies_times_what_a_map_can_hold(build: Build) -> None:
    found = look(build, "prefix")
    assert found.bits.equal(found.entropy * 8 * 3 * 2 * 2)  # elements of two values
    assert 0 < float(found.bits.max()) <= 96


def test_steps_under_a_rule_are_the_steps_that_sampling_takes(
    build: Build, adaptive: Inspection
) -> None:
    rule = adaptive.config.adaptive
    assert rule is not None
    plain = look(build, "class")
    assert (plain.num_steps == 9).all()
    assert plain.steps_under(rule).equal(adaptive.num_steps)
    assert plain.steps_histogram(rule).equal(adaptive.steps_histogram())
    assert plain.complexity(2).equal(adaptive.complexity())


def test_the_histogram_counts_every_sample_at_its_steps(adaptive: Inspection) -> None:
    counts = adaptive.steps_histogram()
    assert len(counts) == 10
    assert counts.sum() == 4
    for steps in adaptive.num_steps.tolist():
        assert counts[steps] == adaptive.num_steps.tolist().count(steps)


def test_complexity_is_read_where_all_samples_have_been(adaptive: Inspection) -> None:
    assert adaptive.complexity().equal(adaptive.entropy[2])
    fewest = int(adaptive.num_steps.min())
    with pytest.raises(ValueError, match=rf"`step` must be in \[0, {fewest}\).*got {fewest}"):
        adaptive.complexity(fewest)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["bit", "index"])
def test_accuracy_by_round_is_a_direct_count(
    kind: str, target: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches of four times, beside a loop over samples, times, positions and bits."""
    pipeline = build(kind)
    shape = (5, 8, *pipeline.latent_grid(*SIZES[kind]))
    values = 2
    if target == "index":  # a generator of whole codes, as far as this code can tell
        shape, values = (5, 4, *shape[2:]), 4
    elements = torch.randint(values, shape)
    object.__setattr__(pipeline, "target", target)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def answer(x_t: torch.Tensor, t: torch.Tensor, condition: object) -> torch.Tensor:
        logits = torch.nn.functional.one_hot((x_t * 3 + 1) % values, values).float()
        seen.append((t, logits.argmax(-1)))
        return logits

    monkeypatch.setattr(pipeline.generator, "forward", answer)
    asked = (ASKED[kind] * 2)[:5]
    found = inspect_accuracy(pipeline, elements, asked, num_times=4, max_batch=3).result
    assert found.num_samples.tolist() == [5, 5, 5, 5]
    for number in range(4):
        parts = [codes for t, codes in seen if int(t[0] * 4) == number]
        predicted = torch.cat(parts)
        right, total = [0, 0], [0, 0]
        for row in range(5):
            one, other = (
                codes_to_bits(
                    elements_to_codes(m[row : row + 1], num_rounds=2, target=target), num_rounds=2
                )[0]
                for m in (predicted, elements)
            )
            for channel in range(8):  # round-major: the first four are round 0
                is_right = (one[channel] == other[channel]).flatten().tolist()
                right[channel // 4] += sum(is_right)
                total[channel // 4] += len(is_right)
        expected = [r / n for r, n in zip(right, total, strict=True)]
        assert found.by_round[number].tolist() == pytest.approx(expected)
        share = (predicted == elements).double().mean()
        assert float(found.accuracy[number]) == pytest.approx(float(share))


def test_maps_are_corrupted_to_the_share_that_t_says(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that repeats what it sees is right where the map was left, and by chance."""
    pipeline = build("prefix")

    def repeat(x_t: torch.Tensor, t: torch.Tensor, condition: object) -> torch.Tensor:
        return torch.nn.functional.one_hot(x_t, 2).float()

    monkeypatch.setattr(pipeline.generator, "forward", repeat)
    elements = torch.randint(2, (40, 8, 3, 2, 2))
    found = inspect_accuracy(pipeline, elements, [""] * 40, num_times=5)
    expected = found.t + (1 - found.t) / 2
    torch.testing.assert_close(found.result.accuracy.float(), expected, atol=0.03, rtol=0)
    assert found.result.by_round.std(1).max() < 0.03


def test_noise_belongs_to_the_sample_and_padding_does_not_count(build: Build) -> None:
    pipeline = build("class")
    elements, t = torch.randint(2, (4, 8, 2, 2)), torch.tensor([0.1, 0.6, 0.3, 0.9])
    labels = torch.tensor([1, 2, 3, 4])

    def counted(rows: list[int], weights: list[float]) -> list[torch.Tensor]:
        metric = RoundAccuracy(num_rounds=2, num_bins=2)
        count_accuracy(
            metric,
            pipeline,
            elements[rows],
            labels[rows],
            sample_index=torch.tensor(rows),
            t=t[rows],
            weights=torch.tensor(weights),
        )
        return [torch.nan_to_num(part.double()) for part in metric.compute()]

    alone = counted([3, 1], [1.0, 1.0])
    padded = counted([0, 1, 2, 3], [0.0, 1.0, 0.0, 1.0])
    for one, other in zip(alone, padded, strict=True):
        torch.testing.assert_close(one, other)
    assert alone[3].tolist() == [0, 2]


def test_pairwise_difference_is_the_mean_over_pairs() -> None:
    codes = torch.randint(3, (5, 2, 3))
    pairs = [
        float((codes[i] != codes[j]).double().mean()) for i in range(5) for j in range(i)
    ]  # fmt: skip
    assert float(pairwise_difference(codes)) == pytest.approx(sum(pairs) / len(pairs))
    assert float(pairwise_difference(codes[:1].expand(4, 2, 3))) == 0
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        pairwise_difference(codes[:1])


def test_pictures_show_the_colours_of_the_states(build: Build) -> None:
    """The last page has no erased and no blank element but in its legend."""
    pipeline, found = build("prefix"), look(build, "prefix")
    pages = found.pages(pipeline, 1)
    assert len(pages) == 9
    assert len({page.size for page in pages}) == 1
    counts = {colour: n for n, colour in pages[-1].getcolors(2**16)}
    legend, element = 11 * 11, 15 * 15  # pixels
    for number, (name, colour) in enumerate(COLOURS.items()):
        share = float((found.states[-1, 1] == number).float().mean())
        pixels = counts.get(ImageColor.getrgb(colour), 0)
        assert pixels >= legend, name
        assert (pixels >= legend + element) == (share > 0), name
    strip = found.strip(pipeline, 1, columns=4)
    assert strip.width > 4 * 96


@pytest.mark.parametrize("name", ["entropy", "flips", "elements", "complexity", "steps"])
def test_figures_are_readable_at_the_width_of_a_phone(name: str, adaptive: Inspection) -> None:
    picture = getattr(adaptive, f"{name}_figure")()
    assert picture.size == (480, 300)
    assert len(picture.getcolors(2**20)) > 10


def test_the_map_of_rounds_has_a_row_for_each(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = inspect_accuracy(build("class"), torch.randint(2, (2, 8, 2, 2)), [1, 2], num_times=3)
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr(knowledge, "heat_map", lambda values, **rest: drawn.append((values, rest)))
    found.map()
    [(values, rest)] = drawn
    assert values.equal(found.result.by_round.t())
    assert rest["rows"] == ["round 0", "round 1"]


@pytest.mark.parametrize(
    ("conditions", "index", "match"),
    [
        ([1, 2], [0, 0], r"different numbers, at least one, got \[0, 0\]"),
        ([1, 2], [], r"different numbers, at least one, got \[\]"),
        ([1, 2], [0, 1, 2], "one entry per sample, 3, got 2"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    conditions: list[int], index: list[int], match: str, build: Build
) -> None:
    with pytest.raises(ValueError, match=match):
        inspect_refinement(build("class"), conditions, torch.tensor(index), size=(1, 16, 16))


def test_a_rule_that_cannot_be_asked_is_refused(build: Build) -> None:
    late = AdaptiveSteps(slope=1.0, offset=1.0, decision_step=9, min_steps=9)
    with pytest.raises(ValueError, match="0 <= decision_step < min_steps <= num_steps"):
        look(build, "class").steps_under(late)
    assert not math.isnan(float(look(build, "class").complexity(0).sum()))
