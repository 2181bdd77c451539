"""Randomness: the known answers of Philox, the layout of the counter, independence, uniformity."""

import math

import pytest
import torch

from grn_lightning.functional import random
from grn_lightning.functional.random import Stream, counter_uniform, philox_4x32

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # published with Random123
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def uniform(index, *, seed=0, step=0, stream=Stream.DRAW, shape=(8,)):
    return counter_uniform(torch.tensor(index), seed=seed, step=step, stream=stream, shape=shape)


def philox_of_integers(counter, key):
    """The algorithm on Python's unbounded integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for i in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        r0, r1 = (k0 + i * 0x9E3779B9) % 2**32, (k1 + i * 0xBB67AE85) % 2**32
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ r0, b % 2**32, (a >> 32) ^ c3 ^ r1, a % 2**32
    return c0, c1, c2, c3


def number_at(element, *, seed, step, stream, sample):
    """One number, its counter put together as one integer of 128 bits."""
    counter = (sample % 2**64) << 64 | stream << 56 | step << 32 | element // 4
    words = tuple((counter >> (32 * i)) % 2**32 for i in range(4))
    return (philox_of_integers(words, (seed % 2**32, seed >> 32))[element % 4] >> 8) / 2**24


def chi_square_sigmas(u, num_bins=256):
    """How many standard deviations the counts of equal bins are from those of uniform numbers."""
    counts = (u.flatten() * num_bins).long().bincount(minlength=num_bins).double()
    expected = u.numel() / num_bins
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    return (chi_square - (num_bins - 1)) / math.sqrt(2 * (num_bins - 1))


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, answer):
    words = philox_4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(word.item() for word in words) == answer


def test_philox_equals_unbounded_integers_on_many_counters():
    counter = torch.randint(2**32, (200, 4))
    key = (0xDEADBEEF, 0x80000001)
    found = torch.stack(philox_4x32(counter.unbind(1), key), 1)
    assert found.tolist() == [list(philox_of_integers(c, key)) for c in counter.tolist()]


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
@pytest.mark.parametrize("step", [0, 2**24 - 1])
@pytest.mark.parametrize("stream", [0, Stream.KEEP, 255])
def test_every_argument_has_its_own_bits_of_counter_and_key(stream, step, seed):
    samples = [0, 1, 2**32, 2**63 - 1, -1, -(2**63)]
    found = uniform(samples, seed=seed, step=step, stream=stream, shape=(6,))
    expected = [
        [number_at(e, seed=seed, step=step, stream=stream, sample=sample) for e in range(6)]
        for sample in samples
    ]
    assert found.tolist() == expected


def test_numbers_far_inside_a_large_map_are_at_their_place(monkeypatch):
    monkeypatch.setattr(random, "_CACHED_COUNTERS", 1024)  # several rounds of the loop
    found = uniform([5, 9], seed=3, step=2, shape=(3, 70, 30)).flatten(1)
    for element in (0, 3, 4, 2047, 2048, 4095, 4096, 6299):
        for row, sample in enumerate((5, 9)):
            expected = number_at(element, seed=3, step=2, stream=Stream.DRAW, sample=sample)
            assert found[row, element].item() == expected


def test_more_samples_than_counters_hashed_at_a_time(monkeypatch):
    expected = uniform(list(range(20)), shape=(3, 5))
    monkeypatch.setattr(random, "_CACHED_COUNTERS", 8)
    torch.testing.assert_close(uniform(list(range(20)), shape=(3, 5)), expected)


def test_rows_depend_on_their_own_sample_only():
    together = uniform([4, 17, 2, 17], shape=(3, 5, 5))
    for row, index in enumerate((4, 17, 2, 17)):
        torch.testing.assert_close(together[row], uniform([index], shape=(3, 5, 5))[0])
    reversed_ = uniform([17, 2, 17, 4], shape=(3, 5, 5))
    torch.testing.assert_close(reversed_.flip(0), together)


def test_numbers_depend_on_their_row_major_position_only():
    long = uniform([1, 2], shape=(4, 3, 7))
    torch.testing.assert_close(uniform([1, 2], shape=(2, 3, 7)), long[:, :2])
    torch.testing.assert_close(uniform([1, 2], shape=(84,)), long.flatten(1))
    torch.testing.assert_close(uniform([1, 2], shape=()), long[:, 0, 0, 0])


def test_a_step_per_sample_equals_one_call_per_step():
    steps = torch.tensor([0, 7, 2**24 - 1])
    found = uniform([1, 1, 5], step=steps)
    for row, (index, step) in enumerate(zip((1, 1, 5), steps.tolist(), strict=True)):
        torch.testing.assert_close(found[row : row + 1], uniform([index], step=step))


def test_numbers_are_multiples_of_two_to_the_minus_24_in_the_unit_interval():
    u = uniform(list(range(16)), shape=(4096,))
    assert u.dtype == torch.float32
    assert u.min() >= 0
    assert u.max() < 1
    scaled = u.double() * 2**24
    assert (scaled == scaled.round()).all()
    assert (scaled.long() % 2).double().mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("samples", "step", "shape"),
    [
        ([0], 0, (2**16,)),  # neighbours in one map
        (list(range(2**14)), 0, (4,)),  # neighbours in the training stream
        ([3] * 2**14, torch.arange(2**14), (4,)),  # neighbours in time
    ],
    ids=["elements", "samples", "steps"],
)
def test_numbers_are_uniform_and_uncorrelated_along_every_argument(samples, step, shape):
    u = uniform(samples, seed=1, step=step, shape=shape)
    assert abs(chi_square_sigmas(u)) < 4
    centred = u.double().flatten() - 0.5
    num = len(centred)
    assert abs(centred.mean().item()) < 4 * math.sqrt(1 / 12 / num)
    for lag in (1, 2, 4, 8):
        correlation = 12 * (centred[lag:] * centred[:-lag]).mean().item()
        assert abs(correlation) < 4 / math.sqrt(num - lag)


def test_streams_seeds_steps_and_samples_are_uncorrelated():
    rows = [
        uniform([0], shape=(2**14,)),
        uniform([1], shape=(2**14,)),
        uniform([0], seed=1, shape=(2**14,)),
        uniform([0], seed=2**32, shape=(2**14,)),
        uniform([0], step=1, shape=(2**14,)),
        *(uniform([0], stream=s, shape=(2**14,)) for s in Stream if s is not Stream.DRAW),
    ]
    correlations = torch.corrcoef(torch.cat(rows).double()) - torch.eye(len(rows))
    assert correlations.abs().max() < 4.5 / math.sqrt(2**14)


def test_nothing_asked_nothing_given():
    empty = torch.zeros(0, dtype=torch.long)
    found = counter_uniform(empty, seed=0, step=0, stream=0, shape=(2, 3))
    assert found.shape == (0, 2, 3)
    assert uniform([1, 2], shape=(0, 3)).shape == (2, 0, 3)


def test_global_random_state_is_neither_read_nor_changed():
    before = torch.get_rng_state()
    found = uniform([1])
    torch.testing.assert_close(torch.get_rng_state(), before)
    torch.manual_seed(99)
    torch.testing.assert_close(uniform([1]), found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, r"seed must be in 0\.\.18446744073709551615, got -1"),
        ({"seed": 2**64}, "seed must be in"),
        ({"step": 2**24}, r"step must be in 0\.\.16777215, got 16777216"),
        ({"step": torch.tensor([-1])}, r"step must be in 0\.\.16777215, got \[-1\]"),
        ({"stream": 256}, r"stream must be in 0\.\.255, got 256"),
        ({"shape": (2**18, 2**17)}, "the number of elements must be in"),
    ],
)
def test_what_does_not_fit_into_its_bits_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        uniform([0], **arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_the_same_numbers():
    samples, steps = torch.tensor([0, 5, -1, 2**40]), torch.tensor([0, 1, 2, 2**24 - 1])
    arguments = {"seed": 2**63 + 1, "stream": Stream.KEEP, "shape": (3, 50, 70)}
    expected = counter_uniform(samples, step=steps, **arguments)
    found = counter_uniform(samples.cuda(), step=steps.cuda(), **arguments)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0)
