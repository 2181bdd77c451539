"""Files for people to look at: single pictures and clips, sheets of them, numbered folders."""

import io
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from grn_lightning.media.images import center_crop_resize, encode_png, fit_short_side, to_picture
from grn_lightning.media.sheets import clip_sheet, contact_sheet, film_strip
from grn_lightning.media.video import encode_gif, encode_mp4
from grn_lightning.scripts.records import Picture

_SLUG_LENGTH = 48  # letters of a prompt that go into a file's name
_MAX_FOLDERS = 100_000
_TINY = 64  # pixels; noise of 256 colours is seen where pixels are enlarged


def new_folder(parent: Path) -> Path:
    """Make the next free numbered folder, `001`, `002`, ...; never an existing one."""
    numbers = [int(p.name) for p in parent.glob("[0-9]*") if p.name.isdecimal()]
    first = max(numbers, default=0) + 1
    for number in range(first, first + _MAX_FOLDERS):
        folder = parent / f"{number:03d}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # somebody else was faster
            continue
        return folder
    raise ValueError(f"'{parent}' is full of numbered folders; give another one.")


def slug(text: str) -> str:
    """Return the part of a prompt that is safe in a file's name.

    Example:
        >>> slug("The digit 7, moving: left!")
        'the-digit-7-moving-left'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:_SLUG_LENGTH].rstrip("-")


def as_frames(picture: Image.Image | Sequence[Image.Image]) -> Tensor:
    """Turn PIL pictures of one size into uint8 `(f, 3, h, w)`."""
    pictures = [picture] if isinstance(picture, Image.Image) else picture
    return torch.stack([pil_to_tensor(p.convert("RGB")) for p in pictures])


def shrink(clips: Tensor, *, short_side: int) -> Tensor:
    """Scale uint8 `(..., 3, h, w)` down to a shorter side; small ones stay as they are."""
    height, width = clips.shape[-2:]
    return center_crop_resize(clips, fit_short_side(height, width, short_side=short_side))


def encode_apng(clip: Tensor, *, fps: float) -> bytes:
    """Encode uint8 `(f, 3, h, w)` as an animated PNG: every colour exact, played by browsers."""
    ends = [round(1000 * n / fps) for n in range(len(clip) + 1)]
    frames = [to_picture(frame) for frame in clip]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        format="PNG",
        save_all=True,
        append_images=frames[1:],
        duration=[end - start for start, end in pairwise(ends)],
        loop=0,
    )
    return buffer.getvalue()


def write_clip(
    stem: Path, clip: Tensor, *, fps: float, mp4: bool = True, note: str | None = None
) -> list[Path]:
    """Write one picture as PNG, or one clip as MP4 and GIF.

    Args:
        stem: Path without an extension.
        clip: uint8 `(f, 3, h, w)`; a picture has one frame.
        fps: Frames per second of clips.
        mp4: Whether clips are written as MP4 too.
        note: Text that travels in the files, see `recipes`.

    Returns:
        The files, the best one first.
    """
    if len(clip) == 1:
        content = {".png": encode_png(clip[0], note=note)}
    else:
        content = {".mp4": encode_mp4(clip, fps=fps, note=note)} if mp4 else {}
        content[".gif"] = encode_gif(clip, fps=min(fps, 50), note=note)  # more than viewers play
    # Not `with_suffix`: a prompt may end in something that looks like one.
    files = [stem.with_name(stem.name + suffix) for suffix in content]
    for file, data in zip(files, content.values(), strict=True):
        with file.open("xb") as stream:
            stream.write(data)
    return files


def write_small(stem: Path, clip: Tensor, *, fps: float) -> Path:
    """Write a picture, or a clip that plays in a page: exact if it is tiny, else as a GIF."""
    if len(clip) > 1 and min(clip.shape[-2:]) <= _TINY:
        file = stem.with_name(stem.name + ".png")
        file.write_bytes(encode_apng(clip, fps=fps))
        return file
    return write_clip(stem, clip, fps=fps, mp4=False)[0]


def write_sheet(
    stem: Path, clips: Tensor, labels: Sequence[str], *, fps: float, columns: int | None = None
) -> Path:
    """Write a captioned sheet, as PNG for pictures and as a playing GIF for clips.

    Args:
        stem: Path without an extension.
        clips: uint8 `(n, f, 3, h, w)`.
        labels: One caption per clip.
        fps: Frames per second of clips.
        columns: Clips in a row; None makes the sheet about square.
    """
    if clips.shape[1] == 1:
        frames = as_frames(contact_sheet(clips[:, 0], labels, columns=columns))
    else:
        frames = as_frames(clip_sheet(clips, labels, columns=columns))
    return write_clip(stem, frames, fps=fps, mp4=False)[0]


class Gallery:
    """Writes what an evaluation shows, and lists it.

    Args:
        folder: Where the files come to lie.
        root: What their names in the list are relative to.
        fps: Frames per second of clips.
    """

    def __init__(self, folder: Path, *, root: Path, fps: float):
        self.folder, self.root, self.fps = folder, root, fps
        self.pictures: list[Picture] = []

    def _add(self, file: Path, kind: str, caption: str, *reading: Any) -> None:
        self.pictures.append(Picture(str(file.relative_to(self.root)), kind, caption, *reading))

    def add_samples(
        self,
        clips: Sequence[Tensor],
        labels: Sequence[str],
        readings: Sequence[tuple[str, bool | None]] | None = None,
    ) -> None:
        """Write one file per clip, uint8 `(f, 3, h, w)`, with what the judge reads from it."""
        known = readings or [("", None)] * len(clips)
        for n, (clip, label, reading) in enumerate(zip(clips, labels, known, strict=True)):
            file = write_small(self.folder / f"{n:02d}", clip, fps=self.fps)
            self._add(file, "sample", label, *reading)

    def add_sheet(
        self, name: str, clips: Sequence[Tensor], labels: Sequence[str], *, columns: int
    ) -> None:
        """Write all clips on one captioned sheet that plays."""
        stack = torch.stack(list(clips))
        file = write_sheet(self.folder / name, stack, labels, fps=self.fps, columns=columns)
        self._add(file, "sheet", name)

    def add_strip(self, name: str, clips: Sequence[Tensor], labels: Sequence[str]) -> None:
        """Lay out the frames of clips; pictures have none."""
        if clips[0].shape[0] > 1:
            strip = film_strip(torch.stack(list(clips)), labels)
            [file] = write_clip(self.folder / "strip", as_frames(strip), fps=self.fps)
            self._add(file, "strip", f"{name}, frame by frame")
