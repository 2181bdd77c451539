"""`grn reconstruct`: files come back at their size, with numbers that are true of them."""

import json
import math
import shlex
from pathlib import Path

import pytest
import torch
from torch import Tensor

from grn_lightning.media.images import decode_image, encode_png
from grn_lightning.media.video import decode_video, encode_mp4, probe_video, stream_video
from grn_lightning.scripts.reconstruct import ReconstructConfig, reconstruct, side_by_side
from tests.scripts.conftest import Runs
from tests.tiny_runs import call_grn


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A picture of 13 x 21 pixels, and a video of 8 frames of 20 x 22 pixels."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    (folder / "a.png").write_bytes(encode_png(torch.randint(256, (3, 13, 21), dtype=torch.uint8)))
    clip = torch.randint(256, (8, 3, 20, 22), dtype=torch.uint8)
    (folder / "b.mp4").write_bytes(encode_mp4(clip, fps=5, lossless=True))
    return folder / "a.png", folder / "b.mp4"


def psnr(first: Tensor, second: Tensor) -> list[float]:
    errors = (first.double() - second.double()).square().mean((1, 2, 3)) / 255**2
    return [10 * math.log10(1 / float(error)) for error in errors]


def test_files_keep_size_length_and_rate_and_the_numbers_are_theirs(
    trained: Runs, files: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = reconstruct(
        [*files],
        tokenizer=trained.tokenizer,
        out=out,
        config=ReconstructConfig(lossless=True, chunk_size=1),
    )
    picture, video = report.files
    rebuilt = decode_image((out / "00-a.png").read_bytes())
    assert rebuilt.shape == (3, 13, 21)
    [decibels] = psnr(rebuilt[None], decode_image(files[0].read_bytes())[None])
    assert picture.psnr == pytest.approx(decibels, abs=1e-4)
    assert picture.size == "13 x 21 padded to 16 x 24"
    assert picture.bits_per_pixel == 2 * 4 * 2 * 3 / (13 * 21)

    clips = [decode_video(file, fps=None, num_frames=None) for file in (out / "01-b.mp4", files[1])]
    assert clips[0].shape == clips[1].shape == (8, 3, 20, 22)
    assert probe_video(out / "01-b.mp4").fps == 5
    by_frame = psnr(*clips)
    assert video.psnr == pytest.approx(sum(by_frame) / 8, abs=1e-4)
    assert video.psnr_min == pytest.approx(min(by_frame), abs=1e-4)
    assert video.num_bits == 2 * 4 * 5 * 3 * 3  # 9 frames are 5 latent ones
    facts = json.loads((out / "reconstruct.json").read_text())
    assert [file["psnr"] for file in facts["files"]] == [picture.psnr, video.psnr]


def test_the_command_on_record_is_the_command(
    trained: Runs, files: tuple[Path, Path], tmp_path: Path
) -> None:
    words = ["reconstruct", *files, "--tokenizer", trained.tokenizer, "--out", tmp_path / "a"]
    report = call_grn(*words, "--side_by_side", "true", "--rounds", "1")
    facts = json.loads((tmp_path / "a" / "reconstruct.json").read_text())
    again = [
        word.replace(str(tmp_path / "a"), str(tmp_path / "b"))
        for word in shlex.split(facts["command"])[1:]
    ]
    call_grn(*again)
    assert len(report.files) == 2
    for file in report.files:
        name = Path(file.out).name
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    wide = decode_image((tmp_path / "a" / "00-a.png").read_bytes())
    assert wide.shape == (3, 13, 3 * 21 + 2 * 4)
    assert wide[..., :21].equal(decode_image(files[0].read_bytes()))


def test_differences_are_amplified_about_gray() -> None:
    first = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    shown = side_by_side(first, torch.full_like(first, 103))
    assert shown[0, 0, 0].tolist() == [100, 100, *[128] * 4, 103, 103, *[128] * 4, 140, 140]
    assert side_by_side(first, torch.full_like(first, 255)).max() == 255


def test_a_stream_is_the_whole_film(files: tuple[Path, Path]) -> None:
    whole = decode_video(files[1], fps=None, num_frames=None)
    assert torch.stack([*stream_video(files[1])]).equal(whole)


def test_what_cannot_be_is_refused_before_anything_is_written(
    trained: Runs, files: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="there is no file nowhere.png"):
        reconstruct([Path("nowhere.png")], tokenizer=trained.tokenizer, out=out)
    with pytest.raises(ValueError, match="`--tokenizer`.*must be given"):
        reconstruct([*files], out=out)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png.*no picture of a known format"):
        reconstruct([files[0], tmp_path / "text.png"], tokenizer=trained.tokenizer, out=out)
    with pytest.raises(ValueError, match="`tile` and `overlap` must be multiples of 8"):
        reconstruct(
            [*files], tokenizer=trained.tokenizer, out=out, config=ReconstructConfig(tile=20)
        )
    assert not out.exists()
    with pytest.raises(ValueError, match="holds files"):
        reconstruct([*files], tokenizer=trained.tokenizer, out=files[0].parent)


def test_real_clips_come_back(trained: Runs, media: Path, tmp_path: Path) -> None:
    """The first frames of a real film, cut to be quick."""
    clip = decode_video(media / "clip_01.mp4", fps=None, num_frames=4, size=(62, 90))
    (tmp_path / "real.mp4").write_bytes(encode_mp4(clip, fps=16))
    report = reconstruct(
        [tmp_path / "real.mp4"],
        tokenizer=trained.tokenizer,
        out=tmp_path / "out",
        config=ReconstructConfig(tile=48),
    )
    [file] = report.files
    assert file.size == "62 x 90 padded to 64 x 96, 6 tiles of 48 x 48"
    assert decode_video(Path(file.out), fps=None, num_frames=None).shape == clip.shape
