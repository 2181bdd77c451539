"""Tiny shards for tests, written by webdataset; the colour of a picture is its number."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import webdataset
from torch import Tensor

from grn_lightning.media.images import encode_png
from grn_lightning.media.video import encode_mp4


def picture(number: int, *, size: tuple[int, int] = (8, 8)) -> Tensor:
    """Uint8 `(3, h, w)`: red counts, green tells the left half from the right one."""
    image = torch.full((3, *size), number, dtype=torch.uint8)
    image[1, :, : size[1] // 2] = 0
    image[1, :, size[1] // 2 :] = 255
    return image


def numbers_in(clips: Tensor) -> list[int]:
    """Undo `picture`: clips float `(b, 3, f, h, w)` to the numbers in their first frames."""
    return ((clips[:, 0, 0, 0, 0] + 1) * 127.5).round().long().tolist()


def image_sample(number: int, *, fields: Iterable[str] = ("png", "cls", "txt")) -> dict[str, Any]:
    values = {
        "png": encode_png(picture(number)),
        "cls": str(number % 10).encode(),
        "txt": f"picture {number}\n".encode(),
    }
    return {"__key__": f"{number:06d}"} | {field: values[field] for field in fields}


def write_split(
    folder: Path, split: str, samples: list[dict[str, Any]], *, shard_size: int = 4
) -> list[Path]:
    """Write `<split>-%06d.tar` and the manifest, which is spelt out here on purpose."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, paths = [], []
    for start in range(0, len(samples), shard_size):
        piece = samples[start : start + shard_size]
        paths.append(folder / f"{split}-{len(paths):06d}.tar")
        with webdataset.TarWriter(str(paths[-1]), encoder=False, mtime=0) as writer:
            for sample in piece:
                writer.write(sample)
        size = paths[-1].stat().st_size
        shards.append({"name": paths[-1].name, "num_samples": len(piece), "num_bytes": size})
    fields = sorted({field for s in samples for field in s if not field.startswith("__")})
    manifest = {"format": 1, "fields": fields, "shards": shards}
    (folder / f"{split}.manifest.json").write_text(json.dumps(manifest))
    return paths


def video_sample(number: int, *, num_frames: int = 6) -> dict[str, Any]:
    """A film at 8 fps whose frames are the pictures `number`, `number + 1`, ..."""
    clip = torch.stack([picture(number + f, size=(16, 16)) for f in range(num_frames)])
    return {
        "__key__": f"{number:06d}",
        "mp4": encode_mp4(clip, fps=8, lossless=True),
        "txt": f"film {number}".encode(),
    }
