"""What a person asks for on the command line: a size in one of three ways, prompts, a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from grn_lightning.media.images import decode_image
from grn_lightning.pipelines import GeneratorPipeline, PromptStyle
from grn_lightning.pipelines.prompts import task_of
from grn_lightning.pipelines.registry import published
from grn_lightning.pipelines.resolutions import (
    MAX_FRAMES,
    STRIDE,
    frames_for,
    nearest_template,
    picture_size,
)
from grn_lightning.scripts.drawing import size_for
from grn_lightning.scripts.opening import Opened
from grn_lightning.scripts.runs import ClipSize


def read_picture(path: Path) -> Tensor:
    """Read a picture, uint8 `(3, h, w)`.

    Raises:
        ValueError: If there is none, or it does not decode.
    """
    if not path.is_file():
        raise ValueError(f"no picture at '{path}'.")
    return decode_image(path.read_bytes(), source=str(path))


@dataclass(frozen=True)
class SizeRequest:
    """A size by preset, aspect and seconds, or by frames and pixels, or not at all."""

    preset: str | None
    aspect: str | None
    seconds: float | None
    num_frames: int | None
    image_size: int | tuple[int, int] | None

    def _check(self) -> None:
        sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)
        for name, value in (("num_frames", self.num_frames), *(("image_size", x) for x in sides)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.seconds is not None and self.num_frames is not None:
            raise ValueError("give either `--seconds` or `--num_frames`, not both.")
        if self.image_size is not None and (self.preset or self.aspect):
            raise ValueError("give either `--preset` with `--aspect` or `--image_size`, not both.")

    def resolve(self, opened: Opened, *, fps: float, picture: Tensor | None) -> ClipSize:
        """Return the size in frames and pixels.

        Args:
            opened: Who draws; published weights know their usual size, runs that of their training.
            fps: Frames per second.
            picture: First frame; its aspect is taken where a preset comes without one.

        Raises:
            ValueError: If options contradict each other, or the generator cannot draw the size.
        """
        self._check()
        preset, aspect, seconds = self.preset, self.aspect, self.seconds
        usual = None if opened.weights is None else published(opened.weights).size
        if usual is not None and self.image_size is None:
            preset = preset or usual[0]
            aspect = aspect or (usual[1] if picture is None else None)
        if usual is not None and self.num_frames is None and seconds is None:
            seconds = usual[2]
        if aspect is not None and preset is None:
            raise ValueError("`--aspect` needs a resolution: `--preset`, such as 0.25M.")
        image_size, num_frames = self.image_size, self.num_frames
        config = opened.pipeline.tokenizer.config
        if preset is not None:
            if config.spatial_stride != STRIDE:
                raise ValueError(
                    f"presets are for tokenizers with {STRIDE} pixels per latent position, this "
                    f"one has {config.spatial_stride}; give `--image_size`."
                )
            if aspect is None and picture is not None:
                aspect = nearest_template(*picture.shape[1:])
            image_size = picture_size(preset, aspect or "1:1")
        if seconds is not None:
            num_frames = frames_for(
                seconds,
                fps=fps,
                stride=config.temporal_stride,
                max_frames=None if opened.weights is None else MAX_FRAMES,
            )
        source = {} if opened.run is None else opened.run.source()
        return size_for(
            opened.pipeline, opened.run, source, num_frames=num_frames, image_size=image_size
        )


def style_and_task(
    pipeline: GeneratorPipeline, size: ClipSize, *, has_first_frame: bool
) -> tuple[PromptStyle, str]:
    """Return what belongs around prompts, and what is drawn: "class" or a task.

    Raises:
        ValueError: If the weights do not draw that.
    """
    if not pipeline.is_text:
        return PromptStyle(), "class"
    style = pipeline.style(size.num_frames, has_first_frame=has_first_frame)
    return style, task_of(size.num_frames, has_first_frame=has_first_frame)


def as_asked(
    wanted: Mapping[str, Sequence[Any]],
    pipeline: GeneratorPipeline,
    *,
    style: PromptStyle,
    picture: Tensor | None,
    size: ClipSize,
) -> dict[str, Sequence[Any]]:
    """Return conditions as the generator wants them: styled prompts, the picture as codes.

    Raises:
        ValueError: If a picture is given to a generator that continues none.
    """
    if "captions" not in wanted and picture is None:
        return dict(wanted)
    captions = list(wanted.get("captions", []))
    asked: dict[str, Any] = {"captions": [style.apply(caption) for caption in captions]}
    if picture is not None:
        first_frame = pipeline.first_frame([picture], size=(size.height, size.width))
        asked["first_frames"] = first_frame.expand(len(captions), *first_frame.shape[1:])
    return asked
