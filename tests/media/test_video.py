"""Frames are found by the time they are on screen, in files made here and in real ones."""

import io
import weakref
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from grn_lightning.media.video import (
    decode_video,
    encode_gif,
    encode_mp4,
    probe_video,
    write_mp4,
)


def _numbered(num_frames: int, size: int = 32) -> Tensor:
    """Frame n is gray with level 8 n: its number can be read from any pixel."""
    levels = 8 * torch.arange(num_frames, dtype=torch.uint8)
    return levels[:, None, None, None].expand(-1, 3, size, size)


def _numbers(clip: Tensor) -> list[int]:
    return (clip.double().mean((1, 2, 3)) / 8).round().int().tolist()


def _file(
    stamps: Sequence[int], clock: int, format: str = "mp4", *, rate: int = 25, **options: str
) -> bytes:
    """Encode one numbered frame per stamp, on a clock of `clock` ticks per second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "1"} | options)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, clock)
        for stamp, image in zip(stamps, _numbered(len(stamps)), strict=True):
            frame = av.VideoFrame.from_ndarray(
                image.permute(1, 2, 0).contiguous().numpy(), format="rgb24"
            )
            frame.pts, frame.time_base = stamp, Fraction(1, clock)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _on_screen(stamps: Sequence[int], clock: int, times: Sequence[Fraction]) -> list[int]:
    """The slow oracle: the last frame that has begun at each time."""
    begun = [Fraction(stamp - stamps[0], clock) for stamp in stamps]
    return [max(n for n, begin in enumerate(begun) if begin <= time) for time in times]


@pytest.mark.parametrize("shape", [(9, 3, 32, 32), (2, 3, 17, 31), (1, 3, 16, 16)])
def test_lossless_keeps_every_rgb_value(shape: tuple[int, ...]) -> None:
    clip = torch.randint(0, 256, shape, dtype=torch.uint8)
    decoded = decode_video(encode_mp4(clip, fps=8, lossless=True), fps=8, num_frames=None)
    assert decoded.is_contiguous()
    assert torch.equal(decoded, clip)


def test_lossless_keeps_every_gray_level() -> None:
    clip = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(3, 3, 16, 16)
    decoded = decode_video(encode_mp4(clip, fps=4, lossless=True), fps=None, num_frames=None)
    assert torch.equal(decoded, clip)


def test_equal_clips_give_equal_bytes() -> None:
    clip = _numbered(9)
    assert encode_mp4(clip, fps=8) == encode_mp4(clip.clone(), fps=8)
    assert encode_mp4(clip, fps=8, lossless=True) == encode_mp4(clip, fps=8, lossless=True)
    assert b"mbtree=0" in encode_mp4(clip, fps=8)  # else they are equal most of the time only


def test_the_shareable_file_is_what_browsers_ask_for() -> None:
    data = encode_mp4(_numbered(9), fps=30000 / 1001)
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == Fraction(30000, 1001)
        frame = next(container.decode(stream))
        assert (frame.colorspace, frame.color_range) == (1, 1)


def test_lossy_keeps_colours_and_pads_odd_sides() -> None:
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 120, 40]])
    clip = colours[:, :, None, None].expand(4, 3, 33, 47).to(torch.uint8)
    decoded = decode_video(encode_mp4(clip, fps=8), fps=8, num_frames=4)
    assert decoded.shape == (4, 3, 34, 48)
    # 8-bit BT.709 in the limited range, and crf 18, cost a few levels on saturated colours.
    assert (decoded[..., :33, :47].int() - clip.int()).abs().max() <= 8


@pytest.mark.parametrize("fps", [16, 8, 32, 5, 7.3, 60])
@pytest.mark.parametrize("start", [0, 0.25, 0.6])
def test_constant_rate_agrees_with_the_oracle(fps: float, start: float) -> None:
    stamps = range(0, 24 * 1000, 1000)  # 16 frames a second
    times = [Fraction(str(start)) + n / Fraction(str(fps)) for n in range(100)]
    times = [time for time in times if time < Fraction(24, 16)]
    data = _file(stamps, 16000, rate=16)
    clip = decode_video(data, fps=fps, num_frames=None, start_seconds=start)
    assert _numbers(clip) == _on_screen(stamps, 16000, times)


def test_variable_rate_agrees_with_the_oracle() -> None:
    stamps = [0, 40, 50, 170, 400, 430, 460, 1000, 1010, 1300]
    times = [Fraction(n, 20) for n in range(26)]
    clip = decode_video(_file(stamps, 1000), fps=20, num_frames=len(times))
    assert _numbers(clip) == _on_screen(stamps, 1000, times)


def test_b_frames_come_in_the_order_of_presentation() -> None:
    data = _file(range(0, 20 * 40, 40), 1000, bf="4", sc_threshold="0", b_strategy="0")
    with av.open(io.BytesIO(data)) as container:
        order = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
    assert order != sorted(order)  # else the test would not test anything
    assert _numbers(decode_video(data, fps=None, num_frames=None)) == list(range(20))


@pytest.mark.parametrize("rate", [24, 30, 60, Fraction(30000, 1001)])
def test_the_own_rate_gives_every_frame_once_on_a_millisecond_clock(rate: Fraction) -> None:
    """Matroska rounds 33.3, 66.7, ... to whole milliseconds, up as well as down."""
    stamps = [round(1000 * n / rate) for n in range(20)]
    clip = decode_video(_file(stamps, 1000, "matroska"), fps=float(rate), num_frames=20)
    assert _numbers(clip) == list(range(20))


def test_time_starts_with_the_first_frame() -> None:
    data = _file(range(5000, 5000 + 10 * 40, 40), 1000, "matroska")
    assert _numbers(decode_video(data, fps=25, num_frames=10)) == list(range(10))
    late = decode_video(data, fps=25, num_frames=3, start_seconds=0.2)
    assert _numbers(late) == [5, 6, 7]


@pytest.mark.parametrize("format", ["mp4", "matroska", "avi"])
@pytest.mark.parametrize("start", [0.04, 0.88, 1.0])
def test_starting_late_equals_a_slice_of_the_whole(format: str, start: float) -> None:
    """Three key frames within 1.2 seconds, so seeking lands on each of them."""
    data = _file(range(30), 25, format, g="10", keyint_min="10", sc_threshold="0", bf="2")
    whole = decode_video(data, fps=25, num_frames=None)
    first = round(start * 25)
    assert torch.equal(
        decode_video(data, fps=25, num_frames=4, start_seconds=start), whole[first : first + 4]
    )


def test_raw_streams_without_a_clock_are_counted() -> None:
    clip = decode_video(_file(range(12), 25, "h264"), fps=25, num_frames=12)
    assert _numbers(clip) == list(range(12))


def test_phone_videos_stand_upright() -> None:
    clip = torch.zeros(2, 3, 32, 48, dtype=torch.uint8)
    clip[..., :8, :8] = 255  # stored at the top left; turned clockwise it is at the top right
    data = bytearray(encode_mp4(clip, fps=8, lossless=True))
    matrix = data.index(b"tkhd") + 4 + 40  # version 0: flags, times, ids, ..., then 9 numbers
    one = 1 << 16
    turned = [0, one, 0, -one & 0xFFFFFFFF, 0, 0, 32 << 16, 0, 1 << 30]
    data[matrix : matrix + 36] = b"".join(n.to_bytes(4, "big") for n in turned)
    decoded = decode_video(bytes(data), fps=8, num_frames=1)
    assert torch.equal(decoded[0], clip[0].rot90(-1, (1, 2)))
    info = probe_video(bytes(data))
    assert (info.height, info.width) == (48, 32)


def test_frames_can_be_scaled_on_the_way() -> None:
    data = encode_mp4(_numbered(3), fps=8)
    clip = decode_video(data, fps=8, num_frames=None, size=(16, 24))
    assert clip.shape == (3, 3, 16, 24)
    assert _numbers(clip) == [0, 1, 2]


def test_too_short_says_what_there_is_and_what_was_needed() -> None:
    data = encode_mp4(_numbered(9), fps=8)
    expected = r"cannot use dogs/b\.mp4: needs 17 frames at 8 fps from 0\.25 s on, but there are 7 "
    with pytest.raises(ValueError, match=expected + r"\(they end at 1\.125 s\)"):
        decode_video(data, fps=8, num_frames=17, start_seconds=0.25, source="dogs/b.mp4")
    with pytest.raises(ValueError, match="there are none"):
        decode_video(data, fps=8, num_frames=None, start_seconds=2)


def test_garbage_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "not a video.mp4"
    path.write_bytes(b"no video at all" * 100)
    for read in (lambda p: decode_video(p, fps=8, num_frames=1), probe_video):
        with pytest.raises(ValueError, match=r"cannot use .*not a video\.mp4"):
            read(path)
        with pytest.raises(ValueError, match="cannot use a video of 1500 bytes"):
            read(path.read_bytes())


def test_a_file_without_pictures_is_refused() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match="no video stream"):
        decode_video(buffer.getvalue(), fps=8, num_frames=1)


def test_settings_out_of_range_are_refused() -> None:
    clip = _numbered(2)
    with pytest.raises(ValueError, match="fps must be greater than 0, got 0"):
        encode_mp4(clip, fps=0)
    with pytest.raises(ValueError, match="at most 50 in a GIF, got 60"):
        encode_gif(clip, fps=60)
    with pytest.raises(ValueError, match="crf must be from 1 to 51, got 0"):
        encode_mp4(clip, fps=8, crf=0)
    with pytest.raises(ValueError, match="uint8"):
        encode_mp4(clip.float(), fps=8)
    with pytest.raises(ValueError, match="num_frames at least 1"):
        decode_video(b"", fps=8, num_frames=0)


def test_probe_counts_frames_and_seconds() -> None:
    info = probe_video(_file([0, 40, 50, 170, 400], 1000))
    assert (info.height, info.width, info.num_frames) == (32, 32, 5)
    assert 0.4 < info.duration < 0.7
    assert info.fps == info.num_frames / info.duration


def test_probe_sees_a_cut_off_file() -> None:
    clip = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    data = encode_mp4(clip, fps=8)
    assert probe_video(data).num_frames == 20
    with pytest.raises(ValueError, match="cannot use clip.mp4"):
        probe_video(data[: len(data) // 2], source="clip.mp4")


def _read_gif(data: bytes) -> tuple[list[Tensor], list[int]]:
    frames, durations = [], []
    with Image.open(io.BytesIO(data)) as gif:
        for n in range(gif.n_frames):
            gif.seek(n)
            frames.append(torch.from_numpy(np.array(gif.convert("RGB"))).permute(2, 0, 1))
            durations.append(gif.info["duration"])
    return frames, durations


def test_gif_is_exact_up_to_256_colours() -> None:
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16)
    clip = torch.stack([ramp.roll(n, -1) for n in range(5)])
    frames, durations = _read_gif(encode_gif(clip, fps=12))
    assert torch.equal(torch.stack(frames), clip)
    assert sum(durations) == 420  # 5 / 12 s in hundredths, though one frame is 83.3 ms


def test_gif_of_many_colours_is_right_on_average() -> None:
    """Single pixels are dithered; the mean over 8x8 pixels shows the colour."""
    clip = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    clip[:, 0] = torch.linspace(0, 255, 64).to(torch.uint8)
    clip[:, 1] = torch.linspace(0, 255, 64).to(torch.uint8)[:, None]
    clip[:, 2] = torch.tensor([40, 60, 80], dtype=torch.uint8)[:, None, None]
    frames, _ = _read_gif(encode_gif(clip, fps=10))
    error = torch.nn.functional.avg_pool2d(torch.stack(frames).float() - clip.float(), 8)
    assert error.abs().mean() < 4


def test_gif_loops_unless_told_not_to() -> None:
    assert b"NETSCAPE2.0" in encode_gif(_numbered(3), fps=8)
    assert b"NETSCAPE2.0" not in encode_gif(_numbered(3), fps=8, loop=False)


def test_real_files_give_every_frame_and_every_second_one(media: Path) -> None:
    path = media / "clip_01.mp4"
    info = probe_video(path)
    assert (info.height, info.width, info.num_frames, info.fps) == (480, 848, 81, 16)
    part = decode_video(path, fps=16, num_frames=9, start_seconds=2, size=(60, 106))
    half = decode_video(path, fps=8, num_frames=5, start_seconds=2, size=(60, 106))
    assert torch.equal(part[::2], half)
    with av.open(str(path)) as container:  # the oracle counts: 16 frames a second
        images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][32:41]
    small = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    small = torch.nn.functional.interpolate(small, (60, 106), mode="bicubic", antialias=True)
    assert (small - part.float()).abs().mean() < 2


# --- a clip that arrives in pieces ----------------------------------------------------------------


@pytest.mark.parametrize("size", [(24, 32), (23, 31)])
def test_a_clip_in_pieces_is_the_same_file(size, tmp_path: Path) -> None:
    clip = torch.randint(256, (9, 3, *size), dtype=torch.uint8)
    for number, lengths in enumerate(((1, 4, 4), (9,), (3, 3, 3))):
        file = tmp_path / f"{number}.mp4"
        assert write_mp4(file, clip.split(list(lengths)), fps=8, note="how") == 9
        assert file.read_bytes() == encode_mp4(clip, fps=8, note="how")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.mp4", "1.mp4", "2.mp4"]


def test_one_piece_is_asked_for_at_a_time(tmp_path: Path) -> None:
    """Frames are encoded before the next piece is made."""
    alive: list[weakref.ref] = []

    def pieces():
        for _ in range(4):
            assert sum(piece() is not None for piece in alive) <= 1
            piece = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
            alive.append(weakref.ref(piece))
            yield piece
            del piece

    assert write_mp4(tmp_path / "clip.mp4", pieces(), fps=8) == 16


def test_a_clip_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    def pieces():
        yield torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        write_mp4(tmp_path / "clip.mp4", pieces(), fps=8)
    with pytest.raises(ValueError, match="at least one frame, got none"):
        write_mp4(tmp_path / "clip.mp4", [], fps=8)
    assert not list(tmp_path.iterdir())
    (tmp_path / "clip.mp4").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="is not overwritten"):
        write_mp4(tmp_path / "clip.mp4", pieces(), fps=8)
    assert (tmp_path / "clip.mp4").read_bytes() == b"mine"
