"""Editing by refinement: what is known of a picture or clip stays, the rest is drawn.

Every edit is a draw under a `Constraint`, or two draws side by side; none needs a model of its own:

    inpaint    draw what a mask covers, keep the rest
    outpaint   draw what lies around a picture
    frames     draw the clip that begins or ends with given pictures
    extend     draw what comes after a clip, window by window
    vary       begin in the middle: noise a picture to a time, refine it from there
    swap       let one prompt become another, and change no more than that takes (`samplers.edit`)

Given pixels are encoded by the tokenizer, so that what comes back of them is its reconstruction,
unless they are put back (`blend`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from grn_lightning.functional.masks import feather, latent_mask
from grn_lightning.models.grn_text import GRNText
from grn_lightning.pipelines.conditions import Condition, prepare_text
from grn_lightning.pipelines.generator import Drawn, GeneratorPipeline
from grn_lightning.samplers import Constraint, EditConfig, EditStep, RefineConfig, StepInfo, edit

_WINDOW_INDICES = 2**40  # the n-th window of sample i has the noise of sample i + n 2^40


@dataclass(frozen=True, kw_only=True)
class DrawJob:
    """What all edits have in common: whose noise, how many steps, who watches."""

    sample_index: Tensor
    """`(b,)` long: names the noise of each sample."""
    seed: int = 0
    """Seed of the job."""
    config: RefineConfig | None = None
    """Steps, guidance, temperature; those of the pipeline by default."""
    null_condition: Condition | None = None
    """What guidance steers away from; the null class or the empty prompt by default."""
    observer: Callable[[StepInfo], None] | None = None
    """Called after every step."""

    def arguments(self) -> dict[str, Any]:
        """Return what `GeneratorPipeline.draw` takes, but the sample index."""
        names = ("seed", "config", "null_condition", "observer")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Edited:
    """What came out of an edit, and what went in."""

    clips: Tensor
    """`(b, 3, f, h, w)` in [-1, 1]."""
    before: Tensor
    """`(b, 3, f, h, w)` in [-1, 1]: what was given or, for prompts alone, the source. Pixels that
    were not given are gray."""
    elements: Tensor
    """`(b, c, *grid)` long: what was drawn, the known ones included; of the last window, where
    there are several."""
    num_steps: Tensor
    """`(b,)` long: steps of each sample, over all windows."""


def _size(clips: Tensor) -> tuple[int, int, int]:
    frames, height, width = clips.shape[2:]
    return frames, height, width


def _draw(
    pipeline: GeneratorPipeline,
    condition: Condition,
    size: tuple[int, int, int],
    constraint: Constraint,
    job: DrawJob,
) -> Drawn:
    index = job.sample_index.to(pipeline.device)
    return pipeline.draw(condition, index, size=size, constraint=constraint, **job.arguments())


def _as_grid(pipeline: GeneratorPipeline, positions: Tensor) -> Tensor:
    """Return positions `(b, f', h', w')` as a mask of elements `(b, 1, *grid)`."""
    return positions.unsqueeze(1) if pipeline.is_text else positions


# --- space ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class InpaintConfig:
    """How what is drawn meets what is given."""

    grow: int = 0
    """Latent positions by which the mask is spread before drawing."""
    blend: int | None = 0
    """Pixels around the mask over which given and drawn ones are blended: 0 puts the given pixels
    back up to the edge, None leaves all to the decoder."""
    mode: Literal["clean", "renoised"] = "clean"
    """Whether known elements stand in every step as they are, or with probability t like those
    that are drawn."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        issues = []
        if self.grow < 0:
            issues.append(f"grow must be at least 0, got {self.grow}")
        if self.blend is not None and self.blend < 0:
            issues.append(f"blend must be at least 0 or null, got {self.blend}")
        if self.mode not in ("clean", "renoised"):
            issues.append(f"mode must be 'clean' or 'renoised', got {self.mode!r}")
        if issues:
            raise ValueError("InpaintConfig: " + "; ".join(issues) + ".")


def inpaint(
    pipeline: GeneratorPipeline,
    clips: Tensor,
    mask: Tensor,
    condition: Condition,
    job: DrawJob,
    config: InpaintConfig | None = None,
) -> Edited:
    """Draw what a mask covers anew, and keep the rest.

    Args:
        pipeline: Networks and sampler.
        clips: Given ones `(b, 3, f, h, w)` in [-1, 1]; one row serves all samples.
        mask: `(b | 1, f | 1, h, w)` bool, True where pixels are drawn anew.
        condition: What the result shall show.
        job: Whose noise, how many steps.
        config: How both parts meet.

    Raises:
        ValueError: If the mask has another size, or covers nothing that could be drawn.
    """
    config = config or InpaintConfig()
    count = len(job.sample_index)
    clips = clips.expand(count, *clips.shape[1:])
    if mask.shape[-2:] != clips.shape[-2:] or mask.shape[1] not in (1, clips.shape[2]):
        raise ValueError(
            f"the mask must be of the size of the clips, {_size(clips)}, or one picture for all "
            f"frames, got {tuple(mask.shape[1:])}."
        )
    mask = mask.expand(count, clips.shape[2], -1, -1)
    if not mask.any():
        raise ValueError("the mask covers nothing; True (white) marks what is drawn anew.")
    sizes = pipeline.tokenizer.config
    drawn_positions = latent_mask(
        mask,
        temporal_stride=sizes.temporal_stride,
        spatial_stride=sizes.spatial_stride,
        grow=config.grow,
    )
    known = _as_grid(pipeline, ~drawn_positions)
    constraint = Constraint(pipeline.tokenize(clips), known, mode=config.mode)
    drawn = _draw(pipeline, condition, _size(clips), constraint, job)
    result = drawn.clips
    if config.blend is not None:
        weight = feather(mask, radius=config.blend).unsqueeze(1)
        # Not a sum of products: where the weight is 0, the given pixel comes back as it was.
        result = torch.where(weight > 0, torch.lerp(clips, result, weight), clips)
    before = clips.masked_fill(mask.unsqueeze(1), 0.0)
    return Edited(result, before, drawn.elements, drawn.num_steps)


def outpaint(
    pipeline: GeneratorPipeline,
    clips: Tensor,
    borders: tuple[int, int, int, int],
    condition: Condition,
    job: DrawJob,
    config: InpaintConfig | None = None,
) -> Edited:
    """Draw what lies around pictures or clips.

    Args:
        pipeline: Networks and sampler.
        clips: Given ones `(b, 3, f, h, w)` in [-1, 1].
        borders: Pixels to add on the left, on the right, above and below.
        condition: What the result shall show.
        job: Whose noise, how many steps.
        config: How both parts meet.

    Raises:
        ValueError: If a border is negative, or the whole does not fit the tokenizer.
    """
    if min(borders) < 0 or not any(borders):
        raise ValueError(
            "borders must be pixels (left, right, above, below), at least one of them positive, "
            f"got {tuple(borders)}."
        )
    left, right, above, below = borders
    inside = torch.zeros(1, 1, *clips.shape[-2:], device=clips.device)
    mask = F.pad(inside, (left, right, above, below), value=1.0) > 0
    # The encoder sees a border too; repeated pixels tell it less wrong than black ones.
    canvas = F.pad(clips, (left, right, above, below, 0, 0), mode="replicate")
    return inpaint(pipeline, canvas, mask, condition, job, config)


# --- time -----------------------------------------------------------------------------------------


def _still_latent(pipeline: GeneratorPipeline, picture: Tensor) -> Tensor:
    """Return the elements `(b, c, 1, h', w')` of a latent frame in which nothing moves."""
    num_frames = 1 + 2 * pipeline.tokenizer.config.temporal_stride
    return pipeline.tokenize(picture.expand(-1, -1, num_frames, -1, -1))[:, :, -1:]


def frames(
    pipeline: GeneratorPipeline,
    *,
    first: Tensor | None,
    last: Tensor | None,
    num_frames: int,
    condition: Condition,
    job: DrawJob,
) -> Edited:
    """Draw clips that begin with a picture, end with one, or both; for any model of clips.

    The last latent frame stands for several frames, in which the last picture holds still.

    Args:
        pipeline: Networks and sampler.
        first: `(b, 3, 1, h, w)` in [-1, 1], or None; one row serves all samples.
        last: The same.
        num_frames: Frames of the clips.
        condition: What they shall show.
        job: Whose noise, how many steps.

    Raises:
        ValueError: If there is neither picture, they differ in size, or the model draws no clips.
    """
    _check_clips(pipeline)
    given = [one for one in (first, last) if one is not None]
    if not given or given[0].shape != given[-1].shape:
        shapes = [tuple(one.shape[-2:]) for one in given]
        raise ValueError(f"give a first or a last picture, or both of one size, got {shapes}.")
    size = (num_frames, *_size(given[0])[1:])
    pipeline.latent_grid(*size)  # refuses what does not fit
    first_elements = None if first is None else pipeline.tokenize(first)
    last_elements = None if last is None else _still_latent(pipeline, last)
    grid = pipeline.latent_grid(*size)
    if grid[0] < 1 + len(given):
        raise ValueError(
            f"{num_frames} frames are {grid[0]} latent frames, of which {len(given)} are given; "
            "ask for more frames."
        )
    constraint = _ends_known(first_elements, last_elements, grid, pipeline.device)
    drawn = _draw(pipeline, condition, size, constraint, job)
    before = torch.zeros_like(drawn.clips)
    if first is not None:
        before[:, :, :1] = first
    if last is not None:
        before[:, :, -1:] = last
    return Edited(drawn.clips, before, drawn.elements, drawn.num_steps)


def _ends_known(
    first: Tensor | None, last: Tensor | None, grid: tuple[int, ...], device: torch.device
) -> Constraint:
    ends = [one for one in (first, last) if one is not None]
    codes = torch.zeros(len(ends[0]), ends[0].shape[1], *grid, dtype=torch.long, device=device)
    mask = torch.zeros(1, 1, *grid, dtype=torch.bool, device=device)
    for place, elements in ((0, first), (-1, last)):
        if elements is not None:
            codes[:, :, place] = elements[:, :, 0]
            mask[:, :, place] = True
    return Constraint(codes, mask)


def _check_clips(pipeline: GeneratorPipeline) -> None:
    if not pipeline.is_text:
        raise ValueError("this generator draws pictures only; frames need one that draws clips.")


def extend(
    pipeline: GeneratorPipeline,
    clips: Tensor,
    *,
    num_frames: int,
    window: int,
    overlap: int,
    condition: Condition,
    job: DrawJob,
) -> Edited:
    """Go on with clips, beyond the length that the generator was trained on.

    A window slides over the clip: its first `overlap` frames are the last ones that there are, and
    the rest is drawn. Each window is encoded from its pixels, since a generator has only seen maps
    whose first latent frame is that of a picture. In the overlap the old frames fade into the new
    window's reconstruction of them, so that no seam shows.

    Args:
        pipeline: Networks and sampler.
        clips: `(b, 3, f, h, w)` in [-1, 1], at least `overlap` frames.
        num_frames: Frames of the result, the given ones included.
        window: Frames drawn at a time, `1 + stride * k`; best the length in training.
        overlap: Known frames of a window, `1 + stride * j` with `j < k`.
        condition: What the rest shall show.
        job: Whose noise, how many steps.

    Raises:
        ValueError: If lengths do not fit one another or the tokenizer.
    """
    _check_clips(pipeline)
    stride = pipeline.tokenizer.config.temporal_stride
    given = clips.shape[2]
    _check_lengths(given, num_frames, window=window, overlap=overlap, stride=stride)
    count = len(job.sample_index)
    result, steps = clips.expand(count, *clips.shape[1:]), torch.zeros_like(job.sample_index)
    size = (window, *_size(clips)[1:])
    grid, known_frames = pipeline.latent_grid(*size), 1 + (overlap - 1) // stride
    ramp = torch.arange(1, overlap + 1, device=clips.device) / (overlap + 1)
    drawn: Drawn | None = None
    while result.shape[2] < num_frames:
        number = (result.shape[2] - given) // (window - overlap)
        known = pipeline.tokenize(result[:, :, -overlap:])
        codes = F.pad(known, (0, 0, 0, 0, 0, grid[0] - known_frames))
        mask = torch.zeros(1, 1, *grid, dtype=torch.bool, device=codes.device)
        mask[:, :, :known_frames] = True
        part = DrawJob(sample_index=job.sample_index + number * _WINDOW_INDICES, **job.arguments())
        drawn = _draw(pipeline, condition, size, Constraint(codes, mask), part)
        seam = torch.lerp(
            result[:, :, -overlap:], drawn.clips[:, :, :overlap], ramp.view(1, 1, -1, 1, 1)
        )
        parts = (result[:, :, :-overlap], seam, drawn.clips[:, :, overlap:])
        result, steps = torch.cat(parts, dim=2), steps + drawn.num_steps.to(steps.device)
    assert drawn is not None, "the lengths were looked at"
    result = result[:, :, :num_frames]
    before = torch.zeros_like(result)
    before[:, :, :given] = clips
    return Edited(result, before, drawn.elements, steps)


def _check_lengths(given: int, wanted: int, *, window: int, overlap: int, stride: int) -> None:
    issues = []
    if wanted <= given:
        issues.append(f"num_frames must be more than the {given} given ones, got {wanted}")
    if not 1 <= overlap < window or (overlap - 1) % stride or (window - 1) % stride:
        issues.append(
            f"overlap and window must be 1 + {stride} k frames, overlap the smaller, got "
            f"{overlap} and {window}"
        )
    if overlap > given:
        issues.append(f"overlap must be at most the {given} given frames, got {overlap}")
    if issues:
        raise ValueError("; ".join(issues) + ".")


# --- the whole ------------------------------------------------------------------------------------


def vary(
    pipeline: GeneratorPipeline,
    clips: Tensor,
    condition: Condition,
    job: DrawJob,
    *,
    start_time: float,
) -> Edited:
    """Noise pictures or clips to a time and refine them from there.

    Args:
        pipeline: Networks and sampler.
        clips: `(b, 3, f, h, w)` in [-1, 1]; one row serves all samples.
        condition: What the result shall show.
        job: Whose noise, how many steps.
        start_time: Share of elements that the first step sees of the given ones, in [0, 1): near 0
            nothing of them is left, near 1 little changes.

    Raises:
        ValueError: If the time is out of range.
    """
    count = len(job.sample_index)
    elements = pipeline.tokenize(clips)
    nothing = torch.zeros_like(elements[:, :1], dtype=torch.bool)
    constraint = Constraint(elements, nothing, start_time=start_time)
    drawn = _draw(pipeline, condition, _size(clips), constraint, job)
    before = clips.expand(count, *clips.shape[1:])
    return Edited(drawn.clips, before, drawn.elements, drawn.num_steps)


def swap(
    pipeline: GeneratorPipeline,
    *,
    source: Condition,
    target: Condition,
    size: tuple[int, int, int],
    job: DrawJob,
    clips: Tensor | None = None,
    config: EditConfig | None = None,
    observer: Callable[[EditStep], None] | None = None,
) -> Edited:
    """Let one prompt become another, and change no more than that takes.

    Args:
        pipeline: Networks and sampler.
        source: What the source shows.
        target: What the result shall show.
        size: Frames, height and width in pixels.
        job: Whose noise, how many steps; its observer is not called.
        clips: Given sources `(b, 3, f, h, w)` in [-1, 1]; None draws them from the source's prompt.
        config: Which elements may change.
        observer: Called after every step.

    Raises:
        ValueError: If rows or sizes do not match.
    """
    network = pipeline.generator
    null = job.null_condition
    null = pipeline.null_condition(1) if null is None else null
    if isinstance(network, GRNText):
        source, target, null = prepare_text(network, [source, target, null])
    count = len(job.sample_index)
    given = None if clips is None else pipeline.tokenize(clips)
    result = edit(
        network,
        (network.config.num_elements, *pipeline.latent_grid(*size)),
        source_condition=source,
        target_condition=target,
        null_condition=null,
        source_codes=None if given is None else given.expand(count, *given.shape[1:]),
        sample_index=job.sample_index.to(pipeline.device),
        seed=job.seed,
        alphabet_size=network.config.alphabet_size,
        config=pipeline.sampling if job.config is None else job.config,
        edit_config=config or EditConfig(),
        observer=observer,
    )
    drawn, sources = (
        torch.cat([pipeline.detokenize(one) for one in maps.split(1)])
        for maps in (result.codes, result.source)
    )
    before = sources if clips is None else clips.expand(count, *clips.shape[1:])
    num_steps = torch.full_like(job.sample_index, result.num_forwards.calls)
    return Edited(drawn, before, result.codes, num_steps)
