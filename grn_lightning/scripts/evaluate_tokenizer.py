"""What a tokenizer loses: reconstruction, rounds, use of codes, and what a judge still reads."""

import torch
from torch import Tensor
from tqdm import tqdm

from grn_lightning.functional.hbq import hbq_decode, hbq_encode
from grn_lightning.media.images import to_uint8
from grn_lightning.metrics import CodeStatistics, FramePSNR, FrameSSIM
from grn_lightning.models.tokenizer import HBQTokenizer
from grn_lightning.scripts.heldout import HeldOut
from grn_lightning.scripts.judging import Judging
from grn_lightning.scripts.pictures import Gallery, shrink
from grn_lightning.scripts.records import Figure, Findings, Picture
from grn_lightning.scripts.runs import ClipSize

_NUM_SHOWN = 12  # triples on the sheet
_NUM_STRIPS = 2  # clips whose frames are laid out
_MAX_ROUNDS = 6  # the curve goes on beyond the rounds of the training
_SHORT_SIDE = 96  # pixels of what is shown
_GAP = 96  # gray between the parts of a triple: seen on black, and no glare on a dark page


class _Scores:
    """PSNR of every way to decode the same latents, SSIM, and use of the codes."""

    def __init__(self, tokenizer: HBQTokenizer, device: torch.device):
        config = tokenizer.config
        self.num_rounds = config.num_rounds
        self.rounds = range(1, max(_MAX_ROUNDS, config.num_rounds) + 1)
        self.by_rounds = {m: FramePSNR().to(device) for m in self.rounds}
        self.unquantized, self.ssim = FramePSNR().to(device), FrameSSIM().to(device)
        self.codes = CodeStatistics(
            num_channels=config.latent_channels, num_rounds=config.num_rounds
        ).to(device)

    def update(self, tokenizer: HBQTokenizer, clips: Tensor) -> Tensor:
        """Add clips; returns their reconstruction, clamped to [-1, 1]."""
        z = tokenizer.encode(clips)
        self.codes.update(tokenizer.quantize(z))
        self.unquantized.update(tokenizer.decode(z).float(), clips)
        reconstruction = clips
        for m, psnr in self.by_rounds.items():
            z_hat = hbq_decode(hbq_encode(z, num_rounds=m), num_rounds=m)
            decoded = tokenizer.decode(z_hat.to(z.dtype)).float()
            psnr.update(decoded, clips)
            reconstruction = decoded if m == self.num_rounds else reconstruction
        self.ssim.update(reconstruction, clips)
        return reconstruction.clamp(-1, 1)

    def curve(self, count: str, split: str) -> list[Figure]:
        """PSNR over the number of rounds."""
        return [
            Figure("PSNR", (f"M={m}", count, split), float(psnr.compute()), "dB")
            for m, psnr in self.by_rounds.items()
        ]

    def figures(self, count: str, split: str) -> list[Figure]:
        """All but the curve."""
        at, report, levels = (count, split), self.codes.compute(), 2**self.num_rounds
        psnr, m = float(self.by_rounds[self.num_rounds].compute()), self.num_rounds
        return [
            Figure("PSNR", at, psnr, "dB", f"of reconstructions from {m} rounds, mean over frames"),
            Figure(
                "SSIM", at, float(self.ssim.compute()), "", "structural similarity; 1 is identical"
            ),
            Figure(
                "PSNR",
                ("unquantized", *at),
                float(self.unquantized.compute()),
                "dB",
                "of decoding the latents as they are; the rest is lost by the autoencoder",
            ),
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
            Figure(
                "bit entropy",
                at,
                float(report.entropy.mean()),
                meaning="mean over rounds and channels; 1 is a bit per bit",
            ),
        ]


def _rate(tokenizer: HBQTokenizer, size: ClipSize) -> Figure:
    """Bits of the codes per pixel of every frame."""
    d, f, h, w = tokenizer.config.latent_shape(*size)
    num_bits = tokenizer.config.num_rounds * d * f * h * w
    num_pixels = size.num_frames * size.height * size.width
    return Figure(
        "bits/pixel",
        (f"M={tokenizer.config.num_rounds}", f"d={d}", str(size).replace(" ", "")),
        num_bits / num_pixels,
        meaning=f"codes of {f} x {h} x {w} positions; 24 bits without compression",
    )


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
            parts = torch.stack([*pair, (pair[1] - pair[0]) / 2])
            frames = to_uint8(parts.cpu()).transpose(1, 2)  # (3, f, 3, h, w)
            self.triples.append(shrink(frames, short_side=_SHORT_SIDE))
            self.labels.append(f"{float(psnr.compute()):.1f} dB")

    def write(self, gallery: Gallery) -> list[Picture]:
        """Write one file per sample, a sheet, and for clips a strip."""
        gap = self.triples[0].new_full((*self.triples[0].shape[1:-1], 2), _GAP)
        wide = [torch.cat([a, gap, b, gap, c], dim=-1) for a, b, c in self.triples]
        gallery.add_samples(wide, self.labels)
        gallery.add_sheet("reconstructions", wide, self.labels, columns=3)
        rows = [clip for triple in self.triples[:_NUM_STRIPS] for clip in triple]
        labels = ["original", "reconstruction", "difference"] * (len(rows) // 3)
        gallery.add_strip("reconstructions", rows, labels)
        return gallery.pictures


@torch.no_grad()
def evaluate_tokenizer(
    tokenizer: HBQTokenizer,
    held_out: HeldOut,
    judging: Judging,
    *,
    size: ClipSize,
    gallery: Gallery,
) -> Findings:
    """Reconstruct held-out samples and judge the result.

    Args:
        tokenizer: On its device, in evaluation mode.
        held_out: The samples.
        judging: Adds up what the judges say.
        size: Size of the samples.
        gallery: Takes the pictures.
    """
    device = next(tokenizer.parameters()).device
    scores, shown = _Scores(tokenizer, device), _Shown()
    with tqdm(total=held_out.num_samples, desc="reconstruct", unit="sample") as bar:
        for batch in held_out:
            clips = batch["clips"].to(device)
            reconstruction = scores.update(tokenizer, clips)
            judging.add("real", clips, batch)
            judging.add("reconstructions", reconstruction, batch)
            shown.add(clips, reconstruction)
            bar.update(len(clips))
    count, split = str(judging.count), held_out.split
    return Findings(
        figures=[
            *scores.figures(count, split),
            _rate(tokenizer, size),
            *judging.figures("reconstructions", split=split),
            *judging.figures("real", split=split),
        ],
        pictures=shown.write(gallery),
        by_rounds=scores.curve(count, split),
        codes={name: float(v) for name, v in scores.codes.compute().scalars().items()},
    )
