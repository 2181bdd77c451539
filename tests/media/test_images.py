"""Bytes become the picture a person sees, and tensors survive the way to bytes and back."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from grn_lightning.media.images import (
    center_crop_resize,
    decode_image,
    encode_jpeg,
    encode_png,
    fit_short_side,
    to_float,
    to_picture,
    to_uint8,
)


def _save(picture: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=format, **options)
    return buffer.getvalue()


def test_png_round_trip_is_exact() -> None:
    image = torch.randint(0, 256, (3, 17, 23), dtype=torch.uint8)
    decoded = decode_image(encode_png(image))
    assert decoded.is_contiguous()
    assert torch.equal(decoded, image)


def test_jpeg_keeps_a_smooth_picture_within_a_few_levels() -> None:
    ramp = torch.linspace(0, 255, 64).expand(3, 48, 64).to(torch.uint8)
    error = (decode_image(encode_jpeg(ramp)).int() - ramp.int()).abs()
    assert error.max() <= 4


def test_every_level_survives_float_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    values = to_float(levels)
    assert values.min() == -1
    assert values.max() == 1
    assert torch.equal(to_uint8(values), levels)


def test_to_uint8_rounds_and_clamps() -> None:
    values = torch.tensor([-2.0, -1 + 0.6 / 127.5, -1 + 0.4 / 127.5, 2.0])
    assert to_uint8(values).tolist() == [0, 1, 0, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    seen = np.zeros((8, 16, 3), np.uint8)
    seen[:4, :4] = 255  # a white mark at the top left of what a person sees
    stored = {
        1: seen,
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.transpose(1, 0, 2),
        6: np.rot90(seen, 1),  # "rotate 90 clockwise to view"
        7: seen.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(seen, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _save(Image.fromarray(np.ascontiguousarray(stored[orientation])), exif=exif)
    assert torch.equal(decode_image(data), torch.from_numpy(seen).permute(2, 0, 1))


def test_transparency_lies_over_white() -> None:
    layer = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    layer.putpixel((1, 0), (0, 0, 255, 255))
    assert decode_image(_save(layer))[:, 0].T.tolist() == [[255, 255, 255], [0, 0, 255]]
    gray = Image.new("LA", (1, 1), (0, 0))
    assert decode_image(_save(gray)).flatten().tolist() == [255] * 3


def test_palette_with_a_transparent_colour() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putpixel((1, 0), 1)
    decoded = decode_image(_save(picture, transparency=0))
    assert decoded[:, 0].T.tolist() == [[255, 255, 255], [200, 100, 50]]


def test_sixteen_bit_gray_keeps_its_contrast() -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    decoded = decode_image(_save(Image.fromarray(values)))
    assert decoded.shape == (3, 1, 6)
    assert decoded[0, 0].tolist() == [0, 0, 1, 1, 128, 255]


@pytest.mark.parametrize(("mode", "colour"), [("L", 77), ("1", 1), ("CMYK", (0, 255, 255, 0))])
def test_other_colour_models_become_rgb(mode: str, colour: object) -> None:
    decoded = decode_image(_save(Image.new(mode, (4, 4), colour), "TIFF"))
    expected = {"L": [77] * 3, "1": [255] * 3, "CMYK": [255, 0, 0]}[mode]
    assert decoded[:, 2, 2].tolist() == expected


def test_damaged_bytes_are_refused_by_name() -> None:
    data = encode_png(torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"cats/a\.png \(1000 bytes\) does not decode"):
        decode_image(data[:1000], source="cats/a.png")
    with pytest.raises(ValueError, match=r"image \(17 bytes\) is no picture of a known format"):
        decode_image(b"no picture at all")
    with pytest.raises(ValueError, match="floating point"):
        decode_image(_save(Image.new("F", (2, 2)), "TIFF"))


def test_png_wants_uint8_rgb() -> None:
    with pytest.raises(ValueError, match=r"uint8 \(3, h, w\), got torch.float32 \(3, 4, 4\)"):
        encode_png(torch.zeros(3, 4, 4))


@pytest.mark.parametrize("size", [(8, 8), (8, 20), (30, 7), (64, 64), (33, 47)])
def test_crop_covers_the_size_and_keeps_the_centre(size: tuple[int, int]) -> None:
    images = torch.zeros(2, 5, 3, 33, 47, dtype=torch.uint8)
    images[..., 13:20, 20:27] = 255  # a mark in the centre
    cropped = center_crop_resize(images, size)
    assert cropped.shape == (2, 5, 3, *size)
    assert cropped.dtype == torch.uint8
    weights = cropped[0, 0, 0].double()
    rows = (weights.sum(1) * torch.arange(size[0])).sum() / weights.sum()
    columns = (weights.sum(0) * torch.arange(size[1])).sum() / weights.sum()
    assert abs(float(rows) - (size[0] - 1) / 2) <= 0.75
    assert abs(float(columns) - (size[1] - 1) / 2) <= 0.75


def test_shrinking_averages_instead_of_picking_pixels() -> None:
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 255
    small = center_crop_resize(stripes, (16, 16))
    assert (small[..., 2:-2].int() - 127).abs().max() <= 2


@pytest.mark.parametrize("size", [(16, 12), (40, 57)])
def test_scaling_agrees_with_pil(size: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, 6, 9), dtype=torch.uint8)
    image = image.repeat_interleave(5, 1).repeat_interleave(5, 2)  # 30 x 45
    cover = max(size[0] / 30, size[1] / 45)
    height, width = max(size[0], round(30 * cover)), max(size[1], round(45 * cover))
    scaled = to_picture(image).resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    expected = torch.from_numpy(np.array(scaled)).permute(2, 0, 1)
    expected = expected[:, top : top + size[0], left : left + size[1]]
    assert (center_crop_resize(image, size).int() - expected.int()).abs().max() <= 1


def test_the_right_size_is_left_alone() -> None:
    images = torch.randint(0, 256, (3, 9, 9), dtype=torch.uint8)
    assert center_crop_resize(images, (9, 9)) is images
    with pytest.raises(ValueError, match="at least 1"):
        center_crop_resize(images, (0, 4))


def test_short_side_is_exact_and_nothing_is_enlarged() -> None:
    for height in range(40, 80):
        for width in range(40, 80):
            assert min(fit_short_side(height, width, short_side=40)) == 40
            assert fit_short_side(height, width, short_side=80) == (height, width)
