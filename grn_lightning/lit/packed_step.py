"""A training step on packed documents: elements, noise, text and loss, each document's its own.

Source of the loss weights: Generative Refinement Networks (arXiv 2604.13030) gives every sample the
same weight; the code published later weighs it with the root of its predicted positions. There each
device divides by its own sum of weights; here the sum is that of all devices, so that a document
counts the same wherever it is packed.

`d` documents, `n` positions of all maps, `c` elements per position, `k` alphabet.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
from torch import Tensor

from grn_lightning.datasets.codes import check_hash
from grn_lightning.datasets.documents import Grid, PackedBatch
from grn_lightning.functional import (
    Stream,
    codes_to_elements,
    corrupt,
    counter_uniform,
    document_index,
    document_means,
    logit_normal,
    place_in_document,
    ragged_uniform,
    random_codes,
    shift,
    token_accuracy,
    token_cross_entropy,
)
from grn_lightning.lit.work import Work
from grn_lightning.models.costs import text_flops
from grn_lightning.models.grn_text import GRNTextConfig
from grn_lightning.models.packed import PackedMaps, PackedText, pack_text

if TYPE_CHECKING:
    from grn_lightning.lit.generator import LitGenerator

LossWeights = Literal["uniform", "sqrt", "document"]
LOSS_WEIGHTS = ("uniform", "sqrt", "document")


# --- maps -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Places:
    """Where the positions of all documents lie."""

    sizes: Tensor
    """`(d,)`: positions of each document."""
    document: Tensor
    """`(n,)`: number of each position's document."""
    place: Tensor
    """`(n,)`: place of each position in its document."""


def _places_of(grids: list[Grid], device: torch.device) -> _Places:
    sizes = [f * h * w for f, h, w in grids]
    lengths = torch.tensor(sizes, device=device)
    total = sum(sizes)
    return _Places(lengths, document_index(lengths, total), place_in_document(lengths, total))


def pack_elements(module: "LitGenerator", batch: PackedBatch) -> tuple[Tensor, list[Grid]]:
    """Return the elements `(n, c)` of all documents and their grids; clips are tokenized.

    Raises:
        ValueError: If another tokenizer has made cached codes.
    """
    parts: list[Tensor] = []
    given = iter(())
    if len(batch["codes"]):
        check_hash(batch["tokenizer_hash"], module.tokenizer_hash)
        elements = codes_to_elements(
            batch["codes"].T[None],
            num_rounds=module.tokenizer.config.num_rounds,
            target=module.target,
        )[0].T
        sizes = [f * h * w for f, h, w in filter(None, batch["grids"])]
        given = iter(elements.split(sizes))
    made = iter(_tokenized(module, batch))
    grids: list[Grid] = []
    for grid in batch["grids"]:
        if grid is None:
            one = next(made)  # (c, f, h, w)
            grid = (one.shape[1], one.shape[2], one.shape[3])
            parts.append(one.flatten(1).T)
        else:
            parts.append(next(given))
        grids.append((grid[0], grid[1], grid[2]))  # pinned memory makes lists of tuples
    return torch.cat(parts), grids


def _tokenized(module: "LitGenerator", batch: PackedBatch) -> list[Tensor]:
    """Elements `(c, f, h, w)` of every clip; those of one size go through the tokenizer at once."""
    clips = batch["clips"]
    rows = [row for row, grid in enumerate(batch["grids"]) if grid is None]
    names = [(f"{batch['sources'][row]}/{batch['keys'][row]}") for row in rows]
    places = [(name, clip.shape[1:]) for name, clip in zip(names, clips, strict=True)]
    known = module._codes if module.cache_codes else {}
    missing: dict[torch.Size, list[int]] = {}
    for i, place in enumerate(places):
        if place not in known:
            missing.setdefault(place[1], []).append(i)
    found: dict[int, Tensor] = {}
    for group in missing.values():
        elements = module.tokenize(torch.stack([clips[i] for i in group]))
        found |= dict(zip(group, elements, strict=True))
    if module.cache_codes:
        small = torch.uint8 if module.generator_config.alphabet_size <= 256 else torch.int32
        module._codes.update({places[i]: one.to(small).cpu() for i, one in found.items()})
    return [
        found[i] if i in found else known[place].long().to(module.device)
        for i, place in enumerate(places)
    ]


# --- text -----------------------------------------------------------------------------------------


def pack_condition(module: "LitGenerator", batch: PackedBatch, dropped: Tensor) -> PackedText:
    """Return the text of all documents; where one is dropped, that of the empty caption.

    Args:
        module: The stage.
        batch: With captions, or with their features.
        dropped: `(d,)` bool.
    """
    if "text_embeds" not in batch:
        return pack_text(*module.condition(batch, dropped))
    lengths = batch["text_lengths"]
    embeds, positions = batch["text_embeds"], batch["text_positions"]
    if not dropped.any():
        return PackedText(embeds, positions, tuple(lengths))
    null = pack_text(*module.null_condition(1))
    pairs = zip(embeds.split(lengths), positions.split(lengths), strict=True)
    chosen = [
        (null.embeds.to(embeds.dtype), null.positions) if is_dropped else pair
        for pair, is_dropped in zip(pairs, dropped.tolist(), strict=True)
    ]
    return PackedText(
        torch.cat([pair[0] for pair in chosen]),
        torch.cat([pair[1] for pair in chosen]),
        tuple(len(pair[1]) for pair in chosen),
    )


# --- noise ----------------------------------------------------------------------------------------


class Corrupted(NamedTuple):
    """What the generator is asked, and what it ought to answer.

    Attributes:
        maps: Corrupted codes, with clean first frames where they are given.
        t: Time of each document `(d,)`.
        targets: True elements of what is predicted `(p, c)`.
        document: Number of the document of each predicted position `(p,)`.
        text: Captions, some of them dropped.
    """

    maps: PackedMaps
    t: Tensor
    targets: Tensor
    document: Tensor
    text: PackedText


def corrupt_pack(module: "LitGenerator", batch: PackedBatch) -> Corrupted:
    """Corrupt the documents of a pack, each by the noise of its own running number."""
    x_1, grids = pack_elements(module, batch)
    places, index = _places_of(grids, x_1.device), batch["sample_index"]
    config = module.corruption

    def chance(stream: Stream) -> Tensor:
        return counter_uniform(index, seed=module.seed, step=0, stream=stream, shape=())

    u = chance(Stream.TIME)
    t = shift(logit_normal(u, mean=config.time_mean, std=config.time_std), config.time_shift)
    starts_given = chance(Stream.FIRST_FRAME) < config.i2v_ratio
    has_first_frame = tuple(
        is_given and grid[0] > 1
        for is_given, grid in zip(starts_given.tolist(), grids, strict=True)
    )
    noise = _element_noise(module.seed, index, places, x_1.shape[1])
    x_0 = random_codes(noise(Stream.INITIAL), alphabet_size=module.generator_config.alphabet_size)
    x_t = corrupt(x_1, x_0, noise(Stream.KEEP) < t[places.document, None])
    maps = PackedMaps(x_t, tuple(grids), has_first_frame)
    is_predicted = maps.is_predicted
    maps = maps._replace(codes=torch.where(is_predicted[:, None], x_t, x_1))
    dropped = chance(Stream.DROP) < config.condition_dropout
    text = pack_condition(module, batch, dropped)
    return Corrupted(maps, t, x_1[is_predicted], places.document[is_predicted], text)


def _element_noise(
    seed: int, index: Tensor, places: _Places, num_elements: int
) -> Callable[[Stream], Tensor]:
    """Return what gives the numbers `(n, c)` of a stream, as each document has them alone.

    Alone, the numbers of a document run over `(c, f, h, w)`.
    """
    element = torch.arange(num_elements, device=index.device)
    inside = places.place[:, None] + element * places.sizes[places.document, None]

    def noise(stream: Stream) -> Tensor:
        u, starts = ragged_uniform(index, places.sizes * num_elements, seed=seed, stream=stream)
        return u[starts[places.document, None] + inside]

    return noise


# --- loss -----------------------------------------------------------------------------------------


def document_weights(sizes: Tensor, kind: LossWeights) -> Tensor:
    """Return the weight of each document's mean loss.

    Args:
        sizes: Predicted positions of each document `(d,)`.
        kind: "uniform" counts every position the same, "document" every document, "sqrt" is in
            between.
    """
    power = {"uniform": 1.0, "sqrt": 0.5, "document": 0.0}[kind]
    return sizes.float() ** power


class PackResult(NamedTuple):
    """What a step found.

    Attributes:
        loss: This device's part of the weighted mean over the documents of all devices; its
            gradients are to be averaged over devices.
        own_loss: Weighted mean over the documents of this device, without gradients.
        accuracy: Share of right elements of each document `(d,)`.
        t: Time of each document `(d,)`.
        predicted: Most probable elements `(p, c)`.
        targets: True elements `(p, c)`.
    """

    loss: Tensor
    own_loss: Tensor
    accuracy: Tensor
    t: Tensor
    predicted: Tensor
    targets: Tensor


def pack_step(module: "LitGenerator", batch: PackedBatch) -> PackResult:
    """Corrupt and predict the documents of a pack.

    Raises:
        ValueError: If the devices do not take packs of the same step.
    """
    corrupted = corrupt_pack(module, batch)
    logits = module.generator(corrupted.maps, corrupted.t, corrupted.text)  # (p, c, k)
    number, document = len(batch["keys"]), corrupted.document
    sizes = torch.bincount(document, minlength=number)
    weights = document_weights(sizes, module.loss_weights)
    total = _mean_weight(module, batch, weights.sum())
    losses = token_cross_entropy(logits, corrupted.targets)  # one per position
    weighted = (losses * (weights / sizes)[document]).sum()
    loss, own_loss = weighted / total, weighted.detach() / weights.sum()
    accuracy = document_means(token_accuracy(logits, corrupted.targets), document, number)
    predicted = logits.detach().argmax(-1)
    return PackResult(loss, own_loss, accuracy, corrupted.t, predicted, corrupted.targets)


def _mean_weight(module: "LitGenerator", batch: PackedBatch, own: Tensor) -> float:
    """Return the mean over devices of the weights of their documents; see that packs agree."""
    trainer, mark = module.trainer, float(batch["step_mark"])
    mine = torch.tensor([float(own), mark, mark**2], dtype=torch.float64, device=own.device)
    weights, marks, squares = trainer.strategy.reduce(mine, reduce_op="sum").tolist()
    # Whole numbers below 2^16 are the same just where their variance is 0, exactly.
    if trainer.world_size * squares != marks**2:
        raise ValueError(
            f"the {trainer.world_size} devices have cut different packs in the step of the "
            f"documents {batch['sample_index'].tolist()}, so that some would come twice and others "
            "never: see that all of them read the same shards and settings, and resume from the "
            "last checkpoint."
        )
    return weights / trainer.world_size


# --- work -----------------------------------------------------------------------------------------


def pack_work(module: "LitGenerator", batch: PackedBatch) -> Work:
    """Return the work of a pack; its capacity is the budget."""
    clips = iter(batch["clips"])
    sizes = [
        torch.Size(grid or module.tokenizer.config.latent_shape(*next(clips).shape[1:])[1:]).numel()
        for grid in batch["grids"]
    ]
    lengths = batch.get("text_lengths") or module.text_lengths(batch["captions"])
    config = cast(GRNTextConfig, module.generator_config)
    parts = [text_flops(config, *pair) for pair in zip(sizes, lengths, strict=True)]
    tokens = sum(sizes) + len(sizes) + sum(lengths)
    flops = sum(part.total for part in parts)
    return Work(len(sizes), tokens, batch["token_budget"], flops)
