"""The tasks of `grn edit` as plain data: what is to be done to which files, and doing it.

A plan holds all that decides the result beside weights, prompt and noise, so that a recipe can keep
it and `grn replay` can carry it out again.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from grn_lightning.media.images import center_crop_resize, decode_image, to_float
from grn_lightning.media.video import decode_video
from grn_lightning.pipelines.conditions import Condition
from grn_lightning.pipelines.editing import (
    DrawJob,
    Edited,
    InpaintConfig,
    extend,
    frames,
    inpaint,
    outpaint,
    swap,
    vary,
)
from grn_lightning.pipelines.generator import GeneratorPipeline
from grn_lightning.samplers import EditConfig

Task = Literal["inpaint", "outpaint", "frames", "extend", "vary", "swap"]
TASKS: tuple[str, ...] = get_args(Task)

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_WHITE = 128  # a mask is True from here on

_OPTIONS: dict[str, tuple[str, ...]] = {
    "inpaint": ("source", "mask", "box", "edges"),
    "outpaint": ("source", "borders", "edges"),
    "frames": ("first", "last"),
    "extend": ("source", "num_frames", "overlap"),
    "vary": ("source", "start_time"),
    "swap": ("source", "source_condition", "rules"),
}
"""What a task reads of a plan."""


@dataclass(frozen=True, kw_only=True)
class EditPlan:
    """What is to be done; a task reads the fields of `_OPTIONS`."""

    task: Task
    """What is to be done."""
    size: tuple[int, int, int]
    """Frames, height and width of what is drawn at a time, the borders of outpainting left out."""
    source: str | None = None
    """File of the picture or clip that is edited."""
    mask: str | None = None
    """File of a picture, white where pixels are drawn anew."""
    first: str | None = None
    """File of the first frame."""
    last: str | None = None
    """File of the last frame."""
    box: tuple[int, int, int, int] | None = None
    """Pixels that are drawn anew: top, left, height and width."""
    borders: tuple[int, int, int, int] | None = None
    """Pixels to add on the left, on the right, above and below."""
    num_frames: int | None = None
    """Frames of an extended clip, the given ones included."""
    overlap: int | None = None
    """Frames of a window that are known."""
    start_time: float | None = None
    """Share of the given elements that a variation begins with."""
    source_condition: dict[str, Any] | None = None
    """What the source of a swap shows: `captions` or `class_labels`, one value."""
    edges: InpaintConfig = field(default_factory=InpaintConfig)
    """How what is drawn meets what is given."""
    rules: EditConfig = field(default_factory=EditConfig)
    """Which elements a swap may change."""

    def __post_init__(self) -> None:
        """Refuse what the task does not read, and what it lacks."""
        if self.task not in TASKS:
            raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {self.task!r}.")
        plain = {one.name: getattr(self, one.name) for one in fields(self)[2:]}
        ignored = {"edges": InpaintConfig(), "rules": EditConfig()}
        known = _OPTIONS[self.task]
        extra = [
            name
            for name, value in plain.items()
            if name not in known and value is not None and value != ignored.get(name)
        ]
        if extra:
            readers = [task for task in TASKS if extra[0] in _OPTIONS[task]]
            raise ValueError(
                f"`{extra[0]}` is for {' and '.join(readers)}; {self.task} does not read it."
            )
        self._check_complete()

    def _check_complete(self) -> None:
        lacks = {
            "inpaint": [
                (self.source is None, "`--source`, the picture or clip"),
                (
                    (self.mask is None) == (self.box is None),
                    "either `--mask`, a picture that is white where it is drawn anew, or `--box`",
                ),
            ],
            "outpaint": [
                (self.source is None, "`--source`, the picture or clip"),
                (self.borders is None, "`--borders`, pixels on the left, right, above and below"),
            ],
            "frames": [(self.first is None and self.last is None, "`--first` or `--last`")],
            "extend": [(self.source is None, "`--source`, the clip that goes on")],
            "vary": [(self.source is None, "`--source`, the picture or clip")],
            "swap": [(self.source_condition is None, "what the source shows, `--source_prompt`")],
        }
        missing = [what for is_missing, what in lacks[self.task] if is_missing]
        if missing:
            raise ValueError(f"{self.task} needs {'; and '.join(missing)}.")

    @property
    def files(self) -> dict[str, Path]:
        """The files that it reads, by role."""
        roles = {role: getattr(self, role) for role in ("source", "mask", "first", "last")}
        return {role: Path(file) for role, file in roles.items() if file is not None}

    def as_plain(self) -> dict[str, Any]:
        """Return what the task reads, as plain data."""
        plain = asdict(self)
        read = ("task", "size", *_OPTIONS[self.task])
        return {name: plain[name] for name in read if plain[name] is not None}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """Return the plan of plain data."""
        values = dict(plain)
        for name in ("size", "box", "borders"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        kinds: dict[str, Callable[..., Any]] = {"edges": InpaintConfig, "rules": EditConfig}
        values |= {name: kind(**values[name]) for name, kind in kinds.items() if name in values}
        return cls(**values)


# --- files ----------------------------------------------------------------------------------------


def read_frames(file: Path, *, num_frames: int | None, size: tuple[int, int]) -> Tensor:
    """Read a picture, or a clip from its beginning.

    Args:
        file: Any format that PIL or FFmpeg reads.
        num_frames: Frames to take of a video; None takes all. A picture has one.
        size: Height and width to scale and crop to.

    Returns:
        Float `(1, 3, f, h, w)` in [-1, 1].

    Raises:
        ValueError: If there is no such file, or it cannot be read.
    """
    if not file.is_file():
        raise ValueError(f"there is no file '{file}'.")
    if file.suffix.lower() in _PICTURES:
        pictures = center_crop_resize(decode_image(file.read_bytes(), source=str(file)), size)
        pictures = pictures.unsqueeze(0)
    else:
        pictures = decode_video(file, fps=None, num_frames=num_frames, size=size)
    return to_float(pictures).transpose(0, 1).unsqueeze(0)


def _mask(plan: EditPlan, size: tuple[int, int]) -> Tensor:
    """Return where pixels are drawn anew, `(1, 1, h, w)` bool."""
    mask = torch.zeros(1, 1, *size, dtype=torch.bool)
    if plan.mask is not None:
        levels = read_frames(Path(plan.mask), num_frames=1, size=size).mean(1)
        return levels > 2 * _WHITE / 255 - 1
    assert plan.box is not None, "the plan was looked at"
    top, left, height, width = plan.box
    mask[..., top : top + height, left : left + width] = True
    return mask


def _last_frame(file: str, size: tuple[int, int]) -> Tensor:
    return read_frames(Path(file), num_frames=None, size=size)[:, :, -1:]


# --- doing it -------------------------------------------------------------------------------------


def carry_out(
    pipeline: GeneratorPipeline,
    plan: EditPlan,
    condition: Condition,
    job: DrawJob,
) -> Edited:
    """Do what a plan says.

    Args:
        pipeline: Networks and sampler.
        plan: What is to be done.
        condition: What the result shall show.
        job: Whose noise, how many steps.

    Raises:
        ValueError: If files cannot be read, or sizes do not fit.
    """
    length, area = plan.size[0], plan.size[1:]
    clips = None
    if plan.source is not None:
        wanted = None if plan.task == "extend" else length
        clips = read_frames(Path(plan.source), num_frames=wanted, size=area).to(pipeline.device)
    if plan.task == "frames":
        read = {
            "first": None
            if plan.first is None
            else read_frames(Path(plan.first), num_frames=1, size=area).to(pipeline.device),
            "last": None if plan.last is None else _last_frame(plan.last, area).to(pipeline.device),
        }
        return frames(pipeline, **read, num_frames=length, condition=condition, job=job)
    if plan.task == "swap":
        assert plan.source_condition is not None, "the plan was looked at"
        source = {name: [value] for name, value in plan.source_condition.items()}
        return swap(
            pipeline,
            source=pipeline.condition(source),
            target=condition,
            size=plan.size,
            job=job,
            clips=clips,
            config=plan.rules,
        )
    assert clips is not None, "the plan was looked at"
    if plan.task == "inpaint":
        mask = _mask(plan, area).to(pipeline.device)
        return inpaint(pipeline, clips, mask, condition, job, plan.edges)
    if plan.task == "outpaint":
        assert plan.borders is not None, "the plan was looked at"
        return outpaint(pipeline, clips, plan.borders, condition, job, plan.edges)
    if plan.task == "vary":
        time = 0.5 if plan.start_time is None else plan.start_time
        return vary(pipeline, clips, condition, job, start_time=time)
    return _extend(pipeline, plan, clips, condition, job)


def _extend(
    pipeline: GeneratorPipeline, plan: EditPlan, clips: Tensor, condition: Condition, job: DrawJob
) -> Edited:
    overlap = 1 if plan.overlap is None else plan.overlap
    step = plan.size[0] - overlap
    return extend(
        pipeline,
        clips,
        num_frames=clips.shape[2] + step if plan.num_frames is None else plan.num_frames,
        window=plan.size[0],
        overlap=overlap,
        condition=condition,
        job=job,
    )
