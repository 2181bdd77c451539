"""Packs: full, complete, and a function of what was packed before."""

import itertools
from collections import Counter

import pytest

from grn_lightning.datasets import packing
from grn_lightning.datasets.order import OrderedSource, SampleOrder, SampleRequest, TrainingOrder
from grn_lightning.datasets.packing import PackedOrder, PackSampler, best_fill

# Text and one latent frame at 16 x 16, at 32 x 32, or several of them: a mixed stream.
SIZES = ((257, 4), (1025, 3), (1281, 1), (2305, 1))
BUDGET = 4096


def measure(request: SampleRequest) -> int:
    """Tokens by source and sample: a map, and a caption of 5 to 69 tokens."""
    base = SIZES[request.source][0]
    return base + 5 + (37 * request.index + request.source) % 65


def make_order(**options) -> PackedOrder:
    sources = [
        OrderedSource(order=SampleOrder([40, 23], seed=n), batch_size=1, weight=weight)
        for n, (_, weight) in enumerate(SIZES)
    ]
    return PackedOrder(
        TrainingOrder(sources), options.pop("measure", measure), token_budget=BUDGET, **options
    )


def packs_of(order: PackedOrder, num_steps: int) -> list[list[tuple[SampleRequest, ...]]]:
    """The packs of all ranks, step by step."""
    samplers = [PackSampler(order, rank=rank) for rank in range(order.num_ranks)]
    steps = itertools.islice(zip(*samplers, strict=True), num_steps)
    return [[pack.requests for pack in step] for step in steps]


def test_best_fill_is_the_best_of_all_choices():
    for sizes in itertools.product([1, 4, 5, 7, 9], repeat=4):
        for budget in range(sizes[0], 20, 3):
            rest = range(1, 4)
            choices = [(0, *c) for n in range(4) for c in itertools.combinations(rest, n)]
            fits = [c for c in choices if sum(sizes[i] for i in c) <= budget]
            fullest = max(sum(sizes[i] for i in c) for c in fits)
            # Of equally full ones, the one whose first difference is an earlier element.
            best = min(
                (c for c in fits if sum(sizes[i] for i in c) == fullest),
                key=lambda c: [i not in c for i in range(4)],
            )
            assert best_fill(sizes, budget) == list(best)


def test_packs_of_a_mixed_stream_are_full_and_never_over_the_budget():
    packs = [pack for (pack,) in packs_of(make_order(), 200)]
    tokens = [sum(map(measure, pack)) for pack in packs]
    assert max(tokens) <= BUDGET
    assert sum(tokens) / (len(tokens) * BUDGET) > 0.97  # with 4 or 5 documents of 4 sizes
    assert min(tokens) > 0.94 * BUDGET
    assert sum(len({r.source for r in pack}) > 1 for pack in packs) > 190  # sources are mixed


def test_no_document_is_lost_or_repeated_and_none_waits_long():
    order, position = make_order(), make_order().start()
    seen: list[int] = []
    for _ in range(300):
        seen += [r.number for r in order.batch(position).requests]
        position = order.advance(position)
        oldest = min((d.request.number for d in position.waiting), default=0)
        assert position.drawn.num_samples - oldest < 100
    waiting = [d.request.number for d in position.waiting]
    assert sorted(seen + waiting) == list(range(position.drawn.num_samples))
    assert position.num_samples == len(seen)
    assert position.num_batches == 300


def test_documents_come_from_the_sources_by_weight():
    packs = [pack for (pack,) in packs_of(make_order(), 300)]
    counts = Counter(request.source for pack in packs for request in pack)
    total = sum(counts.values())
    for source, (_, weight) in enumerate(SIZES):
        assert counts[source] / total == pytest.approx(weight / 9, abs=0.01)


def test_the_packs_do_not_depend_on_the_number_of_ranks():
    one = [pack for (pack,) in packs_of(make_order(), 24)]
    for num_ranks in (2, 3):
        steps = packs_of(make_order(num_ranks=num_ranks), 24 // num_ranks)
        assert [pack for step in steps for pack in step] == one


def test_a_run_goes_on_from_its_position_on_any_number_of_ranks():
    order = make_order(num_ranks=2)
    position = order.advance(order.start(), 5)
    rest = [make_order(num_ranks=5).batch(position, rank=rank).requests for rank in range(5)]
    whole = [pack for (pack,) in packs_of(make_order(), 15)]
    assert rest == whole[10:]


def test_a_rank_knows_how_many_documents_all_ranks_have():
    order = make_order(num_ranks=3)
    packs = [order.batch(order.start(), rank=rank) for rank in range(3)]
    assert {pack.step_samples for pack in packs} == {sum(len(pack.requests) for pack in packs)}


def test_the_sampler_remembers_where_it_passed():
    order = make_order(num_ranks=2)
    sampler = PackSampler(order, rank=1, position=lambda: order.advance(order.start(), 3))
    for _ in itertools.islice(sampler, 4):
        pass
    assert sampler.position_at(5) == order.advance(order.start(), 5)
    assert sampler.position_at(2) is None


def test_a_document_longer_than_the_budget_is_counted_and_told_once():
    def long_now_and_then(request: SampleRequest) -> int:
        return BUDGET + 1 if request.number == 7 else measure(request)

    order = make_order(measure=long_now_and_then, describe=lambda r: f"clip {r.number}")
    with pytest.warns(
        UserWarning, match=f"clip 7: it has {BUDGET + 1} tokens, more than the budget"
    ):
        position = order.advance(order.start(), 20)
    order._step.cache_clear()
    assert order.advance(order.start(), 20) == position  # a second warning would be an error
    assert sum(position.left_out) == 1
    numbers = [d.request.number for d in position.waiting]
    assert position.num_samples + len(numbers) + 1 == position.drawn.num_samples


def test_a_document_with_a_wrong_record_is_left_out_like_a_long_one():
    def broken_once(request: SampleRequest) -> int:
        if request.number == 3:
            raise ValueError("gone")
        return measure(request)

    order = make_order(measure=broken_once)
    with pytest.warns(UserWarning, match=r"left out, 1 of 4 documents so far: .*number=3.*: gone"):
        position = order.advance(order.start(), 20)
    assert sum(position.left_out) == 1


def test_a_file_that_one_rank_cannot_read_for_a_moment_changes_no_pack(monkeypatch):
    monkeypatch.setattr(packing, "_PAUSES", (0.0, 0.0))
    failures = Counter()

    def slow_disk(request: SampleRequest) -> int:
        if request.number % 7 == 3 and failures[request.number] < 2:
            failures[request.number] += 1
            raise OSError("stale handle")
        return measure(request)

    ranks = [make_order(num_ranks=2), make_order(num_ranks=2, measure=slow_disk)]
    seen: list[int] = []
    positions = [order.start() for order in ranks]
    for _ in range(20):
        packs = [order.batch(positions[rank], rank=rank) for rank, order in enumerate(ranks)]
        assert packs[0].step_mark == packs[1].step_mark
        seen += [request.number for pack in packs for request in pack.requests]
        positions = [order.advance(p) for order, p in zip(ranks, positions, strict=True)]
    assert positions[0] == positions[1]
    assert len(failures) > 10
    waiting = [document.request.number for document in positions[0].waiting]
    assert sorted(seen + waiting) == list(range(positions[0].drawn.num_samples))


def test_a_file_that_cannot_be_read_at_all_stops_the_run(monkeypatch):
    monkeypatch.setattr(packing, "_PAUSES", (0.0, 0.0))

    def gone(request: SampleRequest) -> int:
        raise OSError("no such file.")

    order = make_order(measure=gone, max_left_out=1.0, describe=lambda r: f"clip {r.number}")
    with pytest.raises(
        OSError, match=r"clip 0 cannot be read, tried 3 times: no such file\. It is not left out"
    ):
        order.advance(order.start())


def test_the_mark_of_a_step_tells_packs_apart():
    def other(request: SampleRequest) -> int:
        return BUDGET // 2 if request.number == 0 else measure(request)

    order, different = make_order(num_ranks=2), make_order(num_ranks=2, measure=other)
    start = order.start()
    marks = [order.batch(order.advance(start, n), rank=n % 2).step_mark for n in range(50)]
    assert len(set(marks)) > 45
    assert all(0 <= mark < 2**16 for mark in marks)
    assert different.batch(start).step_mark != marks[0]


def test_too_many_long_documents_stop_the_run():
    order = make_order(measure=lambda r: BUDGET + 1)
    with (
        pytest.warns(UserWarning, match="left out, [1-9] of"),
        pytest.raises(ValueError, match=r"10 of 10 documents cannot be packed, more than 1%"),
    ):
        order.advance(order.start())
    with pytest.raises(
        ValueError, match=r"has 4097 tokens, .* else raise `token_budget`, take smaller"
    ):
        make_order(measure=lambda r: BUDGET + 1, max_left_out=0).advance(order.start())


@pytest.mark.parametrize("options", [{"look_ahead": 0}])
def test_what_cannot_be_meant_is_refused(options):
    with pytest.raises(ValueError, match="`look_ahead` at least 1, got 4096 and 0"):
        make_order(**options)


def test_the_mean_number_of_documents_is_that_of_the_packs():
    packs = [pack for (pack,) in packs_of(make_order(), 32)]
    assert make_order().mean_documents(32) == sum(map(len, packs)) / 32
