"""`grn reconstruct`: pictures and videos of any size through a tokenizer and back."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from grn_lightning.datasets.files import write_json
from grn_lightning.datasets.sources import VIDEO_SUFFIXES
from grn_lightning.lit.tokenizer import load_tokenizer
from grn_lightning.media.images import decode_image, encode_png, to_float
from grn_lightning.media.video import probe_video, stream_video, write_mp4
from grn_lightning.metrics import FramePSNR
from grn_lightning.models.hashes import weights_hash
from grn_lightning.models.tokenizers import Tokenizer
from grn_lightning.pipelines.reconstruction import Reconstruction, cut_chunks, plan_tiles
from grn_lightning.scripts.evaluate_tokenizer import AMPLIFICATION
from grn_lightning.scripts.pictures import new_folder
from grn_lightning.scripts.records import command_line, environment, now
from grn_lightning.scripts.runs import choose_device

_FOLDER = Path("runs", "reconstructions")
_GAP = 4  # columns of gray between the parts of a comparison
_GRAY = 128


@dataclass(frozen=True)
class ReconstructConfig:
    """How files are put through the tokenizer."""

    side_by_side: bool = False
    """Write original, reconstruction and amplified difference side by side."""
    rounds: int | None = None
    """Decode so many binary rounds; by default those of the training."""
    tile: int | None = None
    """Cut frames into tiles of this side in pixels, for little memory; by default they stay whole.
    Tiles leave faint seams, and their overlaps cost bits."""
    overlap: int | None = None
    """Pixels that tiles share; by default twice the tokenizer's stride."""
    chunk_size: int = 4
    """Latent frames of a video in memory at a time; it does not change the result."""
    lossless: bool = False
    """Write videos without any further loss (H.264 in RGB, which browsers do not play); pictures
    are PNG and lossless always."""
    device: str = "auto"
    """"auto", "cpu" or "cuda"."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.chunk_size < 1:
            raise ValueError(f"`chunk_size` must be at least 1, got {self.chunk_size}.")


@dataclass(frozen=True)
class ReconstructedFile:
    """What became of one file."""

    source: str
    """The file that was given."""
    out: str
    """The file that was written."""
    num_frames: int
    """Frames; 1 for a picture."""
    size: str
    """Height and width, with padding and tiles."""
    psnr: float
    """Mean over frames in dB, of 8-bit frames before a video is compressed for writing."""
    psnr_min: float
    """Of the worst frame."""
    num_bits: float
    """Bits of all codes, padding and overlaps included."""
    bits_per_pixel: float
    """Of these per pixel of the original."""
    seconds: float
    """Time taken, reading and writing included."""

    def __str__(self) -> str:
        """Tell it in two lines."""
        return (
            f"{self.source}: {self.num_frames} x {self.size}\n"
            f"  PSNR {self.psnr:.2f} dB (worst frame {self.psnr_min:.2f}) at "
            f"{self.bits_per_pixel:.4f} bits per pixel ({self.num_bits / 8e3:.1f} kB) -> {self.out}"
        )


@dataclass(frozen=True)
class ReconstructReport:
    """What was reconstructed, and by what."""

    tokenizer: str
    """Where the tokenizer lies, with the hash of its weights."""
    files: tuple[ReconstructedFile, ...]
    """One after the other."""
    folder: Path
    """Where everything was written."""

    def __str__(self) -> str:
        """Tell it to a person."""
        lines = [f"tokenizer {self.tokenizer}", *map(str, self.files)]
        return "\n".join([*lines, f"all facts in '{self.folder / 'reconstruct.json'}'"])


class _Job:
    """One file on its way through the tokenizer."""

    def __init__(self, source: Path, tokenizer: Tokenizer, config: ReconstructConfig):
        self.source, self.config = source, config
        self.is_video = source.suffix.lower() in VIDEO_SUFFIXES
        if self.is_video:
            info = probe_video(source)
            self.num_frames, self.fps, size = info.num_frames, info.fps, (info.height, info.width)
        else:
            self.picture = decode_image(source.read_bytes(), source=str(source))
            _, height, width = self.picture.shape
            self.num_frames, self.fps, size = 1, 1.0, (height, width)
        stride = tokenizer.config.spatial_stride
        self.plan = plan_tiles(*size, stride=stride, tile=config.tile, overlap=config.overlap)
        self.temporal_stride = tokenizer.config.temporal_stride
        self.through = Reconstruction(tokenizer, self.plan, num_rounds=config.rounds)
        self.psnr: list[float] = []

    def _frames(self) -> Iterator[Tensor]:
        return stream_video(self.source) if self.is_video else iter([self.picture])

    def chunks(self, bar: "tqdm[Any]") -> Iterator[Tensor]:
        """Yield what is to be written, uint8 `(f, 3, h, w)`."""
        size = self.config.chunk_size
        for frames in cut_chunks(self._frames(), stride=self.temporal_stride, chunk_size=size):
            rebuilt = self.through(frames)
            for pair in zip(rebuilt, frames, strict=True):
                metric = FramePSNR()
                metric.update(*(to_float(one)[None, :, None] for one in pair))
                self.psnr.append(float(metric.compute()))
            bar.update(len(frames))
            yield side_by_side(frames, rebuilt) if self.config.side_by_side else rebuilt

    def run(self, folder: Path, number: int) -> ReconstructedFile:
        """Write the result and tell about it."""
        start = time.perf_counter()
        suffix = ".mp4" if self.is_video else ".png"
        out = folder / f"{number:02d}-{self.source.stem}{suffix}"
        with tqdm(total=self.num_frames, desc=self.source.name, unit="frame") as bar:
            if self.is_video:
                write_mp4(out, self.chunks(bar), fps=self.fps, lossless=self.config.lossless)
            else:
                [picture] = next(self.chunks(bar))
                out.write_bytes(encode_png(picture))
        num_pixels = len(self.psnr) * self.plan.height * self.plan.width
        return ReconstructedFile(
            source=str(self.source),
            out=str(out),
            num_frames=len(self.psnr),
            size=str(self.plan),
            psnr=sum(self.psnr) / len(self.psnr),
            psnr_min=min(self.psnr),
            num_bits=self.through.num_bits,
            bits_per_pixel=self.through.num_bits / num_pixels,
            seconds=time.perf_counter() - start,
        )


def side_by_side(frames: Tensor, rebuilt: Tensor) -> Tensor:
    """Lay original, reconstruction and amplified difference side by side.

    Args:
        frames: uint8 `(f, 3, h, w)`.
        rebuilt: Likewise.

    Returns:
        uint8 `(f, 3, h, 3 w + gaps)`; a level of error is `AMPLIFICATION` levels of brightness.
    """
    error = AMPLIFICATION * (rebuilt.int() - frames.int())
    difference = (_GRAY + error).clamp(0, 255).to(torch.uint8)
    gap = frames.new_full((*frames.shape[:-1], _GAP), _GRAY)
    return torch.cat([frames, gap, rebuilt, gap, difference], dim=-1)


def reconstruct(
    files: list[Path],
    *,
    tokenizer: Path | None = None,
    out: Path | None = None,
    config: ReconstructConfig = ReconstructConfig(),
) -> ReconstructReport:
    """Put pictures and videos through a tokenizer and back, at their own size and length.

    Sides are padded to what the tokenizer takes, and cut back; long videos are streamed. Numbers
    and sizes go to `reconstruct.json` beside the results. Videos lose their sound.

    Args:
        files: Pictures and videos.
        tokenizer: Run, checkpoint or export of the tokenizer.
        out: Folder to write to, new or empty; by default the next free one in
            runs/reconstructions.
        config: How.

    Returns:
        What was measured; `str` tells it to a person.

    Raises:
        ValueError: If a file cannot be read, or files and options do not fit the tokenizer.
    """
    given = dict(locals())
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"there is no file {', '.join(missing)}.")
    if tokenizer is None:
        raise ValueError("`--tokenizer` (a run, checkpoint or export) must be given.")
    if out is not None and out.exists() and any(out.iterdir()):
        raise ValueError(f"`out` must be a new or an empty folder, but '{out}' holds files.")
    device = choose_device(config.device)
    network = load_tokenizer(tokenizer).to(device)
    jobs = [_Job(file, network, config) for file in files]  # refuses before anything is written
    if out is None:
        folder = new_folder(_FOLDER)
    else:
        folder = out
        folder.mkdir(parents=True, exist_ok=True)
    done = [job.run(folder, number) for number, job in enumerate(jobs)]
    facts = {
        "command": command_line(reconstruct, given),
        "tokenizer": str(tokenizer),
        "tokenizer_hash": weights_hash(network),
        "config": asdict(config),
        "date": now(),
        "environment": environment(device),
        "files": [asdict(file) for file in done],
    }
    write_json(folder / "reconstruct.json", facts)
    return ReconstructReport(f"'{tokenizer}' {facts['tokenizer_hash']}", tuple(done), folder)
