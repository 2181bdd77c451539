"""`grn bench fine`: what stage 2 adds to a coarse map, beside what needs no network."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torchmetrics import MeanMetric

from grn_lightning.datasets.manifest import write_json
from grn_lightning.datasets.samples import Batch
from grn_lightning.datasets.shards import ShardSet
from grn_lightning.functional import token_accuracy
from grn_lightning.lit.callbacks import DigitFeatures
from grn_lightning.lit.coarse_to_fine import LitFine, load_coarse_to_fine, load_stage
from grn_lightning.media.images import to_uint8
from grn_lightning.media.sheets import contact_sheet
from grn_lightning.metrics import FrechetDistance
from grn_lightning.metrics.reconstruction import FramePSNR
from grn_lightning.models.clusters import read_clusters
from grn_lightning.models.coarse_split import PrefixSplit, leak_rate
from grn_lightning.models.hashes import weights_hash
from grn_lightning.models.vq_tokenizer import VQTokenizer
from grn_lightning.pipelines.coarse_to_fine import CoarseToFinePipeline
from grn_lightning.samplers.coarse_to_fine import CoarseToFineConfig, DrawConfig, draw_fine
from grn_lightning.scripts.heldout import open_held_out
from grn_lightning.scripts.judging import judge_beside
from grn_lightning.scripts.runs import ClipSize, choose_device
from grn_lightning.scripts.stand_ins import (
    StandIn,
    codeword_stand_ins,
    latent_stand_ins,
    prefix_stand_ins,
)

_NUM_SHOWN = 8
_BOUND, _FINE = "the code itself", "stage 2"
Maps = Literal["true", "drawn"]


@dataclass(frozen=True)
class FineArm:
    """What was decoded over coarse maps of one origin, and how good it is."""

    name: str
    """What stands in for the codes."""
    maps: Maps
    """Coarse maps of the held-out pictures, or drawn by stage 1 for the same conditions."""
    psnr: float | None
    """To the originals in dB; null of drawn maps, which have none."""
    fid: float | None
    """Frechet distance to the held-out pictures, features of the digits' judge; null without it."""
    accuracy: float | None
    """Share in which the judge reads the digit of the class; likewise."""


@dataclass(frozen=True)
class FineBench:
    """The comparison."""

    arms: tuple[FineArm, ...]
    """True maps first."""
    num_samples: int
    """Held-out pictures, and drawn ones."""
    top_1: float
    """Share of codes that stage 2 finds likeliest given the true coarse map."""
    leak_rate: float | None
    """Share of positions of true maps where a draw of stage 2 contradicts the map; null if it was
    trained behind the mask, which leaves the rest of its logits untrained."""
    sheet: Path
    """The first pictures of every arm."""

    def __str__(self) -> str:
        """Return a table and how to read it."""
        judged = any(arm.fid is not None for arm in self.arms)
        head = f"{'':<44}{'PSNR':>9}" + (f"{'FID':>9}{'right digits':>14}" if judged else "")
        lines = [head]
        for arm in self.arms:
            psnr = "-" if arm.psnr is None else f"{arm.psnr:.2f} dB"
            line = f"{arm.name + f' ({arm.maps} maps)':<44}{psnr:>9}"
            if arm.fid is not None and arm.accuracy is not None:
                line += f"{arm.fid:>9.2f}{100 * arm.accuracy:>12.1f} %"
            lines.append(line)
        tag = f"[{self.num_samples},val]"
        leaks = "" if self.leak_rate is None else f", {self.leak_rate:.1%} of draws leave it"
        return "\n".join(
            [
                *lines,
                f"PSNR{tag}; FID[digits-cnn,{self.num_samples},val]" if judged else f"PSNR{tag}",
                f"stage 2 given the true map: {100 * self.top_1:.1f} % of codes are its "
                f"likeliest{leaks}",
                f"look at '{self.sheet}'",
            ]
        )


class _Arm:
    """Adds up what is known of the pictures of one arm."""

    def __init__(self, name: str, maps: Maps, features: DigitFeatures | None) -> None:
        self.name, self.maps, self.features = name, maps, features
        self.psnr, self.right = FramePSNR(), MeanMetric()
        self.fid = None if features is None else FrechetDistance(features)
        self.shown: list[Tensor] = []
        self.count = 0

    def add(self, clips: Tensor, originals: Tensor, labels: Tensor | None) -> None:
        """Take decoded pictures `(b, 3, 1, h, w)` and the held-out ones of the same conditions."""
        clips = clips.float().clamp(-1, 1).cpu()
        self.count += len(clips)
        if self.maps == "true":
            self.psnr.update(clips, originals)
        if self.fid is not None and self.features is not None:
            self.fid.update(originals, real=True)
            self.fid.update(clips, real=False)
            if labels is not None:
                self.right.update((self.features.judge.classify(clips) == labels).float())
        self.shown += list(to_uint8(clips[: _NUM_SHOWN - len(self.shown), :, 0]))

    def result(self) -> FineArm:
        return FineArm(
            self.name,
            self.maps,
            psnr=float(self.psnr.compute()) if self.maps == "true" else None,
            fid=None if self.fid is None else float(self.fid.compute()),
            accuracy=None if self.fid is None else float(self.right.compute()),
        )


def _stand_ins(stage: LitFine, seed: int) -> dict[str, StandIn]:
    assert stage.split_config is not None
    tokenizer, file = stage.tokenizer, stage.split_config.clusters
    if isinstance(stage.split, PrefixSplit):
        return prefix_stand_ins(tokenizer, stage.split, seed=seed)
    assert file is not None
    clusters = read_clusters(file, tokenizer_hash=stage.tokenizer_hash)
    if isinstance(tokenizer, VQTokenizer):
        return codeword_stand_ins(tokenizer, clusters, seed=seed)
    return latent_stand_ins(clusters)


def _stage_2(run: Path) -> LitFine:
    stage = load_stage(run)
    if not isinstance(stage, LitFine):
        raise ValueError(f"'{run}' is a run of {type(stage).__name__}; give one of LitFine.")
    stage.configure_model()
    if stage.network.config.sees_earlier:
        raise ValueError(
            f"'{run}' was trained with `sees_earlier`: it is a control for its likelihood and "
            "cannot draw; give a run without."
        )
    return stage


class _Bench:
    """The networks of one comparison."""

    def __init__(self, stage: LitFine, pipeline: CoarseToFinePipeline | None, seed: int) -> None:
        self.stage, self.pipeline, self.seed = stage, pipeline, seed
        assert stage.split is not None
        self.split = stage.split
        self.stand_ins = _stand_ins(stage, seed)
        self.top_1, self.leaks = MeanMetric(), MeanMetric()

    def decode(self, latents: Tensor) -> Tensor:
        return self.stage.tokenizer.decode(latents)

    def draw(self, coarse: Tensor, condition: Any, index: Tensor, *, masked: bool) -> Tensor:
        """Let stage 2 draw all codes `(b, c, h, w)` of coarse maps."""
        fine = draw_fine(
            self.stage.network,
            coarse,
            condition=condition,
            allowed=self.split.allowed(coarse) if masked else None,
            sample_index=index,
            seed=self.seed,
            config=DrawConfig(),
        )
        return self.split.join(coarse, fine)

    def over(self, coarse: Tensor, condition: Any, index: Tensor) -> dict[str, Tensor]:
        """Decode coarse maps in every way."""
        decoded = {
            name: self.decode(stand_in(coarse, index)) for name, stand_in in self.stand_ins.items()
        }
        masked = self.stage.fine_mask != "none"
        codes = self.draw(coarse, condition, index, masked=masked)
        return decoded | {_FINE: self.stage.tokenizer.detokenize(codes[:, :, None])}

    def look(self, codes: Tensor, condition: Any, index: Tensor) -> None:
        """Note what stage 2 says of true codes."""
        coarse = self.split.coarse(codes)
        logits, targets = self.stage._predict(codes, condition, index)
        self.top_1.update(token_accuracy(logits, targets))
        if self.stage.fine_mask != "train+sample":
            free = self.draw(coarse, condition, index, masked=False)
            self.leaks.update(leak_rate(self.split, coarse, free))


@torch.no_grad()
def bench_fine(
    fine: Path,
    data: Path,
    *,
    out: Path,
    coarse: Path | None = None,
    draw: CoarseToFineConfig = CoarseToFineConfig(),  # noqa: B008  (frozen)
    num_samples: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    device: str = "auto",
) -> FineBench:
    """Decode the same coarse maps by stage 2 and by what needs no network, and compare.

    Of true coarse maps, those of held-out pictures: a perfect stage 1 could not do better than
    stage 2 does there. Of drawn ones (`--coarse RUN`): centroid, nearest and random members, and
    stage 2, all over the same maps.

    Args:
        fine: Checkpoint of a stage 2 (`LitFine`), or the run's folder.
        data: Folder of shards of pictures; a judge that lies beside it reads digits.
        out: New folder for table (`fine.json`) and sheet (`fine.png`).
        coarse: Checkpoint or run of the stage 1 with the same split.
        draw: How stage 1 draws (`--draw.coarse.guidance_scale`).
        num_samples: Held-out pictures, and as many drawn ones.
        batch_size: Pictures at a time.
        seed: Seed of all draws.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: If `out` exists, or a run is of another kind.
    """
    if out.exists():
        raise ValueError(f"`out` must be a new folder, '{out}' exists.")
    where = choose_device(device)
    stage = _stage_2(fine).to(where)
    pipeline = None if coarse is None else load_coarse_to_fine(coarse, fine).to(where)
    bench = _Bench(stage, pipeline, seed)
    bench.stage.tokenizer.to(where)
    judge = judge_beside(data)
    features = None if judge is None else DigitFeatures(str(judge))
    arms = _compare(bench, data, draw, features, (num_samples, batch_size))
    out.mkdir(parents=True)
    result = FineBench(
        arms=tuple(arm.result() for arm in arms),
        num_samples=arms[0].count,
        top_1=float(bench.top_1.compute()),
        leak_rate=None if stage.fine_mask == "train+sample" else float(bench.leaks.compute()),
        sheet=out / "fine.png",
    )
    rows = list(zip(*(arm.shown for arm in arms), strict=True))
    labels = [f"{arm.name}, {arm.maps}" for arm in arms] * len(rows)
    contact_sheet([p for row in rows for p in row], labels, columns=len(arms)).save(result.sheet)
    facts = asdict(result) | {
        "fine": str(fine),
        "coarse": None if coarse is None else str(coarse),
        "data": str(data),
        "draw": asdict(draw),
        "seed": seed,
        "hashes": {"fine": weights_hash(stage.network), "tokenizer": stage.tokenizer_hash},
    }
    write_json(out / "fine.json", facts | {"sheet": str(result.sheet)})
    return result


def _compare(
    bench: _Bench,
    data: Path,
    draw: CoarseToFineConfig,
    features: DigitFeatures | None,
    counts: tuple[int, int],
) -> list[_Arm]:
    num_samples, batch_size = counts
    stage, tokenizer = bench.stage, bench.stage.tokenizer
    size = ClipSize(1, *(side * tokenizer.config.spatial_stride for side in stage.grid_size))
    shards = ShardSet.open(data, "val")
    held_out = open_held_out(
        shards,
        split="val",
        size=size,
        fps=None,
        num_samples=min(num_samples, len(shards)),
        batch_size=batch_size,
    )
    arms: dict[tuple[str, Maps], _Arm] = {}

    def add(maps: Maps, decoded: dict[str, Tensor], batch: Batch) -> None:
        for name, pictures in decoded.items():
            arm = arms.setdefault((name, maps), _Arm(name, maps, features))
            arm.add(pictures, batch["clips"], batch.get("class_labels"))

    for batch in held_out:
        index = batch["sample_index"].to(stage.device)
        codes = stage.tokenize(batch["clips"].to(stage.device))
        condition = stage.condition(move_data_to_device(batch, stage.device))
        bench.look(codes, condition, index)
        decoded = {_BOUND: tokenizer.detokenize(codes[:, :, None])}
        decoded |= bench.over(bench.split.coarse(codes), condition, index)
        add("true", decoded, batch)
        if bench.pipeline is None:
            continue
        drawn = bench.pipeline.draw(condition, index, config=draw, seed=bench.seed)
        add("drawn", bench.over(drawn.coarse, condition, index), batch)
    return list(arms.values())
