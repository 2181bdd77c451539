"""Packs: documents of different sizes that share a budget of tokens, in an order without memory.

A *document* is one training sample; its tokens are those of its caption, of its map, and one for
the time. The documents of all sources form one endless stream (`order.py`, each of them a step of
its own), from which packs are made one after the other. A look-ahead of some budgets waits to be
packed; a pack takes the oldest document of it, and of the others those that fill the budget best,
older ones first. So a document waits for a bounded time, and hardly any place is lost.

Packs are numbered without regard to ranks: with `w` ranks, rank `r` takes in step `s` the pack
`s w + r`. Which documents share a pack is a function of the seed and of the packs before, and a
`PackedPosition` holds all there is to know of these; so a run may go on with any number of ranks,
and neither repeats nor loses a document.

A document that is longer than the budget can never be packed, nor one whose record is wrong. Such
documents are counted, told about once, and left out; where there are too many, the run stops.

Every rank measures the whole stream for itself, so what is left out must be a function of the data
alone. A file that cannot be read at the moment is no such thing: reading is tried again, and then
the run stops. A `PackRequest` has a mark of its step by which ranks can see that they agree.
"""

import time
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from torch.utils.data import Sampler

from grn_lightning.datasets.codes import OtherTokenizerError
from grn_lightning.datasets.order import Position, SampleRequest, TrainingOrder

_ENDLESS = 10**12  # as in `order.py`
_FEW_LEFT_OUT = 10  # so many are let pass before their share means anything
_REMEMBERED = 1024  # positions of past steps; a loader is never so far ahead
_PAUSES = (0.1, 1.0, 5.0)  # seconds between attempts to read what a document is measured by


def best_fill(sizes: Sequence[int], budget: int) -> list[int]:
    """Choose what fills a budget best, and in any case the first.

    Among the choices that fill it equally well the one with earlier elements is taken.

    Args:
        sizes: Positive numbers; the first is at most `budget`.
        budget: What the chosen ones may add up to.

    Returns:
        Increasing indices, 0 among them.

    Example:
        >>> best_fill([5, 4, 3, 2], 9)
        [0, 1]
        >>> best_fill([5, 3, 3, 4], 9)
        [0, 3]
    """
    # Bit s of reachable[i] tells whether some of sizes[i:] add up to s: a whole table row by a
    # shift of one integer.
    left, mask = budget - sizes[0], (1 << (budget - sizes[0] + 1)) - 1
    reachable = [1]
    for size in reversed(sizes[1:]):
        reachable.append(reachable[-1] | (reachable[-1] << size) & mask)
    reachable.reverse()
    left = reachable[0].bit_length() - 1
    chosen = [0]
    for i, size in enumerate(sizes[1:], start=1):
        if size <= left and reachable[i] >> (left - size) & 1:
            chosen.append(i)
            left -= size
    return chosen


class Document(NamedTuple):
    """A document that waits to be packed."""

    request: SampleRequest
    """What is to be read."""
    tokens: int
    """Tokens of its caption, its map and its time."""


@dataclass(frozen=True)
class PackedPosition:
    """How far a training on packs has come, all ranks together.

    Attributes:
        drawn: What has been taken from the stream, in documents.
        waiting: What of it has not been packed, oldest first.
        steps: Steps taken.
        packed: Documents in their packs.
        left_out: Documents of each source that were too long, or had a wrong record.
    """

    drawn: Position
    waiting: tuple[Document, ...]
    steps: int
    packed: int
    left_out: tuple[int, ...]

    @property
    def num_batches(self) -> int:
        """Steps taken."""
        return self.steps

    @property
    def num_samples(self) -> int:
        """Documents trained on."""
        return self.packed


class PackRequest(NamedTuple):
    """What a data set is asked for: the documents of one pack."""

    requests: tuple[SampleRequest, ...]
    """The documents."""
    step_samples: int
    """Documents in the packs of all ranks of this step."""
    step_mark: int = 0
    """In [0, 2^16): a hash of the step and of all of its packs, the same on every rank."""


class PackedOrder:
    """Packs of one or more sources; every step has one for each rank.

    Args:
        stream: Documents, one per step; its weights are shares of documents.
        measure: Returns the tokens of a document; it must be quick and always say the same. It may
            refuse one (`ValueError`), on every rank alike.
        token_budget: Most tokens of a pack.
        num_ranks: Number of data-parallel processes, each with a pack per step.
        look_ahead: Budgets of tokens that wait to be packed.
        max_left_out: Share of documents that may be too long or unreadable.
        describe: Names a document in messages.

    Raises:
        ValueError: If a number is out of range; from every method, if too many documents are left
            out.
        OSError: From every method, if what a document is measured by cannot be read, tried again.
    """

    def __init__(
        self,
        stream: TrainingOrder,
        measure: Callable[[SampleRequest], int],
        *,
        token_budget: int,
        num_ranks: int = 1,
        look_ahead: int = 4,
        max_left_out: float = 0.01,
        describe: Callable[[SampleRequest], str] = str,
    ):
        if token_budget < 3 or look_ahead < 1:
            raise ValueError(
                f"`token_budget` must be at least 3 and `look_ahead` at least 1, got "
                f"{token_budget} and {look_ahead}."
            )
        self.stream, self.measure, self.token_budget = stream, measure, token_budget
        self.num_ranks, self.look_ahead = num_ranks, look_ahead
        self.max_left_out, self.describe = max_left_out, describe
        self._told: set[int] = set()
        self._step = lru_cache(maxsize=4)(self._make_step)

    def start(self) -> PackedPosition:
        """Return the position before the first step."""
        return PackedPosition(self.stream.start(), (), 0, 0, (0,) * len(self.stream.sources))

    def resume(self, position: PackedPosition, waiting: Sequence[SampleRequest]) -> PackedPosition:
        """Return a position with documents that waited in an earlier run, measured anew."""
        documents, left_out = [], list(position.left_out)
        for request in waiting:
            size = self._measured(request, left_out, position.drawn.num_samples)
            if size is not None:
                documents.append(Document(request, size))
        return replace(position, waiting=tuple(documents), left_out=tuple(left_out))

    def advance(self, position: PackedPosition, num_steps: int = 1) -> PackedPosition:
        """Return the position `num_steps` steps later."""
        for _ in range(num_steps):
            position = self._step(position)[1]
        return position

    def batch(self, position: PackedPosition, *, rank: int = 0) -> PackRequest:
        """Return what one rank reads in the step at `position`."""
        packs = self._step(position)[0]
        mark = zlib.crc32(repr((position.steps, packs)).encode()) & 0xFFFF
        return PackRequest(packs[rank], sum(map(len, packs)), mark)

    def mean_documents(self, num_packs: int = 32) -> float:
        """Return how many documents a pack holds, on average over the first packs of a run."""
        position = self.start()
        for _ in range(num_packs):
            _, position = self._next_pack(position)
        return position.packed / num_packs

    def _make_step(
        self, position: PackedPosition
    ) -> tuple[tuple[tuple[SampleRequest, ...], ...], PackedPosition]:
        packs = []
        for _ in range(self.num_ranks):
            pack, position = self._next_pack(position)
            packs.append(tuple(document.request for document in pack))
        return tuple(packs), replace(position, steps=position.steps + 1)

    def _next_pack(self, position: PackedPosition) -> tuple[list[Document], PackedPosition]:
        position = self._draw(position)
        waiting = position.waiting
        chosen = best_fill([document.tokens for document in waiting], self.token_budget)
        taken = set(chosen)
        rest = tuple(document for i, document in enumerate(waiting) if i not in taken)
        packed = position.packed + len(chosen)
        return [waiting[i] for i in chosen], replace(position, waiting=rest, packed=packed)

    def _draw(self, position: PackedPosition) -> PackedPosition:
        """Take documents from the stream until enough of them wait."""
        drawn, waiting = position.drawn, list(position.waiting)
        left_out = list(position.left_out)
        wanted = self.look_ahead * self.token_budget
        tokens = sum(document.tokens for document in waiting)
        while tokens < wanted:
            (request,) = self.stream.batch(drawn)
            drawn = self.stream.advance(drawn)
            size = self._measured(request, left_out, drawn.num_samples)
            if size is not None:
                waiting.append(Document(request, size))
                tokens += size
        return replace(position, drawn=drawn, waiting=tuple(waiting), left_out=tuple(left_out))

    def _measured(self, request: SampleRequest, left_out: list[int], seen: int) -> int | None:
        """Return the tokens of a document; count it where it cannot be packed."""
        try:
            size = self._measure_again(request)
            if size > self.token_budget:
                raise ValueError(
                    f"it has {size} tokens, more than the budget of {self.token_budget}."
                )
            return size
        except OtherTokenizerError:
            raise
        except ValueError as error:
            left_out[request.source] += 1
            self._tell(request, error, sum(left_out), seen)
            return None

    def _measure_again(self, request: SampleRequest) -> int:
        """Measure a document; where reading fails, a few times."""
        for pause in _PAUSES:
            try:
                return self.measure(request)
            except OSError:
                time.sleep(pause)
        try:
            return self.measure(request)
        except OSError as error:
            raise OSError(
                f"{self.describe(request)} cannot be read, tried {len(_PAUSES) + 1} times: {error} "
                "It is not left out, since other devices may read it and would cut other packs. "
                "See that every device can read the shards, and resume from the last checkpoint."
            ) from error

    def _tell(self, request: SampleRequest, error: Exception, count: int, seen: int) -> None:
        name = self.describe(request)
        few = count < _FEW_LEFT_OUT and self.max_left_out > 0
        if count > self.max_left_out * seen and not few:
            raise ValueError(
                f"{count} of {seen} documents cannot be packed, more than {self.max_left_out:.0%}. "
                f"The last one is {name}: {error} Repair the shards if they are "
                "damaged; else raise `token_budget`, take smaller sizes or fewer frames, or raise "
                "`max_left_out`."
            ) from error
        if request.number not in self._told:
            self._told.add(request.number)
            warnings.warn(
                f"left out, {count} of {seen} documents so far: {name}: {error}", stacklevel=2
            )


class PackSampler(Sampler[PackRequest]):
    """Packs of one rank; never ends. See `EndlessBatchSampler`.

    Args:
        order: Packs of all ranks.
        rank: This process.
        position: Tells where to start.
    """

    def __init__(
        self,
        order: PackedOrder,
        *,
        rank: int = 0,
        position: Callable[[], PackedPosition] | None = None,
    ):
        self.order = order
        self.rank = rank
        self.position = position or order.start
        self._recent: OrderedDict[int, PackedPosition] = OrderedDict()

    def __iter__(self) -> Iterator[PackRequest]:
        """Yield packs from the present position on."""
        position = self.position()
        self._recent.clear()
        while True:
            self._recent[position.steps] = position
            if len(self._recent) > _REMEMBERED:
                self._recent.popitem(last=False)
            yield self.order.batch(position, rank=self.rank)
            position = self.order.advance(position)

    def position_at(self, steps: int) -> PackedPosition | None:
        """Return the position before step number `steps`, if it was lately passed."""
        return self._recent.get(steps)

    def __len__(self) -> int:
        """Return a number of packs that is never reached."""
        return _ENDLESS
