"""Any picture or clip through a tokenizer and back, in bounded memory.

A tokenizer takes sides that are multiples of its stride and ``1 + s k`` frames. Others are padded
by repeating the last row, column and frame, and the padding is cut off again; its bits count.
Frames may be cut into overlapping tiles, whose reconstructions fade into each other; a tile knows
nothing of the picture beyond it, so seams cost some quality, and overlaps cost bits. Time is
streamed: a few latent frames are in memory, whatever the length.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from grn_lightning.media.images import to_float, to_uint8
from grn_lightning.models.tokenizer import HBQTokenizer
from grn_lightning.models.tokenizers import Tokenizer


@dataclass(frozen=True)
class TilePlan:
    """How frames are padded and cut."""

    height: int
    """Rows of the original frames."""
    width: int
    """Columns of the original frames."""
    padded: tuple[int, int]
    """Height and width after padding."""
    tops: tuple[int, ...]
    """First row of every row of tiles."""
    lefts: tuple[int, ...]
    """First column of every column of tiles."""
    tile: tuple[int, int]
    """Height and width of a tile."""

    @property
    def num_tiles(self) -> int:
        """Number of tiles."""
        return len(self.tops) * len(self.lefts)

    def __str__(self) -> str:
        """Tell padding and tiles as a person reads them."""
        text = f"{self.height} x {self.width}"
        if self.padded != (self.height, self.width):
            text += f" padded to {self.padded[0]} x {self.padded[1]}"
        if self.num_tiles > 1:
            text += f", {self.num_tiles} tiles of {self.tile[0]} x {self.tile[1]}"
        return text


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _starts(length: int, tile: int, overlap: int, stride: int) -> tuple[int, ...]:
    """First pixels of tiles that cover a side; all are multiples of the stride."""
    if tile >= length:
        return (0,)
    num_tiles = -(-(length - overlap) // (tile - overlap))
    last = length - tile
    return tuple(last * n // (num_tiles - 1) // stride * stride for n in range(num_tiles))


def plan_tiles(
    height: int, width: int, *, stride: int, tile: int | None = None, overlap: int | None = None
) -> TilePlan:
    """Decide how frames of a size are padded and cut.

    Args:
        height: Rows.
        width: Columns.
        stride: Pixels per latent position.
        tile: Side of a tile in pixels, a multiple of the stride; None takes frames whole.
        overlap: Pixels that neighbouring tiles share at least, likewise; twice the stride by
            default.

    Raises:
        ValueError: If tile and overlap do not fit the stride.
    """
    padded = (_round_up(height, stride), _round_up(width, stride))
    overlap = 2 * stride if overlap is None else overlap
    if tile is not None and (tile % stride or overlap % stride or not 0 <= overlap < tile):
        raise ValueError(
            f"`tile` and `overlap` must be multiples of {stride}, and `overlap` at least 0 and "
            f"less than `tile`; got {tile} and {overlap}."
        )
    sides = [min(tile or side, side) for side in padded]
    pairs = zip(padded, sides, strict=True)
    tops, lefts = (_starts(side, cut, overlap, stride) for side, cut in pairs)
    return TilePlan(height, width, padded, tops, lefts, (sides[0], sides[1]))


def _ramp(starts: tuple[int, ...], n: int, tile: int) -> Tensor:
    """Weights of a tile's pixels along a side: they rise and fall over what it shares."""
    weights = torch.ones(tile)
    if n > 0 and (shared := starts[n - 1] + tile - starts[n]) > 0:
        weights[:shared] *= (torch.arange(shared) + 0.5) / shared
    if n + 1 < len(starts) and (shared := starts[n] + tile - starts[n + 1]) > 0:
        weights[-shared:] *= (torch.arange(shared).flip(0) + 0.5) / shared
    return weights


class _TileStream:
    """One tile through the tokenizer, chunk by chunk."""

    def __init__(self, tokenizer: Tokenizer, num_rounds: int | None):
        self.tokenizer, self.num_rounds = tokenizer, num_rounds
        self._next: Tensor | None = None
        quantized = (self._quantize(z) for z in tokenizer.encode_chunks(self._arriving()))
        self._frames = tokenizer.decode_chunks(quantized)

    def _arriving(self) -> Iterator[Tensor]:
        while self._next is not None:
            yield self._next

    def _quantize(self, z: Tensor) -> Tensor:
        if self.num_rounds is not None:
            assert isinstance(self.tokenizer, HBQTokenizer)
            return self.tokenizer.quantize_rounds(z, num_rounds=self.num_rounds)
        if not self.tokenizer.config.has_codes:
            return z
        return self.tokenizer.dequantize(self.tokenizer.quantize(z))

    def __call__(self, chunk: Tensor) -> Tensor:
        """Return the reconstruction of the next frames `(1, 3, f, h, w)`."""
        self._next = chunk
        return next(self._frames)


def cut_chunks(frames: Iterable[Tensor], *, stride: int, chunk_size: int) -> Iterator[Tensor]:
    """Gather frames to chunks that a streaming tokenizer takes.

    Args:
        frames: uint8 `(3, h, w)`, one after the other.
        stride: Frames per latent frame.
        chunk_size: Latent frames per chunk.

    Yields:
        uint8 `(f, 3, h, w)`: `1 + stride (chunk_size - 1)` frames, then `stride chunk_size` at a
        time; the last chunk is shorter, and is not padded.
    """
    wanted, held = 1 + stride * (chunk_size - 1), []
    for frame in frames:
        held.append(frame)
        if len(held) == wanted:
            yield torch.stack(held)
            wanted, held = stride * chunk_size, []
    if held:
        yield torch.stack(held)


class Reconstruction:
    """A tokenizer at work on frames of one size.

    Args:
        tokenizer: On its device, in evaluation mode.
        plan: How frames are padded and cut.
        num_rounds: Decode so many rounds instead of those of the training.
    """

    def __init__(self, tokenizer: Tokenizer, plan: TilePlan, *, num_rounds: int | None = None):
        if num_rounds is not None and not tokenizer.config.has_rounds:
            raise ValueError("`rounds` must be left out: the tokenizer's codes have no rounds.")
        self.tokenizer, self.plan = tokenizer, plan
        self.num_latent_frames = 0
        self._bits_per_position = tokenizer.config.bits_per_position
        if num_rounds is not None:
            self._bits_per_position = float(num_rounds * tokenizer.config.latent_channels)
        self._tiles = {
            (row, column): _TileStream(tokenizer, num_rounds)
            for row in range(len(plan.tops))
            for column in range(len(plan.lefts))
        }

    @property
    def num_bits(self) -> float:
        """Bits of the codes so far, padding and overlaps included."""
        stride = self.tokenizer.config.spatial_stride
        height, width = self.plan.tile
        positions = self.plan.num_tiles * (height // stride) * (width // stride)
        return self._bits_per_position * positions * self.num_latent_frames

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        """Reconstruct the next frames; see `cut_chunks`.

        Args:
            frames: uint8 `(f, 3, height, width)`; the last chunk may have any number.

        Returns:
            uint8, same shape.
        """
        config, count = self.tokenizer.config, len(frames)
        is_first = self.num_latent_frames == 0
        fitting = _round_up(count - is_first, config.temporal_stride) + is_first
        self.num_latent_frames += (fitting - is_first) // config.temporal_stride + is_first
        weight = next(self.tokenizer.parameters())
        clip = to_float(frames).to(weight.device, weight.dtype).transpose(0, 1)[None]
        bottom, right = (
            after - before
            for after, before in zip(self.plan.padded, frames.shape[-2:], strict=True)
        )
        clip = pad(clip, (0, right, 0, bottom, 0, fitting - count), mode="replicate")
        whole = self._join(clip).float()[0, :, :count].transpose(0, 1)
        return to_uint8(whole[..., : self.plan.height, : self.plan.width]).cpu()

    def _join(self, clip: Tensor) -> Tensor:
        """Reconstruct all tiles and let them fade into each other."""
        plan, (height, width) = self.plan, self.plan.tile
        if plan.num_tiles == 1:
            return self._tiles[0, 0](clip)
        total, weights = torch.zeros_like(clip), torch.zeros_like(clip[:1, :1, :1])
        for (row, column), stream in self._tiles.items():
            rows = slice(plan.tops[row], plan.tops[row] + height)
            columns = slice(plan.lefts[column], plan.lefts[column] + width)
            weight = torch.outer(
                _ramp(plan.tops, row, height), _ramp(plan.lefts, column, width)
            ).to(clip)
            total[..., rows, columns] += weight * stream(clip[..., rows, columns].contiguous())
            weights[..., rows, columns] += weight
        return total / weights
