"""Video files: frames at a chosen rate out of them, clips into them (PyAV; H.264 and GIF).

Frames are chosen by presentation time, never by counting: the frame at time ``T`` is the one on
screen at ``T``, so files with a variable frame rate, B-frames or a start offset need no case of
their own. Every codec runs on one thread; workers give the parallelism.
"""

import io
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image
from torch import Tensor

from grn_lightning.media.images import center_crop_resize

_BT709, _LIMITED_RANGE = 1, 1  # colours as H.264 and FFmpeg number them, and browsers expect them
# FFmpeg's default repeats chroma pixels and truncates: 1.2 levels off on average on 848x480 H.264,
# this 0.1 (reference: bicubic, exact rounding).
_QUALITY = int(Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT)
# The converter's own thread pool costs more than it gives; the switch came with PyAV 17.
_ONE_THREAD: dict[str, Any] = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}
_SEEK_MARGIN = 1  # seconds; some containers index key frames by decoding time
_CLOCK_ERROR = Fraction(1, 2000)  # seconds; containers with a clock of 1 ms round to half of it
_GIF_COLORS = 256
# With this on and B-frames, x264 lets uninitialised memory decide (8 of 21 test clips differed
# between runs under MALLOC_PERTURB_; none of 21 without it).
_NO_MACROBLOCK_TREE = {"x264-params": "mbtree=0"}


class VideoInfo(NamedTuple):
    """What a video file holds, counted rather than taken from its header."""

    height: int
    """Rows of a frame as seen, after rotation."""
    width: int
    """Columns of a frame as seen."""
    num_frames: int
    """Number of coded frames."""
    duration: float
    """Seconds from the first frame's beginning to the last frame's end."""
    fps: float
    """Average rate: ``num_frames / duration``."""


@dataclass(frozen=True)
class _Shot:
    """A decoded frame and the time it is on screen, in seconds since the first frame."""

    frame: av.VideoFrame
    begin: Fraction
    end: Fraction


@contextmanager
def _opened(data: bytes | Path, source: str | None) -> Iterator[Any]:
    """Open a video file; every failure inside becomes a ValueError that names the file."""
    name = source or (str(data) if isinstance(data, Path) else f"a video of {len(data)} bytes")
    try:
        with av.open(io.BytesIO(data) if isinstance(data, bytes) else str(data)) as container:
            if not container.streams.video:
                raise ValueError("it has no video stream")
            container.streams.video[0].codec_context.thread_count = 1
            yield container
    except (av.error.FFmpegError, ValueError, EOFError, IndexError) as error:
        raise ValueError(f"cannot use {name}: {error}") from error


def _rate(fps: float) -> Fraction:
    """Turn 29.97002997 into 30000/1001."""
    if not fps > 0:
        raise ValueError(f"fps must be greater than 0, got {fps}.")
    return Fraction(fps).limit_denominator(10**4)


def _frame_length(stream: Any) -> Fraction:
    """Guess how long a frame lasts, for files that do not tell."""
    return 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)


def _timed(container: Any) -> Iterator[tuple[av.VideoFrame, Fraction]]:
    """Yield frames with their time on the file's own clock, never running backwards."""
    stream = container.streams.video[0]
    time: Fraction | None = None
    for frame in container.decode(stream):
        if frame.pts is not None:
            stamp = frame.pts * Fraction(frame.time_base)
            time = stamp if time is None else max(time, stamp)
        else:  # elementary streams carry no clock
            time = Fraction(0) if time is None else time + _frame_length(stream)
        yield frame, time


def _shots(container: Any, origin: Fraction | None = None) -> Iterator[_Shot]:
    """Yield the frames from here on; each ends where the next begins, the last when it says so."""
    before: tuple[av.VideoFrame, Fraction] | None = None
    gap = _frame_length(container.streams.video[0])
    for frame, time in _timed(container):
        origin = time if origin is None else origin
        if before is not None:
            yield _Shot(before[0], before[1] - origin, time - origin)
            gap = (time - before[1]) or gap
        before = (frame, time)
    if before is not None and origin is not None:
        frame, time = before
        length = (frame.duration or 0) * Fraction(frame.time_base or 0)
        yield _Shot(frame, time - origin, time - origin + (length if length > 0 else gap))


def _shots_at(container: Any, start: Fraction) -> Iterator[_Shot]:
    """Yield the frame on screen at ``start`` and all later ones, decoding little before it."""
    if start == 0:
        yield from _shots(container)
        return
    stream = container.streams.video[0]
    origin = next(_timed(container), (None, Fraction(0)))[1]
    target = origin + max(start - _SEEK_MARGIN, Fraction(0))
    for position in (target, origin):  # the second only where a file's index misleads
        container.seek(int(position / stream.time_base), stream=stream)
        shots = _shots(container, origin)
        head = next(shots, None)
        if head is not None and head.begin <= start:
            yield head
            yield from shots
            return


def _pick(shots: Iterator[_Shot], start: Fraction, rate: Fraction | None) -> Iterator[_Shot]:
    """Yield the shot on screen at ``start + n / rate`` for n = 0, 1, ... while there is one."""
    count = 0
    for shot in shots:
        if rate is None:
            if start < shot.end:
                yield shot
            continue
        while start + count / rate < shot.end:
            yield shot
            count += 1


class _Converter:
    """Make frames uint8 ``(3, h, w)`` RGB, upright, all of the first one's size."""

    def __init__(self, size: tuple[int, int] | None) -> None:
        self.size = size
        self.reformatter = VideoReformatter()  # one for all frames: its tables are costly
        self.shape: dict[str, int] = {}

    def __call__(self, frame: av.VideoFrame) -> Tensor:
        self.shape = self.shape or {"width": frame.width, "height": frame.height}
        options = self.shape | _ONE_THREAD
        rgb = self.reformatter.reformat(frame, format="rgb24", interpolation=_QUALITY, **options)
        upright = np.rot90(rgb.to_ndarray(), round(frame.rotation / 90))  # both count anticlockwise
        image = torch.from_numpy(np.ascontiguousarray(upright)).permute(2, 0, 1)
        return image if self.size is None else center_crop_resize(image, self.size)


def _collect(
    shots: Iterator[_Shot], convert: _Converter, num_frames: int | None
) -> tuple[list[Tensor], Fraction]:
    """Convert the first ``num_frames`` shots; a shot that comes again is converted once."""
    frames: list[Tensor] = []
    last: _Shot | None = None
    for shot in shots:
        frames.append(frames[-1] if shot is last else convert(shot.frame))
        last = shot
        if len(frames) == num_frames:
            break
    return frames, last.end if last is not None else Fraction(0)


def decode_video(
    data: bytes | Path,
    *,
    fps: float | None,
    num_frames: int | None,
    start_seconds: float = 0.0,
    size: tuple[int, int] | None = None,
    source: str | None = None,
) -> Tensor:
    """Decode the frames of a video that are on screen at ``start_seconds + n / fps``.

    Time 0 is the beginning of the first frame; a frame is on screen until the next one begins,
    the last one for its own duration. Since containers round times to their clock, a frame counts
    as begun half a tick (at most half a millisecond) early. A rate above the file's own repeats
    frames, a lower one leaves frames out; nothing is blended. Rotation marks are applied.

    Args:
        data: The encoded file, or its path.
        fps: Frames per second to sample at; None takes every frame of the file once.
        num_frames: How many frames to return; None returns all until the end.
        start_seconds: Where to begin. Decoding starts at a key frame shortly before.
        size: Height and width that every frame is scaled and cropped to as soon as it is decoded
            (see `center_crop_resize`), which keeps the memory of large videos small.
        source: What to call the video in an error; the path or the number of bytes by default.

    Returns:
        uint8 ``(f, 3, h, w)`` in [0, 255].

    Raises:
        ValueError: If the file cannot be decoded, or ends before ``num_frames`` are found.
    """
    if start_seconds < 0 or (num_frames is not None and num_frames < 1):
        got = f"start_seconds={start_seconds}, num_frames={num_frames}"
        raise ValueError(f"start_seconds must be at least 0 and num_frames at least 1, got {got}.")
    rate = None if fps is None else _rate(fps)
    start = Fraction(start_seconds).limit_denominator(10**6)
    with _opened(data, source) as container:
        half_tick = Fraction(container.streams.video[0].time_base) / 2
        shots = _pick(_shots_at(container, start), start + min(half_tick, _CLOCK_ERROR), rate)
        frames, end = _collect(shots, _Converter(size), num_frames)
        if not frames or (num_frames is not None and len(frames) < num_frames):
            needed = f"{num_frames or 1} frames{f' at {fps:g} fps' if fps else ''}"
            found = f"{len(frames)} (they end at {float(end):.3f} s)" if frames else "none"
            raise ValueError(f"needs {needed} from {start_seconds:g} s on, but there are {found}")
    return torch.stack(frames)


def stream_video(path: Path) -> Iterator[Tensor]:
    """Decode every frame of a video file once, one at a time.

    Yields:
        uint8 ``(3, h, w)`` in [0, 255], upright, all of the first one's size.

    Raises:
        ValueError: If the file cannot be decoded.
    """
    with _opened(path, None) as container:
        convert = _Converter(None)
        for shot in _shots(container):
            yield convert(shot.frame)


def probe_video(data: bytes | Path, *, source: str | None = None) -> VideoInfo:
    """Decode the first frame and count the rest without decoding it.

    Raises:
        ValueError: If nothing can be decoded, or an MP4 holds fewer frames than it announces.
    """
    with _opened(data, source) as container:
        stream = container.streams.video[0]
        frame: av.VideoFrame | None = None
        times: list[Fraction] = []
        total, length = 0, _frame_length(stream)
        for packet in container.demux(stream):
            if frame is None:
                frame = next(iter(packet.decode()), None)
            if packet.size == 0 and packet.dts is None:  # the demuxer's sign for the end
                continue
            total += 1
            if not packet.is_discard:
                tick = Fraction(packet.time_base)
                length = (packet.duration or 0) * tick or length
                times.append((packet.pts or 0) * tick if packet.pts is not None else total * length)
        if frame is None or not times:
            raise ValueError("it has no frames")
        if "mp4" in container.format.name and total < stream.frames:
            raise ValueError(f"it ends after {total} of {stream.frames} frames")
        upright = (frame.height, frame.width)
        height, width = upright[::-1] if round(frame.rotation / 90) % 2 else upright
        duration = float(max(times) - min(times) + length)
    return VideoInfo(height, width, len(times), duration, len(times) / duration)


def _as_clip(clip: Tensor) -> np.ndarray:
    """Check a clip and lay it out as ``(f, h, w, 3)``."""
    if clip.dtype != torch.uint8 or clip.ndim != 4 or clip.shape[1] != 3 or not len(clip):
        got = f"{clip.dtype} {tuple(clip.shape)}"
        raise ValueError(f"a clip must be uint8 (f, 3, h, w) with f >= 1, got {got}; see to_uint8.")
    return clip.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _write_mp4(
    file: str | io.BytesIO,
    chunks: Iterable[np.ndarray],
    rate: Fraction,
    *,
    crf: int | None,
    note: str | None,
) -> int:
    """Encode frames ``(f, h, w, 3)`` as they come; ``crf=None`` stores RGB without loss."""
    lossless = crf is None
    layout = "rgb24" if lossless else "yuv420p"
    codec: Literal["libx264", "libx264rgb"] = "libx264rgb" if lossless else "libx264"
    index_first = {} if lossless else {"movflags": "+faststart"}
    convert = VideoReformatter()
    colors = {"dst_colorspace": _BT709, "interpolation": _QUALITY}
    with av.open(file, "w", format="mp4", options=index_first) as container:
        if note is not None:
            container.metadata["comment"] = note
        options = {"crf": str(crf or 0)} | _NO_MACROBLOCK_TREE
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.pix_fmt = layout
        context = stream.codec_context
        context.thread_count = 1
        if not lossless:
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = _LIMITED_RANGE
        count = 0
        for pixels in (pixels for frames in chunks for pixels in frames):
            if count == 0:
                stream.height, stream.width = pixels.shape[:2]
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if not lossless:
                frame = convert.reformat(frame, format=layout, **colors, **_ONE_THREAD)
            container.mux(stream.encode(frame))
            count += 1
        container.mux(stream.encode(None))
    return count


def encode_mp4(
    clip: Tensor,
    *,
    fps: float,
    crf: int = 18,
    lossless: bool = False,
    note: str | None = None,
) -> bytes:
    """Encode a clip as H.264 in MP4; equal clips give equal bytes.

    The default plays everywhere: 4:2:0, BT.709, index first. Odd sides get their last row or
    column repeated, since 4:2:0 stores colours for 2x2 pixels. ``lossless`` keeps every RGB value
    and the size, but browsers do not play it.

    Args:
        clip: uint8 ``(f, 3, h, w)``.
        fps: Frames per second.
        crf: Quality, from 1 (best) to 51; 18 is hard to tell from the original.
        lossless: Store RGB exactly instead; ``crf`` is not used.
        note: Text that travels in the file as its comment; `media.notes.read_note` finds it.

    Raises:
        ValueError: If the clip is not uint8 ``(f, 3, h, w)``, or ``crf`` is out of range.
    """
    _check_crf(crf)
    frames, rate = _as_clip(clip), _rate(fps)
    if lossless:
        buffer = io.BytesIO()
        _write_mp4(buffer, [frames], rate, crf=None, note=note)
        return buffer.getvalue()
    with tempfile.TemporaryDirectory() as folder:  # the index can only be moved within a file
        path = Path(folder, "clip.mp4")
        _write_mp4(str(path), [_even(frames)], rate, crf=crf, note=note)
        return path.read_bytes()


def write_mp4(
    file: Path,
    chunks: Iterable[Tensor],
    *,
    fps: float,
    crf: int = 18,
    lossless: bool = False,
    note: str | None = None,
) -> int:
    """Encode a clip that arrives in pieces as H.264 in MP4, with one piece in memory at a time.

    The bytes are those of `encode_mp4` of the whole clip.

    Args:
        file: Where to write; a new file, which appears when it is complete.
        chunks: Consecutive frames, uint8 ``(f, 3, h, w)``.
        fps: Frames per second.
        crf: Quality, as in `encode_mp4`.
        lossless: Store RGB exactly instead, as in `encode_mp4`.
        note: As in `encode_mp4`.

    Returns:
        Number of frames.

    Raises:
        FileExistsError: If the file is there already.
        ValueError: If a chunk is not uint8 ``(f, 3, h, w)``, there is none, or ``crf`` is out of
            range.
    """
    _check_crf(crf)
    if file.exists():
        raise FileExistsError(f"'{file}' exists and is not overwritten.")
    part = file.with_name(f".{file.name}.part")
    try:
        frames = (_as_clip(chunk) if lossless else _even(_as_clip(chunk)) for chunk in chunks)
        quality = None if lossless else crf
        if not (count := _write_mp4(str(part), frames, _rate(fps), crf=quality, note=note)):
            raise ValueError("a clip must have at least one frame, got none.")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return count


def _check_crf(crf: int) -> None:
    if not 1 <= crf <= 51:
        raise ValueError(
            f"crf must be from 1 to 51, got {crf}; use lossless=True for exact pixels."
        )


def _even(frames: np.ndarray) -> np.ndarray:
    """Repeat the last row or column of ``(f, h, w, 3)`` where their number is odd."""
    odd = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)]
    return np.pad(frames, odd, mode="edge")


def _shared_palette(frames: np.ndarray) -> Image.Image:
    """Choose 256 colours for all frames together, so that still parts do not flicker."""
    pixels = frames.reshape(-1, 3)
    pixels = pixels[:: max(1, len(pixels) // 2**20)]
    strip = Image.fromarray(np.ascontiguousarray(pixels[None]))
    return strip.quantize(_GIF_COLORS, method=Image.Quantize.FASTOCTREE)


def _gif_frames(frames: np.ndarray) -> list[Image.Image]:
    numbers = frames.astype(np.int32) @ np.array([65536, 256, 1], np.int32)  # one per colour
    colors, indices = np.unique(numbers, return_inverse=True)
    if len(colors) > _GIF_COLORS:
        palette = _shared_palette(frames)
        return [Image.fromarray(frame).quantize(palette=palette) for frame in frames]
    # PIL's search for the nearest colour is coarser than a level; up to 256 there is none to do.
    table = np.stack([colors >> 16, colors >> 8 & 255, colors & 255], axis=1).flatten().tolist()
    pictures = [Image.fromarray(i) for i in indices.reshape(frames.shape[:3]).astype(np.uint8)]
    for picture in pictures:
        picture.putpalette(table)
    return pictures


def encode_gif(clip: Tensor, *, fps: float, loop: bool = True, note: str | None = None) -> bytes:
    """Encode a clip as an animated GIF: exact up to 256 colours, else dithered.

    GIF counts in hundredths of a second and viewers refuse less than two; the total length is kept
    by spreading the rounding. Equal frames in a row are stored as one that lasts longer.

    Args:
        clip: uint8 ``(f, 3, h, w)``.
        fps: Frames per second, at most 50.
        loop: Whether to play for ever.
        note: Text that travels in the file as its comment; `media.notes.read_note` finds it.

    Raises:
        ValueError: If the clip is not uint8 ``(f, 3, h, w)``, or ``fps`` is out of range.
    """
    if not 0 < fps <= 50:
        raise ValueError(f"fps must be greater than 0 and at most 50 in a GIF, got {fps}.")
    frames = _gif_frames(_as_clip(clip))
    ends = [round(100 * n / _rate(fps)) for n in range(len(frames) + 1)]
    durations = [10 * (ends[n + 1] - ends[n]) for n in range(len(frames))]
    buffer = io.BytesIO()
    options: dict[str, Any] = {"loop": 0} if loop else {}
    options |= {} if note is None else {"comment": note.encode()}
    frames[0].save(
        buffer, format="GIF", save_all=True, append_images=frames[1:], duration=durations, **options
    )
    return buffer.getvalue()
