"""Peak memory that `grn plan` expects, against what training really takes, on a CPU.

Each row trains a few steps by `trainer.fit` in a process of its own. Measured is the most that
PyTorch's CPU allocator had given out at once, from the allocations and releases that its profiler
notes; unlike the size of the process it knows nothing of libraries, caches and other noise, and
unlike the plan it sees what kernels take for themselves.

    python benchmarks/plan_memory.py [NAME ...]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch

from grn_lightning.datasets.digits import DigitsConfig, build_digits
from grn_lightning.lit.callbacks import EMA
from grn_lightning.lit.data import ShardData, ShardSource
from grn_lightning.lit.generator import LitGenerator
from grn_lightning.lit.rehearsal import BatchSizes, Rehearsal, StepSettings
from grn_lightning.lit.tokenizer import LitTokenizer, load_tokenizer
from grn_lightning.models.tokenizer import TokenizerConfig

SIDE, FRAMES = 32, 9
TOKENIZER: dict[str, Any] = {
    "latent_channels": 4, "num_rounds": 4, "encoder_width": 16, "decoder_width": 16,
    "width_multipliers": (1, 1), "num_res_blocks": 1, "temporal_downsample": (True,),
    "patch_size": 2,
}  # fmt: skip
CLASS = {
    "num_elements": 16, "alphabet_size": 2, "grid_size": (8, 8), "depth": 6, "width": 256,
    "num_heads": 4, "bottleneck": 64, "num_classes": 10, "num_context_tokens": 8,
    "context_start": 2,
}  # fmt: skip
TEXT = {
    "num_elements": 16, "alphabet_size": 2, "text_channels": 32, "depth": 6, "width": 256,
    "num_heads": 4, "mlp_width": 768, "blocks_per_chunk": 2,
}  # fmt: skip
ENCODER = {"width": 32, "layers": 1, "context_length": 16}


def row(kind: str, batch: int, **rest: Any) -> dict[str, Any]:
    """Settings of one row, everything else being plain."""
    plain = {"optimizer": "adamw", "precision": "32-true", "ema": False, "micro_batches": 1}
    plain["checkpointing"] = False
    return {"kind": kind, "batch": batch, **plain, "clip": 0.0, "changes": {}, **rest}


ROWS = {
    "class adamw": row("class", 16),
    "class adamw ema clip": row("class", 16, ema=True, clip=1.0),
    "class muon bf16": row("class", 16, optimizer="muon", precision="bf16-mixed"),
    "class adamw wide batch": row("class", 64, precision="bf16-mixed"),
    "class adamw accumulate": row("class", 16, micro_batches=2, ema=True),
    "text prefix adamw": row("text", 8),
    "text prefix adamw ema bf16": row("text", 8, ema=True, precision="bf16-mixed"),
    "text full muon": row("text", 8, optimizer="muon", changes={"attention": "full"}),
    "text prefix checkpointing": row("text", 8, checkpointing=True),
    "class bf16 checkpointing": row("class", 64, precision="bf16-mixed", checkpointing=True),
    "text full muon bf16 ema": row(
        "text", 8, optimizer="muon", precision="bf16-mixed", ema=True,
        changes={"attention": "full"},
    ),
    "text grouped accumulate": row(
        "text", 4, micro_batches=2, clip=1.0, changes={"num_kv_heads": 2}
    ),
}  # fmt: skip


def settings_of(row: dict[str, Any], tokenizer: str) -> dict[str, Any]:
    """`init_args` of the stage."""
    network = (CLASS if row["kind"] == "class" else TEXT) | row["changes"]
    text = {"text_encoder": ENCODER} if row["kind"] == "text" else {}
    optim = {"name": row["optimizer"]}
    again = {"activation_checkpointing": row["checkpointing"]}
    return {"generator": network, "tokenizer": tokenizer, "optim": optim, **text, **again}


def prepare(folder: Path) -> None:
    """Write a small data set and an untrained tokenizer."""
    digits = DigitsConfig(
        canvas_size=SIDE, num_frames=FRAMES, num_train_clips=200, num_val_clips=2,
        num_train_images=200, num_val_images=2,
    )  # fmt: skip
    for _ in build_digits(folder / "digits", digits):
        pass
    module = LitTokenizer(TokenizerConfig(**TOKENIZER))
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, limit_val_batches=0,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data_of({"kind": "class", "batch": 1}, folder))
    trainer.save_checkpoint(folder / "tokenizer.ckpt")


def data_of(row: dict[str, Any], folder: Path) -> ShardData:
    """Pictures for classes, clips for captions."""
    is_class = row["kind"] == "class"
    source = ShardSource(
        path=str(folder / "digits" / ("images" if is_class else "clips")),
        media="image" if is_class else "video",
        num_frames=1 if is_class else FRAMES,
        batch_size=row["batch"],
    )
    return ShardData(
        [source], image_size=SIDE, with_classes=is_class, with_captions=not is_class, num_classes=10
    )


def predict(row: dict[str, Any], folder: Path) -> int:
    """Return the plan's peak in bytes."""
    config = load_tokenizer(folder / "tokenizer.ckpt").config
    rehearsal = Rehearsal(settings_of(row, "unused"), config)
    frames = 1 if row["kind"] == "class" else FRAMES
    sizes = BatchSizes(samples=row["batch"], size=(frames, SIDE, SIDE))
    settings = StepSettings(
        precision=row["precision"],
        clip=row["clip"],
        micro_batches=row["micro_batches"],
        has_average=row["ema"],
        is_checkpointed=row["checkpointing"],
    )
    return rehearsal.measure(sizes, settings).peak


def measure(row: dict[str, Any], folder: Path) -> int:
    """Train and return the peak in bytes."""
    module = LitGenerator(**settings_of(row, str(folder / "tokenizer.ckpt")))
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=3, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, limit_val_batches=0,
        use_distributed_sampler=False, log_every_n_steps=1, precision=row["precision"],
        gradient_clip_val=row["clip"] or None, accumulate_grad_batches=row["micro_batches"],
        callbacks=[EMA()] if row["ema"] else [],
    )  # fmt: skip
    profile = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    )
    with profile:
        trainer.fit(module, data_of(row, folder))
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    notes = [event for event in results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(notes, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        print(measure(json.loads(options.measure), options.folder))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        print(f"{'training':30} {'planned':>10} {'measured':>10} {'off by':>8}")
        for title, settings in ROWS.items():
            if options.names and title not in options.names:
                continue
            planned = predict(settings, folder)
            command = [sys.executable, __file__, "--measure", json.dumps(settings)]
            done = subprocess.run(
                [*command, "--folder", name], check=True, capture_output=True, text=True
            )
            measured = int(done.stdout.split()[-1])
            sizes = f"{planned / 2**20:6.1f} MiB {measured / 2**20:6.1f} MiB"
            print(f"{title:30} {sizes} {planned / measured - 1:+8.1%}", flush=True)


if __name__ == "__main__":
    main()
