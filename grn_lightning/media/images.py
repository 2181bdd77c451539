"""Pictures: encoded bytes, uint8 tensors in [0, 255] and float tensors in [-1, 1]."""

import io
import math

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn.functional import interpolate

NOTE_KEY = "grn"
"""Keyword of the text chunk that holds a note in a PNG."""

_WIDE_GRAY = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # PIL's names of 16-bit gray pictures


def _wide_gray_to_rgb(picture: Image.Image) -> Image.Image:
    """Scale 16-bit gray to 8 bits; PIL's own conversion would clip everything above 255."""
    values = np.asarray(picture).astype(np.int64).clip(0, 65535)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in _WIDE_GRAY:
        return _wide_gray_to_rgb(picture)
    if picture.mode == "F":
        raise ValueError("floating point pixels have no agreed range; convert the file first")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        paper = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(paper, layer).convert("RGB")
    return picture.convert("RGB")


def decode_image(data: bytes, *, source: str = "image") -> Tensor:
    """Decode a whole picture (first frame of an animation) as people see it.

    The orientation in the EXIF data is applied, transparency lies over white, and gray, 16-bit
    gray, palette and CMYK pictures become RGB.

    Args:
        data: An encoded file of any format that PIL reads (JPEG, PNG, WebP, ...).
        source: What to call the picture in an error, usually the name of the file.

    Returns:
        uint8 ``(3, h, w)`` in [0, 255].

    Raises:
        ValueError: If the bytes cannot be decoded to the last row.
    """
    try:
        with Image.open(io.BytesIO(data)) as file:
            picture = _to_rgb(ImageOps.exif_transpose(file))
    except UnidentifiedImageError as error:
        raise ValueError(f"{source} ({len(data)} bytes) is no picture of a known format") from error
    except Exception as error:  # damaged files raise OSError, SyntaxError, struct.error, zlib.error
        kind = type(error).__name__
        raise ValueError(
            f"{source} ({len(data)} bytes) does not decode: {kind}: {error}"
        ) from error
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def to_picture(image: Tensor) -> Image.Image:
    """Wrap a uint8 ``(3, h, w)`` tensor as a PIL picture.

    Raises:
        ValueError: If the tensor has another shape or type.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        got = f"{image.dtype} {tuple(image.shape)}"
        raise ValueError(f"a picture must be uint8 (3, h, w), got {got}; see to_uint8.")
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def encode_png(image: Tensor, *, note: str | None = None) -> bytes:
    """Encode a uint8 ``(3, h, w)`` tensor without loss.

    Args:
        image: uint8 ``(3, h, w)``.
        note: Text that travels in the file; `media.notes.read_note` finds it.
    """
    buffer, info = io.BytesIO(), PngInfo()
    if note is not None:
        info.add_itxt(NOTE_KEY, note)
    to_picture(image).save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def encode_jpeg(image: Tensor, *, quality: int = 95) -> bytes:
    """Encode a uint8 ``(3, h, w)`` tensor as JPEG with full colour resolution (4:4:4)."""
    buffer = io.BytesIO()
    to_picture(image).save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale uint8 ``(n, 3, h, w)``; the same as torchvision's, which takes 2 seconds to import."""
    if images.device.type == "cpu":  # integer arithmetic, four times as fast as by floats
        return interpolate(images, size, mode="bicubic", antialias=True)
    floats = interpolate(images.float(), size, mode="bicubic", antialias=True)
    return floats.clamp(0, 255).round().to(torch.uint8)


def center_crop_resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale pictures until they just cover ``size`` and cut the centre out.

    Bicubic with antialiasing; pictures that have the size already are returned as they are.

    Args:
        images: uint8 ``(..., 3, h, w)``.
        size: Height and width of the result.

    Returns:
        uint8 ``(..., 3, *size)``.

    Raises:
        ValueError: If a side of ``size`` is smaller than 1.
    """
    if min(size) < 1:
        raise ValueError(f"size must hold a height and a width of at least 1, got {tuple(size)}.")
    height, width = images.shape[-2:]
    if (height, width) == tuple(size):
        return images
    scale = max(size[0] / height, size[1] / width)
    # Rounding could leave a side one pixel short of the target.
    cover = (max(round(height * scale), size[0]), max(round(width * scale), size[1]))
    scaled = _resize(images.reshape(-1, 3, height, width), cover)
    top, left = (cover[0] - size[0]) // 2, (cover[1] - size[1]) // 2
    cropped = scaled[..., top : top + size[0], left : left + size[1]]
    return cropped.reshape(*images.shape[:-2], *size).contiguous()


def fit_short_side(height: int, width: int, *, short_side: int) -> tuple[int, int]:
    """Give the size of a picture scaled so that its shorter side is ``short_side``.

    Pictures are never enlarged.

    Example:
        >>> fit_short_side(480, 848, short_side=240)
        (240, 424)
        >>> fit_short_side(100, 50, short_side=64)
        (100, 50)
    """
    scale = min(1.0, short_side / min(height, width))
    return math.floor(height * scale + 0.5), math.floor(width * scale + 0.5)


def to_float(images: Tensor) -> Tensor:
    """Map uint8 [0, 255] to float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Map float [-1, 1] to uint8 [0, 255]: clamp, then round to the nearest level."""
    return ((images.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
