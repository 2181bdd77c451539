"""Notes come back as they were written and change no pixel."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from grn_lightning.media.images import decode_image, encode_jpeg, encode_png
from grn_lightning.media.notes import read_note
from grn_lightning.media.video import decode_video, encode_gif, encode_mp4

NOTE = '{"prompt": "the \\"digit\\" sieben läuft → ✓", "seed": 3}\n' + "long " * 400
CLIP = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
ENCODERS: dict[str, Callable[..., bytes]] = {
    "png": lambda note=None: encode_png(CLIP[0], note=note),
    "gif": partial(encode_gif, CLIP, fps=8),
    "mp4": partial(encode_mp4, CLIP, fps=8),
    "lossless": partial(encode_mp4, CLIP, fps=8, lossless=True),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_note_is_read_back_whatever_the_file_is_called(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "no-suffix"
    file.write_bytes(ENCODERS[kind](note=NOTE))
    assert read_note(file) == NOTE
    file.write_bytes(ENCODERS[kind]())
    assert read_note(file) is None


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_note_changes_no_pixel(kind: str) -> None:
    plain, noted = ENCODERS[kind](), ENCODERS[kind](note=NOTE)
    assert plain != noted
    decode = decode_image if kind == "png" else partial(decode_video, fps=None, num_frames=None)
    assert decode(plain).equal(decode(noted))
    assert noted == ENCODERS[kind](note=NOTE)


def test_strangers_have_no_note(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encode_jpeg(CLIP[0]))
    assert read_note(tmp_path / "a.jpg") is None
    (tmp_path / "b.png").write_bytes(b"no picture at all" * 40)
    with pytest.raises(ValueError, match="b.png' is neither a picture nor an MP4"):
        read_note(tmp_path / "b.png")
