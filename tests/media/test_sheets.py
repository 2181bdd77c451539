"""Sheets show every pixel of every picture, and captions that stay within their cell."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from torch import Tensor

from grn_lightning.media.sheets import _MAX_LINES, _wrap, clip_sheet, contact_sheet, film_strip

_GAP, _FACTOR = 14, 5  # a picture of 32 x 32 is enlarged to 160 x 160


def _pixels(sheet: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)


def _images(*shape: int) -> Tensor:
    return torch.randint(0, 256, (*shape, 3, 32, 32), dtype=torch.uint8)


def test_small_pictures_are_enlarged_pixel_by_pixel() -> None:
    images = _images(5)
    sheet = _pixels(contact_sheet(images, columns=3))
    side = 32 * _FACTOR
    assert sheet.shape == (3, _GAP + 2 * (side + _GAP), _GAP + 3 * (side + _GAP))
    for n, image in enumerate(images):
        left, top = _GAP + (side + _GAP) * (n % 3), _GAP + (side + _GAP) * (n // 3)
        cell = sheet[:, top : top + side, left : left + side]
        assert torch.equal(cell[:, 2::_FACTOR, 2::_FACTOR], image)
        assert torch.equal(cell[:, ::_FACTOR, 4::_FACTOR], image)
    assert (sheet[:, :_GAP] == 255).all()


def test_large_pictures_keep_their_size_and_may_differ() -> None:
    images = [torch.zeros(3, 200, 150, dtype=torch.uint8), torch.zeros(3, 160, 300).byte()]
    sheet = contact_sheet(images, columns=2)
    assert sheet.size == (_GAP + 2 * (300 + _GAP), _GAP + 200 + _GAP)
    assert int((_pixels(sheet)[0] == 0).sum()) == 200 * 150 + 160 * 300


def test_a_sheet_is_about_square_unless_told_otherwise() -> None:
    images = _images(8)
    assert contact_sheet(images).size == contact_sheet(images, columns=3).size


def _ink(sheet: Image.Image, area: tuple[int, int, int, int]) -> int:
    return int((np.array(sheet.crop(area).convert("L")) < 128).sum())


def test_captions_stand_below_their_own_picture_only() -> None:
    images = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    sheet = contact_sheet(images, ["the digit seven moves left", ""], columns=2)
    side = 32 * _FACTOR
    left = (_GAP, _GAP + side, _GAP + side, sheet.height)
    assert _ink(sheet, left) > 100
    assert _ink(sheet, left) == _ink(sheet, (0, 0, *sheet.size))


@pytest.mark.parametrize(
    "text", ["a few words " * 30, "x" * 300, "ab " + "w" * 40 + " cd", "short"]
)
def test_lines_fit_and_lose_no_letter_before_the_ellipsis(text: str) -> None:
    font = ImageFont.load_default(size=14)
    lines = _wrap(text, font, 160)
    assert len(lines) <= _MAX_LINES
    assert all(font.getlength(line) <= 160 for line in lines)
    shown = "".join(lines).replace(" ", "")
    whole = text.replace(" ", "")
    assert shown == whole or (shown.endswith("…") and whole.startswith(shown[:-1]))


def test_letters_beyond_ascii_are_not_all_the_same_box() -> None:
    blank = torch.full((1, 3, 150, 150), 255, dtype=torch.uint8)
    sheets = [_pixels(contact_sheet(blank, [letter])) for letter in "éЖλ"]
    assert not torch.equal(sheets[0], sheets[1])
    assert not torch.equal(sheets[1], sheets[2])


def test_a_clip_sheet_plays_all_clips_at_once() -> None:
    clips = _images(4, 3)
    labels = ["one", "two", "three", "four"]
    frames = clip_sheet(clips, labels, columns=4)
    assert len(frames) == 3
    for frame, images in zip(frames, clips.unbind(1), strict=True):
        assert frame.tobytes() == contact_sheet(images, labels, columns=4).tobytes()


def test_a_film_strip_has_a_row_per_clip_and_time_from_left_to_right() -> None:
    clips = _images(2, 4)
    sheet = _pixels(film_strip(clips, ["first", "second"]))
    side, step = 96, 98  # enlarged three times, two pixels between frames
    tops = [_GAP, _GAP + side + 3 + 17 + _GAP]
    assert sheet.shape[-1] == _GAP + 3 * step + side + _GAP
    for clip, top in zip(clips, tops, strict=True):
        for n, image in enumerate(clip):
            cell = sheet[:, top : top + side, _GAP + n * step : _GAP + n * step + side]
            assert torch.equal(cell[:, 1::3, 1::3], image)


def test_wrong_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="one text per picture: 2, got 1"):
        contact_sheet(_images(2), ["alone"])
    with pytest.raises(ValueError, match="one text per picture: 2, got 3"):
        film_strip(_images(2, 2), ["a", "b", "c"])
    with pytest.raises(ValueError, match="at least one picture"):
        contact_sheet([])
    with pytest.raises(ValueError, match="columns must be at least 1"):
        contact_sheet(_images(1), columns=0)
