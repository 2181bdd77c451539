"""Sheets for TensorBoard: reconstructions of the first validation batch, samples of fixed seeds."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from grn_lightning.lit.base import require_stage
from grn_lightning.lit.callbacks.tensorboard import log_film, log_picture
from grn_lightning.lit.generator import LitGenerator
from grn_lightning.lit.tokenizer import LitTokenizer
from grn_lightning.media.images import to_uint8
from grn_lightning.media.sheets import clip_sheet, contact_sheet, film_strip
from grn_lightning.metrics.reconstruction import FramePSNR
from grn_lightning.models.tokenizer import HBQTokenizer
from grn_lightning.samplers import RefineConfig


class ReconstructionSheet(L.Callback):
    """Original, reconstruction and difference of held-out samples, and PSNR by rounds decoded.

    Args:
        num_samples: Samples on the sheet, from the first validation batch of each source.
        max_rounds: Draw the curve of PSNR over 1 .. `max_rounds` rounds.
    """

    def __init__(self, num_samples: int = 6, max_rounds: int = 6):
        self.num_samples = num_samples
        self.max_rounds = max_rounds
        self._clips: dict[int, Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a run of another stage."""
        require_stage(self, pl_module, LitTokenizer)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first samples of every size."""
        self._clips.setdefault(batch["clips"].shape[2], batch["clips"][: self.num_samples])

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the sheets; the averaged weights are in place."""
        assert isinstance(pl_module, LitTokenizer)
        for num_frames, clips in sorted(self._clips.items()):
            shown = pl_module(clips).reconstruction.float().clamp(-1, 1)
            parts = {"original": clips, "reconstruction": shown, "difference": (shown - clips) / 2}
            rows = torch.stack([to_uint8(part.cpu()) for part in parts.values()], dim=1)
            labels = [name for _ in clips for name in parts]
            cells = rows.flatten(0, 1).transpose(1, 2)  # (n * 3, f, 3, h, w)
            if num_frames == 1:
                log_picture(trainer, "images", contact_sheet(cells[:, 0], labels, columns=6))
            else:
                log_picture(trainer, "clips", film_strip(cells, labels))
        if isinstance(pl_module.tokenizer, HBQTokenizer) and pl_module.tokenizer.config.has_rounds:
            psnr_of_rounds(pl_module, self._clips[max(self._clips)], self.max_rounds)
        self._clips.clear()


def psnr_of_rounds(module: LitTokenizer, clips: Tensor, max_rounds: int) -> None:
    """Log the PSNR of decoding 1 .. `max_rounds` rounds of the same latents, and all of them."""
    tokenizer = module.tokenizer
    assert isinstance(tokenizer, HBQTokenizer), "codebooks have no rounds"
    z = tokenizer.encode(clips)
    quantized = {
        f"m{m}": tokenizer.quantize_rounds(z, num_rounds=m) for m in range(1, max_rounds + 1)
    }
    for name, z_hat in {**quantized, "unquantized": z}.items():
        psnr = FramePSNR().to(clips.device)
        psnr.update(tokenizer.decode(z_hat).float(), clips)
        module.log(f"psnr_by_rounds/{name}", psnr.compute())


class SampleSheet(L.Callback):
    """Samples of the averaged weights from fixed conditions and seeds, at every validation.

    Args:
        prompts: Captions, for text-conditional generators.
        class_labels: Classes, for class-conditional ones.
        num_frames: Frames of a sample; 1 draws images.
        image_size: Height and width in pixels.
        refine: Steps, guidance and temperature.
        fps: Frames per second of the film.
    """

    def __init__(
        self,
        prompts: list[str] | None = None,
        class_labels: list[int] | None = None,
        num_frames: int = 1,
        image_size: int = 32,
        refine: RefineConfig | None = None,
        fps: float = 8.0,
    ):
        if (prompts is None) == (class_labels is None):
            raise ValueError("SampleSheet needs either `prompts` or `class_labels`.")
        self.prompts, self.class_labels = prompts, class_labels
        self.num_frames, self.image_size, self.fps = num_frames, image_size, fps
        self.refine = refine or RefineConfig()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a run of another stage."""
        require_stage(self, pl_module, LitGenerator)

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw on every rank, so that sharded weights can be gathered; write on the first."""
        assert isinstance(pl_module, LitGenerator)
        batch: dict[str, Any] = {"captions": self.prompts}
        labels = self.prompts
        if self.class_labels is not None:
            batch = {"class_labels": torch.tensor(self.class_labels, device=pl_module.device)}
            labels = [str(label) for label in self.class_labels]
        assert labels is not None
        clips = pl_module.draw_clips(
            batch,
            torch.arange(len(labels), device=pl_module.device),
            size=(self.num_frames, self.image_size, self.image_size),
            config=self.refine,
            seed=0,
        )
        clips = to_uint8(clips.cpu()).transpose(1, 2)  # (n, f, 3, h, w)
        if self.num_frames == 1:
            log_picture(trainer, "samples", contact_sheet(clips[:, 0], labels))
        else:
            log_film(trainer, "samples", clip_sheet(clips, labels), fps=self.fps)
