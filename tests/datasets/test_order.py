"""The order is a function of (seed, samples seen): exactly-once epochs, ranks as slices."""

import hashlib
import pickle
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from grn_lightning.datasets.order import (
    HASH_RANGE,
    EndlessBatchSampler,
    OrderedSource,
    SampleOrder,
    TrainingOrder,
    ValidationBatchSampler,
    hash_of_places,
    permutation,
)

GOLDEN_PERMUTATION = [6, 7, 2, 3, 0, 5, 1, 4]
GOLDEN_ORDER = [4, 11, 6, 10, 9, 8, 5, 7, 3, 0, 1, 2, 11, 10]
SIZES = [[1], [7], [3, 0, 5, 2], [4] * 10, [0, 0, 6, 1, 1, 0]]


def slow_epoch(sizes: list[int], *, seed: int, shuffle_shards: int, epoch: int) -> list[int]:
    """The order by its description: permute shards, cut into windows, permute each window."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    shards = [int(i) for i in permutation(len(sizes), seed, epoch)]
    windows = [shards[i : i + shuffle_shards] for i in range(0, len(shards), shuffle_shards)]
    pools = [[starts[i] + j for i in window for j in range(sizes[i])] for window in windows]
    pools = [pool for pool in pools if pool]
    mixed = [[p[j] for j in permutation(len(p), seed, epoch, w)] for w, p in enumerate(pools)]
    return [i for pool in mixed for i in pool]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("shuffle_shards", [1, 2, 3, 16])
def test_the_order_is_what_its_description_says(sizes, shuffle_shards):
    order = SampleOrder(sizes, seed=5, shuffle_shards=shuffle_shards)
    expected = [
        i
        for epoch in range(3)
        for i in slow_epoch(sizes, seed=5, shuffle_shards=shuffle_shards, epoch=epoch)
    ]
    assert order.indices(0, len(expected)).tolist() == expected
    assert [order.index_of(k) for k in range(len(expected))] == expected


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("shuffle_shards", [0, 1, 3])
def test_every_epoch_visits_every_sample_once(sizes, shuffle_shards):
    order = SampleOrder(sizes, seed=1, shuffle_shards=shuffle_shards)
    for epoch in (0, 1, 1000):
        seen = order.indices(epoch * sum(sizes), sum(sizes))
        assert sorted(seen.tolist()) == list(range(sum(sizes)))


def test_any_cut_of_the_order_is_the_same_order():
    order = SampleOrder([4, 3, 6, 2], seed=3, shuffle_shards=2)
    whole = order.indices(0, 100)
    for start, count in [(0, 1), (14, 2), (13, 40), (99, 1), (50, 0)]:
        np.testing.assert_array_equal(order.indices(start, count), whole[start : start + count])


def test_epochs_and_seeds_give_different_orders():
    orders = [
        SampleOrder([50], seed=s).indices(e * 50, 50).tolist() for s in (0, 1) for e in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_only_a_window_of_shards_is_read_at_a_time():
    order = SampleOrder([10] * 12, seed=0, shuffle_shards=3)
    shards = order.indices(0, 120) // 10
    for window in shards.reshape(4, 30):
        assert len(set(window.tolist())) == 3
        assert (np.diff(window) != 0).mean() > 0.4  # mixed, not one file after the other


def test_no_shuffling_keeps_the_order_of_the_files():
    order = SampleOrder([2, 3], seed=9, shuffle_shards=0)
    assert order.indices(3, 7).tolist() == [3, 4, 0, 1, 2, 3, 4]


def test_the_order_is_fixed_for_ever():
    """Stored once: neither numpy nor the platform may change the data of a seed."""
    assert permutation(8, 0, 1, 2).tolist() == GOLDEN_PERMUTATION
    assert SampleOrder([4, 4, 4], seed=7, shuffle_shards=2).indices(0, 14).tolist() == GOLDEN_ORDER


def test_permutations_are_uniform():
    counts = Counter(tuple(permutation(3, seed).tolist()) for seed in range(6000))
    assert len(counts) == 6
    # 1000 +- 29 expected of each; five standard deviations
    assert all(abs(count - 1000) < 5 * 29 for count in counts.values())


def test_a_pickled_order_goes_on_alike():
    order = SampleOrder([4, 3], seed=3)
    order.index_of(0)
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(order)).indices(0, 20), order.indices(0, 20)
    )


@pytest.mark.parametrize("sizes", [[], [0, 0], [3, -1]])
def test_an_order_of_nothing_is_refused(sizes):
    with pytest.raises(ValueError, match="at least one sample"):
        SampleOrder(sizes, seed=0)


# --- ranks ----------------------------------------------------------------------------------------


def two_sources(*, num_ranks: int, batch_sizes=(2, 3), weights=(3.0, 1.0)) -> TrainingOrder:
    orders = (SampleOrder([5, 4], seed=0), SampleOrder([7], seed=0))
    return TrainingOrder(
        [
            OrderedSource(order=order, batch_size=size, weight=weight)
            for order, size, weight in zip(orders, batch_sizes, weights, strict=True)
        ],
        num_ranks=num_ranks,
    )


@pytest.mark.parametrize("num_ranks", [2, 3, 6])
def test_ranks_are_slices_of_the_batch_of_one_process(num_ranks):
    alone = EndlessBatchSampler(
        TrainingOrder([OrderedSource(order=SampleOrder([5, 8], seed=2), batch_size=6)])
    )
    shared = TrainingOrder(
        [OrderedSource(order=SampleOrder([5, 8], seed=2), batch_size=6 // num_ranks)],
        num_ranks=num_ranks,
    )
    ranks = [EndlessBatchSampler(shared, rank=rank) for rank in range(num_ranks)]
    for whole, *parts in islice(zip(alone, *ranks, strict=True), 20):
        assert [request for part in parts for request in part] == whole


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_step_takes_one_source_on_all_ranks(num_ranks):
    order = two_sources(num_ranks=num_ranks)
    ranks = [EndlessBatchSampler(order, rank=rank) for rank in range(num_ranks)]
    for parts in islice(zip(*ranks, strict=True), 50):
        assert len({request.source for part in parts for request in part}) == 1


def test_running_numbers_count_all_samples_of_all_sources():
    order = two_sources(num_ranks=2)
    ranks = [EndlessBatchSampler(order, rank=rank) for rank in range(2)]
    numbers = [
        request.number
        for parts in islice(zip(*ranks, strict=True), 30)
        for p in parts
        for request in p
    ]
    assert numbers == list(range(len(numbers)))


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 1.0), (0.7, 0.1), (1.0, 0.001)])
def test_sources_never_leave_their_share_by_more_than_a_step(weights):
    order = two_sources(num_ranks=1, weights=weights)
    position = order.start()
    for step in range(1, 400):
        position = order.advance(position)
        for taken, weight in zip(position.batches, weights, strict=True):
            assert abs(taken - step * weight / sum(weights)) <= 1


def test_each_source_follows_its_own_order():
    order = two_sources(num_ranks=1)
    batches = list(islice(EndlessBatchSampler(order), 40))
    for source, alone in enumerate(order.sources):
        seen = [r.index for batch in batches for r in batch if r.source == source]
        assert seen == alone.order.indices(0, len(seen)).tolist()


@pytest.mark.parametrize("num_steps", [0, 1, 17])
def test_starting_anywhere_is_continuing(num_steps):
    order = two_sources(num_ranks=2)
    there = order.advance(order.start(), num_steps)
    resumed = EndlessBatchSampler(order, rank=1, position=lambda: there)
    whole = list(islice(EndlessBatchSampler(order, rank=1), num_steps + 10))
    assert list(islice(resumed, 10)) == whole[num_steps:]


def test_advancing_one_source_by_many_steps_is_the_sum_of_single_steps():
    order = TrainingOrder(
        [OrderedSource(order=SampleOrder([5], seed=0), batch_size=3)], num_ranks=2
    )
    position = order.start()
    for _ in range(9):
        position = order.advance(position)
    assert order.advance(order.start(), 9) == position
    assert (position.num_batches, position.num_samples) == (9, 54)


@pytest.mark.parametrize("num_steps", [0, 1, 10, 1001])
def test_rebalanced_sources_have_had_their_share(num_steps):
    order = two_sources(num_ranks=1, weights=(3.0, 1.0))
    position = order.rebalance(num_steps, (5, 6))
    assert position.samples == (5, 6)
    assert position.num_batches == num_steps
    assert abs(position.batches[0] - 0.75 * num_steps) <= 1


# --- fingerprints ---------------------------------------------------------------------------------


def test_a_fingerprint_is_the_sum_of_its_samples_digests():
    keys = ["a", "b", "c"]
    digests = [hashlib.blake2b(f"{n}:{key}".encode(), digest_size=8) for n, key in enumerate(keys)]
    words = [int.from_bytes(digest.digest(), "little") for digest in digests]
    assert hash_of_places(range(3), keys) == sum(words) % HASH_RANGE
    assert hash_of_places([], []) == 0


def test_a_fingerprint_is_fixed_for_ever():
    assert hash_of_places([0, 1], ["000", "001"]) == 0x5224C9B5C387F13


def test_parts_in_any_order_have_the_fingerprint_of_the_whole():
    keys = [f"{n:03d}" for n in range(12)]
    whole = hash_of_places(range(12), keys)
    parts = [hash_of_places(range(i, 12, 3), keys[i::3]) for i in (2, 0, 1)]
    assert sum(parts) % HASH_RANGE == whole
    assert hash_of_places(range(11, -1, -1), keys[::-1]) == whole


@pytest.mark.parametrize(
    ("numbers", "keys"),
    [
        ([0, 1, 2], ["a", "c", "b"]),  # two changed places
        ([0, 1], ["a", "b"]),  # one is missing
        ([0, 1, 2, 2], ["a", "b", "c", "c"]),  # one came twice
        ([1, 2, 3], ["a", "b", "c"]),  # all came one later
        ([0, 1, 2], ["a", "b", "d"]),  # another one
    ],
)
def test_other_samples_or_places_have_another_fingerprint(numbers, keys):
    assert hash_of_places(numbers, keys) != hash_of_places([0, 1, 2], ["a", "b", "c"])


def test_a_number_without_a_key_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        hash_of_places([0, 1], ["a"])


# --- validation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("totals", [(7,), (1,), (6, 4), (5, 1, 8)])
def test_validation_visits_every_sample_once_in_equally_many_batches(num_ranks, totals):
    sizes = tuple(range(2, 2 + len(totals)))
    ranks = [
        ValidationBatchSampler(totals, sizes, rank=rank, num_ranks=num_ranks)
        for rank in range(num_ranks)
    ]
    batches = [list(rank) for rank in ranks]
    assert {len(b) for b in batches} == {len(rank) for rank in ranks} == {len(ranks[0])}

    shapes = [[len(batch) for batch in rank] for rank in batches]
    assert all(shape == shapes[0] for shape in shapes)

    requests = [request for rank in batches for batch in rank for request in batch]
    counted = Counter((r.source, r.index) for r in requests if r.weight == 1)
    assert counted == Counter((s, i) for s, total in enumerate(totals) for i in range(total))
    assert {r.weight for r in requests} <= {0.0, 1.0}
    numbers = sorted(r.number for r in requests if r.weight == 1)
    assert numbers == list(range(sum(totals)))
    assert all(len({r.source for r in batch}) == 1 for rank in batches for batch in rank)
