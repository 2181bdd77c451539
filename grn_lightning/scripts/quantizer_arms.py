"""One arm of `grn bench quantizers`: train with a quantizer, judge, keep a record."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from tqdm import tqdm

from grn_lightning.datasets.manifest import write_json
from grn_lightning.datasets.shards import ShardSet
from grn_lightning.lit.callbacks import DigitFeatures
from grn_lightning.lit.data import LoaderConfig, ShardData, ShardSource
from grn_lightning.lit.tokenizer import LitTokenizer
from grn_lightning.metrics import (
    CodeAlarms,
    CodeStatistics,
    FramePSNR,
    FrameSSIM,
    FrechetDistance,
)
from grn_lightning.models.pretrained import is_export, write_pretrained
from grn_lightning.models.tokenizer import HBQTokenizer
from grn_lightning.scripts.bench_parts import RESULT_FILE, BriefTraining
from grn_lightning.scripts.heldout import media_of, open_held_out
from grn_lightning.scripts.judging import judge_beside
from grn_lightning.scripts.quantizer_records import (
    Arm,
    ArmResult,
    QuantizerBenchConfig,
    shared_facts,
)
from grn_lightning.scripts.runs import ClipSize, choose_device

EXPORT = "tokenizer"
"""Name of an arm's weights in its folder."""

_MAX_ROUNDS = 8  # the curve over decoded rounds goes on beyond those of the training


def train_arm(
    config: QuantizerBenchConfig, data: Path, arm: Arm, *, folder: Path, bar: tqdm
) -> tuple[HBQTokenizer, float]:
    """Train from random weights through the real trainer.

    Args:
        config: Sizes, optimizer, steps.
        data: Folder of shards with a split "train".
        arm: What is trained.
        folder: Takes the events.
        bar: Is moved by every update.

    Returns:
        The tokenizer with averaged weights, and the median time of an update in milliseconds.
    """
    L.seed_everything(arm.seed, verbose=False)
    media = media_of(ShardSet.open(data, "train"))
    source = ShardSource(
        path=str(data),
        media=media,
        num_frames=config.num_frames,
        random_window=media == "video",
        batch_size=config.batch_size,
    )
    module = LitTokenizer(
        config.tokenizer_of(arm), loss=config.loss, optim=config.optim, seed=arm.seed
    )
    data_module = ShardData(
        [source],
        image_size=config.image_size,
        seed=arm.seed,
        loader=LoaderConfig(cache_decoded=True),
    )
    training = BriefTraining(
        folder=folder,
        max_steps=config.max_steps,
        ema_decay=config.ema_decay,
        device=config.device,
    )
    pace = training.fit(module, data_module, bar)
    tokenizer = module.tokenizer.eval().requires_grad_(False)
    assert isinstance(tokenizer, HBQTokenizer), "arms differ in their quantizer only"
    return tokenizer, pace.milliseconds


class _Scores:
    """What held-out samples say about one tokenizer."""

    def __init__(self, tokenizer: HBQTokenizer, judge: Path | None, device: torch.device):
        config = tokenizer.config
        self.tokenizer = tokenizer
        self.psnr, self.ssim = FramePSNR().to(device), FrameSSIM().to(device)
        ways = [f"{m}" for m in range(1, _MAX_ROUNDS + 1)] if config.has_rounds else []
        self.by_rounds = {way: FramePSNR().to(device) for way in [*ways, "unquantized"]}
        self.fid = None
        if judge is not None:
            self.fid = FrechetDistance(DigitFeatures(str(judge))).to(device)
        self.codes = None
        if config.has_codes:
            self.codes = CodeStatistics(
                num_channels=config.code_channels,
                num_rounds=config.code_sizes.num_rounds,
                alphabet_size=config.alphabet_size,
            ).to(device)

    @torch.no_grad()
    def update(self, clips: Tensor) -> None:
        """Add held-out clips."""
        tokenizer = self.tokenizer
        z = tokenizer.encode(clips)
        z_hat = z
        if self.codes is not None:
            codes = tokenizer.quantize(z)
            self.codes.update(codes)
            z_hat = tokenizer.dequantize(codes)
        reconstruction = tokenizer.decode(z_hat).float()
        self.psnr.update(reconstruction, clips)
        self.ssim.update(reconstruction, clips)
        for way, psnr in self.by_rounds.items():
            seen = z if way == "unquantized" else tokenizer.quantize_rounds(z, num_rounds=int(way))
            psnr.update(tokenizer.decode(seen).float(), clips)
        if self.fid is not None:
            self.fid.update(clips, real=True)
            self.fid.update(reconstruction.clamp(-1, 1), real=False)

    def figures(self) -> dict[str, Any]:
        """Return the fields of an `ArmResult` that were judged."""
        report = None if self.codes is None else self.codes.compute()
        return {
            "psnr": float(self.psnr.compute()),
            "ssim": float(self.ssim.compute()),
            "fid": None if self.fid is None else float(self.fid.compute()),
            "psnr_by_rounds": {k: float(psnr.compute()) for k, psnr in self.by_rounds.items()},
            "usage": None if report is None else float(report.usage.mean()),
            "entropy": None if report is None else float(report.channel_entropy.mean()),
            "alarms": [] if report is None else CodeAlarms().sentences(report),
        }


def judge_arm(
    tokenizer: HBQTokenizer, config: QuantizerBenchConfig, data: Path
) -> tuple[dict[str, Any], int]:
    """Reconstruct held-out samples; return the judged fields of an `ArmResult`, and how many."""
    device, shards = choose_device(config.device), ShardSet.open(data, "val")
    held_out = open_held_out(
        shards,
        split="val",
        size=ClipSize(config.num_frames, config.image_size, config.image_size),
        fps=None,
        num_samples=min(config.num_judged, len(shards)),
        batch_size=config.batch_size,
    )
    scores = _Scores(tokenizer.to(device), config.judge or judge_beside(data), device)
    for batch in held_out:
        scores.update(batch["clips"].to(device))
    return scores.figures(), held_out.num_samples


def run_arm(
    config: QuantizerBenchConfig, data: Path, arm: Arm, *, output: Path, bar: tqdm
) -> ArmResult:
    """Train and judge an arm; its record says that it is done, an export keeps the weights."""
    folder = arm.folder(output)
    tokenizer, milliseconds = train_arm(config, data, arm, folder=folder, bar=bar)
    figures, num_judged = judge_arm(tokenizer, config, data)
    sizes = tokenizer.config.code_sizes
    _, *grid = tokenizer.config.latent_shape(
        config.num_frames, config.image_size, config.image_size
    )
    num_pixels = config.num_frames * config.image_size**2
    result = ArmResult(
        arm=arm.name,
        num_rounds=arm.num_rounds,
        seed=arm.seed,
        latent_width=sizes.latent_width,
        code_channels=sizes.code_channels,
        alphabet_size=sizes.alphabet_size,
        bits_per_pixel=sizes.num_bits * math.prod(grid) / num_pixels
        if sizes.code_channels
        else None,
        step_milliseconds=milliseconds,
        num_parameters=sum(t.numel() for t in tokenizer.state_dict().values()),
        num_judged=num_judged,
        quantizer=asdict(config.quantizer(arm.name)),
        shared=shared_facts(config, data),
        **figures,
    )
    write_json(folder / RESULT_FILE, asdict(result))
    if not is_export(folder / EXPORT):
        info = {"kind": "tokenizer", "config": {"tokenizer": asdict(tokenizer.config)}}
        write_pretrained(folder / EXPORT, {"tokenizer": tokenizer}, info)
    return result
