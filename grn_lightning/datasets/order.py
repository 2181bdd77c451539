"""Which sample comes when: an endless order that is a function of (seed, samples seen).

Nothing here remembers anything. The order of a source is a pure function of its seed and of a
running number, a batch is a pure function of a `Position`, and a rank is a slice of that batch.
So the data of a run do not depend on the number of ranks, of loader workers or of interruptions,
and a run may continue on another number of devices where it stopped.

The permutations are sorted raw 64-bit words of Philox: unlike `Generator.permutation`, these are
fixed by the algorithm and not by the version of numpy.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

_ENDLESS = 10**12  # batches; with a length, Lightning's fetcher does not read one batch ahead


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """What a data set is asked for.

    Attributes:
        number: Running number of the sample in the training stream of all sources and ranks
            together; in validation the position of the sample in the joined validation set.
        source: Index of the source.
        index: Index of the sample inside its source.
        weight: 0 for a repeated sample that only fills a validation batch, else 1.
    """

    number: int
    source: int
    index: int
    weight: float = 1.0


def permutation(size: int, *key: int) -> np.ndarray:
    """Return a permutation of ``range(size)`` that is a function of the key.

    Args:
        size: Number of elements.
        *key: Non-negative integers, such as seed, epoch and window.

    Returns:
        Permutation ``(size,)``, int64.
    """
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(words, kind="stable")


# --- one source -----------------------------------------------------------------------------------


class _Epoch(NamedTuple):
    """One pass: shards in reading order and the windows in which samples are mixed."""

    shards: np.ndarray  # (s,) permuted shard numbers
    window_starts: np.ndarray  # (w + 1,) position in the epoch where each window starts


class SampleOrder:
    """The endless shuffled order of the samples of one source.

    An epoch visits every sample exactly once. It permutes the shards, cuts their sequence into
    windows of `shuffle_shards` shards and permutes the samples of each window, so that at any
    time only a few files are being read.

    Args:
        shard_sizes: Number of samples of each shard; sample ``i`` of the source is counted
            through the shards in this order.
        seed: Seed of the order, at least 0.
        shuffle_shards: Shards per window; 0 keeps the order of the files.

    Raises:
        ValueError: If there is no sample or a number is negative.

    Example:
        >>> order = SampleOrder([2, 1], seed=0)
        >>> sorted(order.index_of(k) for k in range(3))
        [0, 1, 2]
    """

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, shuffle_shards: int = 16):
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.shard_starts = np.cumsum(self.shard_sizes) - self.shard_sizes
        self.num_samples = int(self.shard_sizes.sum())
        self.seed = seed
        self.shuffle_shards = shuffle_shards
        if self.num_samples < 1 or (self.shard_sizes < 0).any():
            raise ValueError(f"an order needs at least one sample, got shard sizes {shard_sizes}.")
        if seed < 0 or shuffle_shards < 0:
            raise ValueError(
                f"seed and shuffle_shards must be at least 0, got {seed} and {shuffle_shards}."
            )
        self._cache()

    def _cache(self) -> None:
        """Keep the windows that a batch is likely to touch; they are derived, never state."""
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=4)(self._make_window)

    def __getstate__(self) -> dict[str, object]:
        """Leave the caches behind when pickled."""
        return {k: v for k, v in vars(self).items() if k not in ("_epoch", "_window")}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restore the fields and start with empty caches."""
        vars(self).update(state)
        self._cache()

    def _make_epoch(self, epoch: int) -> _Epoch:
        shards = permutation(len(self.shard_sizes), self.seed, epoch)
        filled = self.shard_sizes[shards].cumsum()
        lasts = np.arange(self.shuffle_shards - 1, len(shards), self.shuffle_shards)
        starts = np.concatenate([[0], filled[lasts], filled[-1:]])
        return _Epoch(shards, np.unique(starts))

    def _make_window(self, epoch: int, window: int) -> np.ndarray:
        """Samples of one window, ``(n,)`` indices into the source in reading order."""
        plan = self._epoch(epoch)
        begin, end = plan.window_starts[window : window + 2]
        ends = self.shard_sizes[plan.shards].cumsum()
        inside = plan.shards[(ends > begin) & (ends <= end)]
        samples = np.concatenate(
            [np.arange(self.shard_sizes[k]) + self.shard_starts[k] for k in inside]
        )
        return samples[permutation(len(samples), self.seed, epoch, window)]

    def indices(self, start: int, count: int) -> np.ndarray:
        """Return the samples with running numbers ``start .. start + count - 1``.

        Args:
            start: First running number, at least 0.
            count: How many.

        Returns:
            Indices into the source, ``(count,)`` int64.
        """
        pieces = [np.empty(0, dtype=np.int64)]
        while count > 0:
            epoch, position = divmod(start, self.num_samples)
            pieces.append(self._piece(epoch, position, count))
            start, count = start + len(pieces[-1]), count - len(pieces[-1])
        return np.concatenate(pieces)

    def _piece(self, epoch: int, position: int, count: int) -> np.ndarray:
        """At most `count` samples from `position` on, none beyond its window."""
        if self.shuffle_shards == 0:
            return np.arange(position, min(position + count, self.num_samples))
        starts = self._epoch(epoch).window_starts
        window = int(np.searchsorted(starts, position, side="right")) - 1
        return self._window(epoch, window)[position - starts[window] :][:count]

    def index_of(self, number: int) -> int:
        """Return the sample with running number `number`."""
        return int(self.indices(number, 1)[0])


# --- all sources together -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OrderedSource:
    """One source of a training run.

    Attributes:
        order: Its samples.
        batch_size: Samples per device and step.
        weight: Share of the training steps, relative to the other sources.
    """

    order: SampleOrder
    batch_size: int
    weight: float = 1.0


@dataclass(frozen=True)
class Position:
    """How far a training has come, all ranks together.

    Attributes:
        batches: Steps taken with each source.
        samples: Samples taken from each source.
    """

    batches: tuple[int, ...]
    samples: tuple[int, ...]

    @property
    def num_batches(self) -> int:
        """Steps taken."""
        return sum(self.batches)

    @property
    def num_samples(self) -> int:
        """Samples taken."""
        return sum(self.samples)


class TrainingOrder:
    """Batches of one or more sources; every step takes one source, the same on all ranks.

    The next step goes to the source that is furthest behind its share of the steps, the first
    of them in a tie (smooth weighted round robin): with two sources neither is ever more than
    one step away from its share. What has been taken is all there is to know, so the schedule
    goes on from any `Position`.

    Args:
        sources: The sources.
        num_ranks: Number of data-parallel processes.
    """

    def __init__(self, sources: Sequence[OrderedSource], *, num_ranks: int = 1):
        self.sources = tuple(sources)
        self.num_ranks = num_ranks
        total = sum(source.weight for source in sources)
        self.shares = tuple(source.weight / total for source in sources)

    def start(self) -> Position:
        """Return the position before the first step."""
        zeros = (0,) * len(self.sources)
        return Position(zeros, zeros)

    def source_at(self, position: Position) -> int:
        """Return the index of the source that the step at `position` takes."""
        step = position.num_batches + 1
        behind = [share * step - n for share, n in zip(self.shares, position.batches, strict=True)]
        return behind.index(max(behind))

    def advance(self, position: Position, num_steps: int = 1) -> Position:
        """Return the position `num_steps` steps later."""
        batches, samples = list(position.batches), list(position.samples)
        if len(self.sources) == 1:
            batches[0] += num_steps
            samples[0] += num_steps * self._global_batch_size(0)
            return Position(tuple(batches), tuple(samples))
        for _ in range(num_steps):
            source = self.source_at(position)
            batches[source] += 1
            samples[source] += self._global_batch_size(source)
            position = Position(tuple(batches), tuple(samples))
        return position

    def _global_batch_size(self, source: int) -> int:
        return self.sources[source].batch_size * self.num_ranks

    def rebalance(self, num_batches: int, samples: tuple[int, ...]) -> Position:
        """Return a position in which every source has had its share of the steps.

        For a run that goes on with other sources or weights: the schedule would otherwise make
        up for all the steps that the new weights would have taken differently.

        Args:
            num_batches: Steps taken.
            samples: Samples taken from each source.
        """
        batches = [int(share * num_batches) for share in self.shares]
        batches[0] += num_batches - sum(batches)
        return Position(tuple(batches), samples)

    def batch(self, position: Position, *, rank: int = 0) -> list[SampleRequest]:
        """Return what one rank reads in the step at `position`."""
        source = self.source_at(position)
        size = self.sources[source].batch_size
        indices = self.sources[source].order.indices(position.samples[source] + rank * size, size)
        first = position.num_samples + rank * size
        return [SampleRequest(first + i, source, int(k)) for i, k in enumerate(indices)]


# --- what was read, in a few digits ---------------------------------------------------------------

HASH_RANGE = 2**64
"""Fingerprints of samples are below it."""


def hash_of_place(number: int, key: str) -> int:
    """Return 64 bits that tell a sample at its running number from all others."""
    return int.from_bytes(blake2b(f"{number}:{key}".encode(), digest_size=8).digest(), "little")


def hash_of_places(numbers: Iterable[int], keys: Iterable[str]) -> int:
    """Return the fingerprint of samples, each at its running number.

    It is the sum of their hashes: the same in any order, and fingerprints of parts add up, so that
    ranks, steps and interruptions may divide the samples as they like. A sample that is missing,
    comes twice or changes places with another one changes it.

    Args:
        numbers: Running numbers, as in `SampleRequest`.
        keys: Names of the samples.

    Returns:
        A number in ``[0, HASH_RANGE)``.
    """
    return sum(hash_of_place(n, key) for n, key in zip(numbers, keys, strict=True)) % HASH_RANGE


# --- what a loader asks for -----------------------------------------------------------------------


class EndlessBatchSampler(Sampler[list[SampleRequest]]):
    """Training batches of one rank; never ends.

    Every new iterator asks `position` where the training stands, so that an interrupted run, a
    second `fit` and an epoch that a limit has cut all go on with the next unseen sample. The
    length is a number that no run reaches: Lightning reads one batch ahead of a loader without a
    length, and would then save a state that is one batch late.

    Args:
        order: Batches of all ranks.
        rank: This process.
        position: Tells where to start.
    """

    def __init__(
        self, order: TrainingOrder, *, rank: int = 0, position: Callable[[], Position] | None = None
    ):
        self.order = order
        self.rank = rank
        self.position = position or order.start

    def __iter__(self) -> Iterator[list[SampleRequest]]:
        """Yield batches from the present position on."""
        position = self.position()
        while True:
            yield self.order.batch(position, rank=self.rank)
            position = self.order.advance(position)

    def __len__(self) -> int:
        """Return a number of batches that is never reached."""
        return _ENDLESS


class ValidationBatchSampler(Sampler[list[SampleRequest]]):
    """Validation batches of one rank: every sample once, equally many batches on every rank.

    Rank ``r`` of ``w`` reads the samples ``r, r + w, ...`` of each source in turn; a rank that
    runs short repeats a sample with weight 0. No batch mixes sources.

    Args:
        num_samples: Samples of each source.
        batch_sizes: Batch size of each source, per device.
        rank: This process.
        num_ranks: Number of data-parallel processes.
    """

    def __init__(
        self,
        num_samples: Sequence[int],
        batch_sizes: Sequence[int],
        *,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        self.num_samples = tuple(num_samples)
        self.batch_sizes = tuple(batch_sizes)
        self.rank = rank
        self.num_ranks = num_ranks

    def __iter__(self) -> Iterator[list[SampleRequest]]:
        """Yield the batches of all sources, one source after the other."""
        first = 0
        for source, total in enumerate(self.num_samples):
            size = self.batch_sizes[source]
            mine = range(self.rank, self._per_rank(total) * self.num_ranks, self.num_ranks)
            for i in range(0, len(mine), size):
                yield [self._request(source, index, first) for index in mine[i : i + size]]
            first += total

    def _per_rank(self, total: int) -> int:
        return -(-total // self.num_ranks)

    def _request(self, source: int, index: int, first: int) -> SampleRequest:
        total = self.num_samples[source]
        return SampleRequest(first + index % total, source, index % total, float(index < total))

    def __len__(self) -> int:
        """Return the number of batches of this rank, equal on all ranks."""
        per_rank = [self._per_rank(total) for total in self.num_samples]
        return sum(-(-n // size) for n, size in zip(per_rank, self.batch_sizes, strict=True))
