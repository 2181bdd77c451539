"""What a tokenizer loses: reconstruction over bits, use of codes, and what a judge still reads."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from tqdm import tqdm

from grn_lightning.media.images import to_uint8
from grn_lightning.metrics import CodeStatistics, FramePSNR, FrameSSIM
from grn_lightning.metrics.protocols import short_count
from grn_lightning.metrics.reconstruction import FrameMean
from grn_lightning.models.tokenizer import HBQTokenizer
from grn_lightning.models.tokenizers import Tokenizer
from grn_lightning.nn.perceptual import LPIPS, find_vgg_weights
from grn_lightning.scripts.heldout import HeldOut
from grn_lightning.scripts.judging import Judging
from grn_lightning.scripts.pictures import Gallery, shrink
from grn_lightning.scripts.records import Figure, Findings, Picture
from grn_lightning.scripts.runs import ClipSize

AMPLIFICATION = 4
"""A level of error is so many levels of brightness in pictures of differences; gray is no error."""

_NUM_SHOWN = 12  # triples on the sheet
_NUM_STRIPS = 2  # clips whose frames are laid out
_MAX_ROUNDS = 8  # the curve goes on beyond the rounds of the training
_SHORT_SIDE = 96  # pixels of what is shown
_GAP = 96  # gray between the parts of a triple: seen on black, and no glare on a dark page
_MIN_LPIPS = 16  # pixels; VGG halves them four times
_UNQUANTIZED = 0  # in place of a number of rounds


class FrameLPIPS(FrameMean):
    """LPIPS (VGG) of every frame, averaged; 0 is identical.

    Args:
        network: With its weights.
    """

    higher_is_better = False

    def __init__(self, network: LPIPS) -> None:
        super().__init__()
        self.network = network

    def score(self, reconstruction: Tensor, frames: Tensor) -> Tensor:
        """Return `(n,)` distances, at least 0."""
        return self.network(reconstruction, frames)


@dataclass(frozen=True)
class RoundScores:
    """How well one model decodes a number of rounds."""

    rounds: int
    """Rounds; those of the training are the tokenizer itself."""
    bits_per_pixel: float
    """Of the codes with so many rounds; infinite without quantization."""
    scores: dict[str, float]
    """Mean over frames, by metric."""


def find_lpips(path: Path | None) -> tuple[LPIPS | None, str]:
    """Return LPIPS, or why it is left out.

    Raises:
        ValueError: If a file was asked for that is not there, or not right.
    """
    if path is not None:
        return LPIPS.load(path), ""
    try:
        find_vgg_weights()
    except ValueError:
        return None, "LPIPS: no weights of VGG-16 in torchvision's folder; give `--vgg FILE`"
    return LPIPS.load(), ""


class _Scores:
    """Scores of every way to decode the same latents, and use of the codes.

    Args:
        tokenizer: On its device.
        size: Size of the clips.
        lpips: None leaves that distance out.
    """

    def __init__(self, tokenizer: Tokenizer, size: ClipSize, lpips: LPIPS | None):
        config = tokenizer.config
        self.device = next(tokenizer.parameters()).device
        # A codebook has no rounds; it counts as one.
        self.own = max(1, config.num_rounds) if config.has_codes else _UNQUANTIZED
        many = range(1, max(_MAX_ROUNDS, config.num_rounds) + 1)
        rounds = [*many, _UNQUANTIZED] if config.has_rounds else [self.own, _UNQUANTIZED]
        self.metrics = {m: self._metrics(lpips) for m in dict.fromkeys(rounds)}
        positions, pixels = math.prod(config.latent_shape(*size)[1:]), math.prod(size)
        self.bits = {m: m * config.latent_channels * positions / pixels for m in self.metrics}
        if not config.has_rounds:
            self.bits[self.own] = config.bits_per_position * positions / pixels
        self.bits[_UNQUANTIZED] = math.inf
        self.codes: CodeStatistics | None = None
        if config.has_codes:
            self.codes = CodeStatistics(
                num_channels=config.code_channels,
                num_rounds=config.code_sizes.num_rounds,
                alphabet_size=config.alphabet_size,
            ).to(self.device)

    def _metrics(self, lpips: LPIPS | None) -> dict[str, Metric]:
        metrics: dict[str, Metric] = {"PSNR": FramePSNR(), "SSIM": FrameSSIM()}
        if lpips is not None:
            metrics["LPIPS"] = FrameLPIPS(lpips)
        return {name: metric.to(self.device) for name, metric in metrics.items()}

    def _decode(self, tokenizer: Tokenizer, z: Tensor, rounds: int) -> Tensor:
        if rounds == _UNQUANTIZED:
            z_hat = z
        elif rounds == self.own:
            z_hat = tokenizer.dequantize(tokenizer.quantize(z)).to(z.dtype)
        else:
            assert isinstance(tokenizer, HBQTokenizer), "codebooks have no rounds"
            z_hat = tokenizer.quantize_rounds(z, num_rounds=rounds)
        return tokenizer.decode(z_hat).float()

    def update(self, tokenizer: Tokenizer, clips: Tensor) -> Tensor:
        """Add clips; returns their reconstruction, clamped to [-1, 1]."""
        z = tokenizer.encode(clips)
        if self.codes is not None:
            self.codes.update(tokenizer.quantize(z))
        reconstruction = clips
        for rounds, metrics in self.metrics.items():
            decoded = self._decode(tokenizer, z, rounds)
            for metric in metrics.values():
                metric.update(decoded, clips)
            reconstruction = decoded if rounds == self.own else reconstruction
        return reconstruction.clamp(-1, 1)

    def table(self) -> list[RoundScores]:
        """Scores over rounds, the unquantized ones last."""
        return [
            RoundScores(
                rounds, self.bits[rounds], {name: float(m.compute()) for name, m in metrics.items()}
            )
            for rounds, metrics in self.metrics.items()
        ]

    def curve(self, count: str, split: str) -> list[Figure]:
        """PSNR over the number of rounds."""
        return [
            Figure("PSNR", (f"M={row.rounds}", count, split), row.scores["PSNR"], "dB")
            for row in self.table()
            if row.rounds != _UNQUANTIZED
        ]

    def figures(self, count: str, split: str) -> list[Figure]:
        """All but the curve."""
        own = {name: float(metric.compute()) for name, metric in self.metrics[self.own].items()}
        unquantized = float(self.metrics[_UNQUANTIZED]["PSNR"].compute())
        at = (count, split)
        rate = f"at {self.bits[self.own]:.4f} bits per pixel, mean over frames"
        if self.own == _UNQUANTIZED:
            rate = "without quantization, mean over frames"
        figures = [
            Figure("PSNR", at, own["PSNR"], "dB", f"of reconstructions {rate}"),
            Figure("SSIM", at, own["SSIM"], "", f"structural similarity {rate}; 1 is identical"),
        ]
        if "LPIPS" in own:
            meaning = f"perceptual distance {rate}; 0 is identical"
            figures.append(Figure("LPIPS", ("vgg", *at), own["LPIPS"], "", meaning))
        meaning = "of decoding the latents as they are; the rest is lost by the autoencoder"
        figures.append(Figure("PSNR", ("unquantized", *at), unquantized, "dB", meaning))
        return figures + self._use_of_codes(at)

    def _use_of_codes(self, at: tuple[str, ...]) -> list[Figure]:
        if self.codes is None:
            return []
        report = self.codes.compute()
        levels = report.histogram.shape[-1]
        figures = [
            Figure(
                "code usage",
                at,
                float(report.usage.mean()),
                "%",
                f"share of the {levels} codes that a channel takes, mean over channels",
            ),
            Figure(
                "code perplexity",
                at,
                float(report.perplexity.mean()),
                meaning=f"codes of {levels} used as if equally often, mean over channels",
            ),
        ]
        if report.entropy.numel():
            meaning = "mean over rounds and channels; 1 is a bit per bit"
            figures.append(Figure("bit entropy", at, float(report.entropy.mean()), meaning=meaning))
        return figures


def _rate(tokenizer: Tokenizer, size: ClipSize, bits_per_pixel: float) -> list[Figure]:
    """Bits of the codes per pixel of every frame; nothing without codes."""
    config = tokenizer.config
    if not config.has_codes:
        return []
    _, f, h, w = config.latent_shape(*size)
    kind = (f"M={config.num_rounds}", f"d={config.latent_channels}")
    if not config.has_rounds:
        kind = (config.quantizer.name, f"c={config.code_channels}")
    meaning = f"codes of {f} x {h} x {w} positions; 24 bits without compression"
    protocol = (*kind, str(size).replace(" ", ""))
    return [Figure("bits/pixel", protocol, bits_per_pixel, meaning=meaning)]


def _plot(rows: Sequence[RoundScores], own: int, file: Path, *, title: str) -> None:
    """Draw every score over bits per pixel, with the unquantized one as a line."""
    from matplotlib.figure import Figure as Canvas  # slow to import

    names, coded = list(rows[0].scores), [row for row in rows if row.rounds]
    canvas = Canvas(figsize=(4 * len(names), 3.2), layout="constrained")
    for axes, name in zip(canvas.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        x, y = [r.bits_per_pixel for r in coded], [r.scores[name] for r in coded]
        axes.plot(x, y, "o-", color="tab:blue")
        for row in coded:
            weight = "bold" if row.rounds == own else "normal"
            place = (row.bits_per_pixel, row.scores[name])
            axes.annotate(
                f"M={row.rounds}",
                place,
                (3, -11),
                textcoords="offset points",
                weight=weight,
                fontsize=8,
            )
        bare = [row.scores[name] for row in rows if not row.rounds]
        if bare:
            axes.axhline(bare[0], color="gray", linestyle="--", linewidth=1, label="unquantized")
            axes.legend(loc="best", fontsize=8)
        axes.margins(0.12)
        axes.set(xlabel="bits per pixel", title=f"{name} (dB)" if name == "PSNR" else name)
    canvas.suptitle(title, fontsize=9)
    canvas.savefig(file, dpi=120)


class _Shown:
    """The first held-out samples, each beside its reconstruction and their difference."""

    def __init__(self) -> None:
        self.triples: list[Tensor] = []
        self.labels: list[str] = []

    def add(self, clips: Tensor, reconstruction: Tensor) -> None:
        """Keep what there is still room for."""
        room = _NUM_SHOWN - len(self.triples)
        for pair in zip(clips[:room], reconstruction[:room], strict=True):
            psnr = FramePSNR().to(clips.device)
            psnr.update(pair[1][None], pair[0][None])
            parts = torch.stack([*pair, (pair[1] - pair[0]) * AMPLIFICATION])
            frames = to_uint8(parts.cpu()).transpose(1, 2)  # (3, f, 3, h, w)
            self.triples.append(shrink(frames, short_side=_SHORT_SIDE))
            self.labels.append(f"{float(psnr.compute()):.1f} dB")

    def write(self, gallery: Gallery) -> list[Picture]:
        """Write one file per sample, a sheet, and for clips a strip."""
        gap = self.triples[0].new_full((*self.triples[0].shape[1:-1], 2), _GAP)
        wide = [torch.cat([a, gap, b, gap, c], dim=-1) for a, b, c in self.triples]
        gallery.add_samples(wide, self.labels)
        told = [f"{label}; difference x{AMPLIFICATION}" for label in self.labels]
        gallery.add_sheet("reconstructions", wide, told, columns=3)
        rows = [clip for triple in self.triples[:_NUM_STRIPS] for clip in triple]
        names = ["original", "reconstruction", f"difference x{AMPLIFICATION}, gray is none"]
        labels = names * (len(rows) // 3)
        gallery.add_strip("reconstructions", rows, labels)
        return gallery.pictures


@torch.no_grad()
def evaluate_tokenizer(
    tokenizer: Tokenizer,
    held_out: HeldOut,
    judging: Judging,
    *,
    size: ClipSize,
    gallery: Gallery,
    vgg: Path | None = None,
) -> Findings:
    """Reconstruct held-out samples and judge the result.

    Args:
        tokenizer: On its device, in evaluation mode.
        held_out: The samples.
        judging: Adds up what the judges say.
        size: Size of the samples.
        gallery: Takes the pictures.
        vgg: File of the weights for LPIPS; None takes torchvision's folder, if they are there.
    """
    device = next(tokenizer.parameters()).device
    lpips, missing = find_lpips(vgg)
    if lpips is not None and min(size.height, size.width) < _MIN_LPIPS:
        lpips, missing = None, f"LPIPS: pictures must have at least {_MIN_LPIPS} pixels a side"
    scores, shown = _Scores(tokenizer, size, lpips), _Shown()
    with tqdm(total=held_out.num_samples, desc="reconstruct", unit="sample") as bar:
        for batch in held_out:
            clips = batch["clips"].to(device)
            reconstruction = scores.update(tokenizer, clips)
            judging.add("real", clips, batch)
            judging.add("reconstructions", reconstruction, batch)
            shown.add(clips, reconstruction)
            bar.update(len(clips))
    count, split, table = short_count(judging.count), held_out.split, scores.table()
    pictures = [_add_plot(gallery, table, scores.own, f"{count} samples of {split}, {size}")]
    return Findings(
        figures=[
            *scores.figures(count, split),
            *_rate(tokenizer, size, scores.bits[scores.own]),
            *judging.figures("reconstructions", split=split),
            *judging.figures("real", split=split),
        ],
        pictures=[*shown.write(gallery), *pictures],
        by_rounds=scores.curve(count, split),
        codes=_as_plain(scores.codes),
        rounds=[asdict(row) for row in table],
        left_out=[text for text in (missing, *judging.left_out) if text],
    )


def _as_plain(codes: CodeStatistics | None) -> dict[str, Any]:
    if codes is None:
        return {}
    return {name: float(value) for name, value in codes.compute().scalars().items()}


def _add_plot(gallery: Gallery, table: Sequence[RoundScores], own: int, title: str) -> Picture:
    file = gallery.folder / "rounds.png"
    _plot(table, own, file, title=title)
    return Picture(str(file.relative_to(gallery.root)), "sheet", "scores over bits per pixel")
