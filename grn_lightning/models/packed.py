"""Packed inputs of `GRNText`: documents of any sizes one behind the other, in place of a batch.

A document is a caption and the code map of a picture or a clip, of its own grid, at its own time,
with or without a given first frame. In the sequence its tokens stand together:
`[text, visual, time]`; that order is ours, since positions live in the rotary tables alone.

`d` documents, `n` positions of all maps, `l` text tokens of all captions, `s = l + n + d` tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grn_lightning.functional.packing import document_index, place_in_document
from grn_lightning.nn.packed_attention import DocumentLengths


class PackedMaps(NamedTuple):
    """Code maps of several documents, position by position, the column running fastest.

    Attributes:
        codes: Corrupted codes `(n, c)` in [0, k); clean ones where a first frame is given.
        grids: Frames, rows and columns of each document, a given first frame included.
        has_first_frame: Whether latent frame 0 of each document is given; it gets no logits.
    """

    codes: Tensor
    grids: tuple[tuple[int, int, int], ...]
    has_first_frame: tuple[bool, ...]

    @property
    def sizes(self) -> list[int]:
        """Positions of each document."""
        return [f * h * w for f, h, w in self.grids]

    @property
    def is_predicted(self) -> Tensor:
        """`(n,)` bool: False in given first frames."""
        frame_sizes = [h * w for _, h, w in self.grids]
        pairs = zip(frame_sizes, self.has_first_frame, strict=True)
        given = torch.tensor([size if has else 0 for size, has in pairs], device=self.codes.device)
        sizes = torch.tensor(self.sizes, device=self.codes.device)
        total = len(self.codes)
        return place_in_document(sizes, total) >= given.repeat_interleave(sizes, output_size=total)


class PackedText(NamedTuple):
    """Features of the captions of several documents, without padding.

    Attributes:
        embeds: Token features `(l, text_channels)`.
        positions: Place of each token in its caption `(l,)`.
        lengths: Tokens of each caption.
    """

    embeds: Tensor
    positions: Tensor
    lengths: tuple[int, ...]


def pack_text(embeds: Tensor, mask: Tensor) -> PackedText:
    """Leave out what a mask hides.

    Args:
        embeds: Token features `(d, l, text_channels)`.
        mask: Boolean `(d, l)`, True = a token of the caption.
    """
    positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return PackedText(embeds[mask], positions[mask], tuple(mask.sum(1).tolist()))


class PackedPlan(NamedTuple):
    """Where the tokens of a packed sequence come from, and where those lie that are predicted.

    Attributes:
        lengths: Text, and visual and time tokens of each document.
        order: `(s,)`: the token at each place, counted through all text, visual and time tokens.
        predicted: Places in the sequence of the visual tokens that get logits.
    """

    lengths: DocumentLengths
    order: Tensor
    predicted: Tensor


def plan_sequence(maps: PackedMaps, text_lengths: Sequence[int]) -> PackedPlan:
    """Lay out a packed sequence.

    Raises:
        ValueError: If maps and captions are not of the same number, or the maps not as their grids
            say.
    """
    sizes, device = maps.sizes, maps.codes.device
    counts = len(sizes), len(maps.has_first_frame), len(text_lengths)
    if len(set(counts)) > 1 or sum(sizes) != len(maps.codes):
        raise ValueError(
            f"a packed sequence needs a map, a mark of a first frame and a caption per document, "
            f"got {counts}, and codes of all positions of the grids, {sum(sizes)}, got "
            f"{len(maps.codes)}."
        )
    groups = [list(text_lengths), sizes, [1] * len(sizes)]
    document = torch.cat(
        [document_index(torch.tensor(group, device=device), sum(group)) for group in groups]
    )
    order = document.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=device)
    visual = place[sum(text_lengths) : sum(text_lengths) + sum(sizes)]
    rest = tuple(size + 1 for size in sizes)
    lengths = DocumentLengths(tuple(text_lengths), rest)
    return PackedPlan(lengths, order, visual[maps.is_predicted])
