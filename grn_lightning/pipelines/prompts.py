"""What published weights expect around a prompt: task tags, quality suffixes, negative prompts.

Text-conditional weights of the later kind ("full" attention) were trained on captions that begin
with a tag of their task, glued to the text; those of the first kind know no tags. Suffixes and
negative prompts are habits of published inference and not of training.
"""

from dataclasses import dataclass
from typing import Literal

Task = Literal["image", "video", "first_frame"]
"""What is drawn from text: a picture, a clip, or a clip that starts from a given picture."""


@dataclass(frozen=True, kw_only=True)
class PromptStyle:
    """What is put around a prompt, and what guidance steers away from."""

    tag: str = ""
    """Put before the prompt, without a space."""
    suffix: str = ""
    """Put behind the prompt as it is, spaces included."""
    negative: str = ""
    """Negative prompt where the user gives none; it takes neither tag nor suffix."""

    def apply(self, prompt: str) -> str:
        """Return the prompt as the generator should read it; an empty one stays empty.

        Example:
            >>> PromptStyle(tag="<T2V>", suffix=". masterpiece").apply("a cat")
            '<T2V>a cat. masterpiece'
        """
        return f"{self.tag}{prompt}{self.suffix}" if prompt else ""


PLAIN = PromptStyle()
"""Prompts as they are."""

# The published negative prompt of video is a long list of defects of quality, style, anatomy,
# motion and lettering. This is one of our own on the same subjects, so that results differ from the
# published ones wherever it matters; give `--negative_prompt` to use another.
VIDEO_DEFECTS = (
    "low quality, blurry, noisy, compression artifacts, overexposed, washed-out colours, "
    "still picture, flicker, jerky motion, deformed hands, extra limbs, distorted face, "
    "subtitles, watermark, logo"
)

PREFIX_STYLES: dict[Task, PromptStyle] = {
    "image": PLAIN,
    "video": PromptStyle(suffix=". masterpiece, high quality.", negative=VIDEO_DEFECTS),
}
"""The first published text-conditional weights: "prefix" attention, no tags."""

TAGGED_STYLES: dict[Task, PromptStyle] = {
    "image": PromptStyle(tag="<T2I>"),
    "video": PromptStyle(tag="<T2V>", suffix=". The quality is very high!", negative=VIDEO_DEFECTS),
    "first_frame": PromptStyle(
        tag="<I2V>", suffix=" high aesthetic and high quality video.", negative=VIDEO_DEFECTS
    ),
}
"""The later published text-conditional weights: "full" attention, trained with tags."""


def task_of(num_frames: int, *, has_first_frame: bool) -> Task:
    """Return what is drawn from text."""
    if has_first_frame:
        return "first_frame"
    return "image" if num_frames == 1 else "video"
