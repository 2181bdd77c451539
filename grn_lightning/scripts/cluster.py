"""`grn cluster`: make the coarse labels of coarse-to-fine prediction, and see what they keep."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from grn_lightning.datasets.manifest import write_json
from grn_lightning.datasets.shards import ShardSet
from grn_lightning.functional import hbq_decode
from grn_lightning.lit.tokenizer import load_tokenizer
from grn_lightning.media.images import to_uint8
from grn_lightning.media.sheets import contact_sheet
from grn_lightning.metrics.reconstruction import FramePSNR
from grn_lightning.models.clusters import Clusters, fit_codewords, fit_latents, write_clusters
from grn_lightning.models.coarse_split import CoarseSplit, PrefixSplit
from grn_lightning.models.hashes import weights_hash
from grn_lightning.models.tokenizer import HBQTokenizer
from grn_lightning.models.vq_tokenizer import VQTokenizer
from grn_lightning.scripts.heldout import HeldOut, open_held_out
from grn_lightning.scripts.runs import ClipSize, choose_device
from grn_lightning.scripts.stand_ins import (
    StandIn,
    codeword_stand_ins,
    latent_stand_ins,
    prefix_stand_ins,
    random_members,
    random_places,
    table_rows,
)

_NUM_SHOWN = 8
_BATCH_SIZE = 64

Arm = Callable[[Tensor, Tensor], Tensor]
"""Codes `(b, c, 1, h, w)` and the numbers of their samples to latents that are decoded."""


@dataclass(frozen=True)
class ClusterReport:
    """What was written, and how much of a picture the coarse label keeps."""

    file: Path
    """The clusters."""
    sheet: Path
    """Held-out pictures, decoded after codes were replaced within their cells."""
    num_samples: int
    """Held-out pictures judged."""
    sizes: tuple[int, int, int]
    """Smallest, median and largest cluster."""
    inertia: float
    """Sum of squared distances to the centroids."""
    psnr: dict[str, float]
    """PSNR to the originals in dB, by what was decoded."""

    def __str__(self) -> str:
        """Tell a person."""
        low, middle, high = self.sizes
        rows = [f"  {name:<34} {value:6.2f} dB" for name, value in self.psnr.items()]
        return "\n".join(
            [
                f"clusters in '{self.file}': sizes {low} / {middle} / {high} "
                f"(smallest / median / largest), inertia {self.inertia:.4g}",
                f"PSNR[{self.num_samples},val] of what is decoded:",
                *rows,
                f"look at '{self.sheet}'",
            ]
        )


def cluster(
    tokenizer: Path,
    data: Path,
    *,
    out: Path,
    num_clusters: int = 512,
    image_size: int | tuple[int, int] = 256,
    num_latents: int = 2048,
    num_samples: int = 256,
    num_restarts: int = 10,
    seed: int = 0,
    device: str = "auto",
) -> ClusterReport:
    """Cluster the codewords of a tokenizer by k-means, and look at what the clusters keep.

    The codebook of a `VQTokenizer` is clustered itself, every codeword once. The codes of an
    `HBQTokenizer` cannot be listed: the latents of training pictures are clustered, as often as
    they occur. Then codes of held-out pictures are replaced within their cells and decoded: by
    another member, by the centroid, and, as a control, by a member of a random group of the same
    size; for HBQ codes also by random bits behind the first m of every channel.

    Args:
        tokenizer: Checkpoint of a tokenizer run, the run's folder, or an export.
        data: Folder of shards of pictures.
        out: File to write, `.safetensors`; a sheet and a JSON are written beside it.
        num_clusters: Clusters; 512 of 16,384 codewords in the paper.
        image_size: Height and width in pixels, or one number for both.
        num_latents: Training pictures whose latents are clustered (HBQ only).
        num_samples: Held-out pictures that are judged.
        num_restarts: Starts of the k-means of which the best is kept.
        seed: Seed of the k-means and of the replacements.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: If `out` exists, or there are too few different vectors.
    """
    if out.suffix != ".safetensors" or out.exists():
        raise ValueError(f"`out` must be a new file that ends in .safetensors, got '{out}'.")
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    size = ClipSize(1, height, width)
    model = load_tokenizer(tokenizer).to(choose_device(device))
    held_out = _open(data, "val", size, num_samples)
    if isinstance(model, VQTokenizer):
        clusters = fit_codewords(
            model, num_clusters=num_clusters, seed=seed, num_restarts=num_restarts
        )
        arms = dict(_codeword_arms(model, clusters, seed))
    else:
        codes = _codes_of(model, _open(data, "train", size, num_latents))
        clusters = fit_latents(
            model, codes, num_clusters=num_clusters, seed=seed, num_restarts=num_restarts
        )
        arms = dict(_latent_arms(model, clusters, codes, seed))
    psnr, cells = _judge(model, held_out, arms)
    sheet = out.with_suffix(".png")
    write_clusters(out, clusters)
    labels = [name for _ in range(_NUM_SHOWN) for name in ("original", *arms)][: len(cells)]
    contact_sheet(cells, labels, columns=len(arms) + 1).save(sheet)
    sizes = clusters.sizes.sort().values
    report = ClusterReport(
        file=out,
        sheet=sheet,
        num_samples=held_out.num_samples,
        sizes=(int(sizes[0]), int(sizes[len(sizes) // 2]), int(sizes[-1])),
        inertia=clusters.info.inertia,
        psnr=psnr,
    )
    facts = asdict(report) | {"tokenizer_hash": weights_hash(model), "data": str(data)}
    write_json(out.with_suffix(".json"), facts | {"file": str(out), "sheet": str(sheet)})
    return report


def _open(data: Path, split: str, size: ClipSize, count: int) -> HeldOut:
    shards = ShardSet.open(str(data), split)
    count = min(count, len(shards))
    return open_held_out(
        shards, split=split, size=size, fps=None, num_samples=count, batch_size=_BATCH_SIZE
    )


@torch.no_grad()
def _codes_of(model: HBQTokenizer, samples: HeldOut) -> Tensor:
    device = next(model.parameters()).device
    return torch.cat([model.tokenize(batch["clips"].to(device)).cpu() for batch in samples])


def _codeword_arms(model: VQTokenizer, clusters: Clusters, seed: int) -> Iterator[tuple[str, Arm]]:
    cluster_of = clusters.cluster_of
    assert cluster_of is not None
    order = torch.randperm(len(cluster_of), generator=torch.Generator().manual_seed(seed))

    def of_groups(groups: Tensor, stand_in: StandIn) -> Arm:
        return lambda codes, index: stand_in(groups.to(codes.device)[codes.squeeze(2)], index)

    yield "the code itself", lambda codes, index: model.dequantize(codes)
    for name, stand_in in codeword_stand_ins(model, clusters, seed=seed).items():
        yield name, of_groups(cluster_of, stand_in)
    groups = cluster_of[order]
    random = random_members(model, groups, seed=seed)
    yield "random member of a random group", of_groups(groups, random)


def _latent_arms(
    model: HBQTokenizer, clusters: Clusters, codes: Tensor, seed: int
) -> Iterator[tuple[str, Arm]]:
    """Members are the latents of the training pictures."""
    rounds = model.config.num_rounds
    split = clusters.split()
    vectors = hbq_decode(codes, num_rounds=rounds).movedim(1, -1).flatten(0, -2)
    labels = split.coarse(codes.squeeze(2)).flatten()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))

    def member_of(groups: Tensor) -> Arm:
        return lambda codes, index: table_rows(
            vectors, random_places(split.coarse(codes.squeeze(2)), groups, index, seed)
        )

    def of_split(cells: CoarseSplit, stand_in: StandIn) -> Arm:
        return lambda codes, index: stand_in(cells.coarse(codes.squeeze(2)), index)

    yield "the code itself", lambda codes, index: model.dequantize(codes)
    yield "centroid", of_split(split, latent_stand_ins(clusters)["centroid"])
    yield "random member", member_of(labels)
    yield "random member of a random group", member_of(labels[order])
    for m in range(rounds):
        cells = PrefixSplit(codes.shape[1], rounds, m)
        stand_in = prefix_stand_ins(model, cells, seed=seed)["random bits"]
        yield f"random bits behind the first {m}", of_split(cells, stand_in)


@torch.no_grad()
def _judge(
    model: HBQTokenizer | VQTokenizer, held_out: HeldOut, arms: dict[str, Arm]
) -> tuple[dict[str, float], list[Tensor]]:
    """Return the PSNR of every arm, and the first pictures of all."""
    device = next(model.parameters()).device
    scores = {name: FramePSNR() for name in arms}
    shown: list[Tensor] = []
    for batch in held_out:
        clips, index = batch["clips"].to(device), batch["sample_index"]
        codes = model.tokenize(clips)
        parts = [clips]
        for name, arm in arms.items():
            decoded = model.decode(arm(codes, index)).float().clamp(-1, 1)
            scores[name].update(decoded.cpu(), clips.cpu())
            parts.append(decoded)
        if not shown:
            rows = torch.stack([to_uint8(part.cpu()[:, :, 0]) for part in parts], dim=1)
            shown = list(rows[:_NUM_SHOWN].flatten(0, 1))
    return {name: float(score.compute()) for name, score in scores.items()}, shown
