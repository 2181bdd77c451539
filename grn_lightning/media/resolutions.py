"""Sizes that published weights know: resolution preset x aspect template, and durations.

A preset is a number of latent positions, a template a ratio of height to width; together they give
the rows and columns of one latent frame (GRN, dynamic resolution), 16 pixels each. Aspects are
written here as people write them, width before height: 16:9 lies, 9:16 stands.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

PRESETS = {"0.06M": 16, "0.25M": 32, "0.41M": 40, "0.92M": 60, "1M": 64, "2M": 90}
"""Side of a square picture in latent positions, by the name of the preset."""

STRIDE = 16
"""Pixels per latent position of the published tokenizers, down and across."""

_ENLARGEMENT = 0.7  # pixels of a picture per pixel of the largest preset it is taken at

TEMPLATES: dict[str, float] = {
    "1:3": 3.0,
    "2:5": 5 / 2,
    "1:2": 2.0,
    "9:16": 16 / 9,
    "2:3": 3 / 2,
    "3:4": 4 / 3,
    "1:1.16": 1.16,
    "1:1": 1.0,
    "1.16:1": 1 / 1.16,
    "4:3": 3 / 4,
    "3:2": 2 / 3,
    "16:9": 9 / 16,
    "2:1": 1 / 2,
    "5:2": 2 / 5,
    "3:1": 1 / 3,
}
"""Ratio of height to width of every template, by its name (width:height), tallest first."""

FPS = 16
"""Frames per second of published video."""

MAX_FRAMES = 81
"""Longest published clip, 5 seconds."""


class PictureSize(NamedTuple):
    """Size in pixels."""

    height: int
    width: int


def _issue(what: str, got: object, known: object) -> str:
    return f"unknown {what} {got!r}; known are {', '.join(map(str, known))}."  # type: ignore[call-overload]


def latent_size(preset: str, template: str) -> tuple[int, int]:
    """Return rows and columns of one latent frame.

    Args:
        preset: One of `PRESETS`.
        template: One of `TEMPLATES`.

    Raises:
        ValueError: If either is unknown.

    Example:
        >>> latent_size("0.41M", "16:9")
        (30, 53)
    """
    if preset not in PRESETS:
        raise ValueError(_issue("resolution preset", preset, PRESETS))
    if template not in TEMPLATES:
        raise ValueError(_issue("aspect template", template, TEMPLATES))
    ratio = TEMPLATES[template]
    columns = math.sqrt(PRESETS[preset] ** 2 / ratio)
    return round(columns * ratio), round(columns)  # half to even, as in the published table


def picture_size(preset: str, aspect: str = "1:1") -> PictureSize:
    """Return the size in pixels of a preset and an aspect.

    Args:
        preset: One of `PRESETS`.
        aspect: Width to height, such as "16:9" or "640:480"; the nearest template is taken.

    Raises:
        ValueError: If the preset is unknown, or the aspect is none.

    Example:
        >>> picture_size("0.41M", "16:9")
        PictureSize(height=480, width=848)
    """
    rows, columns = latent_size(preset, nearest_template(*_parse_aspect(aspect)))
    return PictureSize(STRIDE * rows, STRIDE * columns)


def _parse_aspect(aspect: str) -> tuple[float, float]:
    """Return height and width of "width:height"."""
    parts = aspect.split(":")
    try:
        width, height = (float(part) for part in parts)
    except ValueError:
        width = height = 0.0
    if not (0 < width < math.inf and 0 < height < math.inf):
        raise ValueError(f"`aspect` must be width:height, such as 16:9, got {aspect!r}.")
    return height, width


def nearest_template(
    height: float, width: float, *, measure: Literal["ratio", "difference"] = "ratio"
) -> str:
    """Return the name of the template that is nearest to a picture.

    Args:
        height: Height, in any unit.
        width: Width, in the same unit.
        measure: "ratio" compares by factors, so that a picture and the same one on its side get
            templates that mirror each other. "difference" is the published rule: it compares
            heights over widths by subtraction and treats lying pictures more finely than standing
            ones, so that near the middle between two templates the choice is another.

    Raises:
        ValueError: If the picture is more than twice as long as the longest template.

    Example:
        >>> nearest_template(1080, 1920)
        '16:9'
    """
    ratio = height / width
    longest = max(TEMPLATES.values())
    if not 1 / (2 * longest) <= ratio <= 2 * longest:
        raise ValueError(
            f"an aspect must be between {2 * longest:g}:1 and 1:{2 * longest:g}, got "
            f"{width:g}:{height:g}; crop the picture."
        )
    if measure == "difference":
        return min(TEMPLATES, key=lambda name: abs(TEMPLATES[name] - ratio))
    return min(TEMPLATES, key=lambda name: abs(math.log(TEMPLATES[name] / ratio)))


def frames_for(
    seconds: float, *, fps: float = FPS, stride: int = 4, max_frames: int | None = MAX_FRAMES
) -> int:
    """Return the number of frames of a clip that lasts about so long.

    Args:
        seconds: Duration from the first frame to the last; 0 is a picture.
        fps: Frames per second.
        stride: Frames per latent frame.
        max_frames: Most frames that the weights know; None is no limit.

    Returns:
        `1 + stride * k`, nearest to `seconds * fps + 1`.

    Raises:
        ValueError: If the clip would be longer than the weights know, or has no duration.

    Example:
        >>> frames_for(2)
        33
    """
    if not 0 <= seconds < math.inf or not 0 < fps < math.inf:
        raise ValueError(
            f"`seconds` must be at least 0 and `fps` positive, got {seconds:g} and {fps:g}."
        )
    num_frames = 1 + stride * math.floor(seconds * fps / stride + 0.5)
    if max_frames is not None and num_frames > max_frames:
        raise ValueError(
            f"`seconds` must be at most {(max_frames - 1) / fps:g} at {fps:g} frames per second "
            f"({max_frames} frames), got {seconds:g}; the weights know no longer clips."
        )
    return num_frames


def fitting_presets(height: int, width: int, presets: Mapping[str, float]) -> dict[str, float]:
    """Return the presets that a picture is large enough for.

    A preset is left out if it has more than 1 / 0.7 times the pixels of the picture, the published
    rule; where all are, the smallest stays.

    Args:
        height: Height in pixels.
        width: Width in pixels.
        presets: Presets of `PRESETS`, with weights.

    Raises:
        ValueError: If a preset is unknown, or there is none.

    Example:
        >>> fitting_presets(480, 640, {"0.06M": 1.0, "0.25M": 2.0, "1M": 1.0})
        {'0.06M': 1.0, '0.25M': 2.0}
    """
    for preset in presets:
        if preset not in PRESETS:
            raise ValueError(_issue("resolution preset", preset, PRESETS))
    if not presets:
        raise ValueError(f"at least one preset is needed of {', '.join(PRESETS)}.")
    limit = height * width / _ENLARGEMENT
    fitting = {
        preset: weight
        for preset, weight in presets.items()
        if (PRESETS[preset] * STRIDE) ** 2 <= limit
    }
    smallest = min(presets, key=PRESETS.__getitem__)
    return fitting or {smallest: presets[smallest]}
