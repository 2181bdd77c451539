"""Notes in pictures and clips: the text that `encode_png`, `encode_mp4` and `encode_gif` put there.

A PNG keeps it in a text chunk (iTXt, keyword "grn"), an MP4 in the tag "comment", a GIF in its
comment block. All three are UTF-8, survive copying and renaming, and do not touch a pixel; most
programs that save a picture anew drop them.
"""

from pathlib import Path
from typing import Any

import av
from PIL import Image, UnidentifiedImageError

from grn_lightning.media.images import NOTE_KEY


def read_note(file: Path) -> str | None:
    """Return the note of a PNG, GIF or MP4, or None if the file has none.

    Args:
        file: Its path; the content tells the format, not the name.

    Raises:
        ValueError: If it is neither a picture nor an MP4.
    """
    try:
        with Image.open(file) as picture:
            note: Any = picture.info.get(NOTE_KEY if picture.format == "PNG" else "comment")
            return note.decode(errors="replace") if isinstance(note, bytes) else note
    except UnidentifiedImageError:
        pass  # no picture; perhaps a clip
    try:
        with av.open(str(file), format="mp4") as container:
            return container.metadata.get("comment")
    except (av.error.FFmpegError, EOFError) as error:
        raise ValueError(f"'{file}' is neither a picture nor an MP4: {error}") from error
