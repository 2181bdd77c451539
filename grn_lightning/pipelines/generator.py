"""GeneratorPipeline: generator, tokenizer, text encoder and sampler joined, without Lightning.

A class or a caption goes in, a picture or a clip comes out. The same object serves the command
line, callbacks, evaluation, notebooks and prediction on many devices:

    condition   what is asked for, as tensors (class labels, text features)
    sample      condition -> elements, by global refinement
    detokenize  elements -> clips, in bounded memory
    draw        all of it

With "prefix" attention the captions and the negative prompt run through the generator once, not
once per step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from grn_lightning.functional import codes_to_elements, elements_to_codes
from grn_lightning.media.images import center_crop_resize, to_float
from grn_lightning.models.grn_class import GRNClass, GRNClassConfig
from grn_lightning.models.grn_text import FirstFrameCondition, GRNText, GRNTextConfig
from grn_lightning.models.hashes import weights_hash
from grn_lightning.models.text_encoder import TextEncoder
from grn_lightning.models.tokenizer import HBQTokenizer
from grn_lightning.pipelines.conditions import Condition, prepare_text, with_first_frame
from grn_lightning.pipelines.fit import check_text_channels, target_of
from grn_lightning.pipelines.prompts import PLAIN, PromptStyle, Task, task_of
from grn_lightning.samplers import ForwardCount, RefineConfig, RefineResult, StepInfo, refine
from grn_lightning.samplers.constraints import Constraint

POSITIONS_AT_ONCE = 64 * 64
"""Latent positions that are decoded at a time: those of the largest published picture."""


@dataclass(frozen=True)
class Drawn:
    """What was drawn, and what it cost."""

    elements: Tensor
    """`(b, c, *grid)` long in [0, k), a given first frame included."""
    clips: Tensor
    """`(b, 3, f, h, w)` in [-1, 1]; a picture has one frame."""
    num_steps: Tensor
    """`(b,)` long: steps of each sample."""
    entropy: Tensor
    """`(num_steps, b)` in [0, 1]: mean normalized entropy of the conditional prediction."""
    num_forwards: ForwardCount
    """Calls of the generator, and rows in them."""


@dataclass(eq=False)
class GeneratorPipeline:
    """Draws pictures and clips with networks that are trained.

    The networks are used in the mode (evaluation, autocast, device) in which the caller left them,
    except that the tokenizer follows the generator from device to device.

    Raises:
        ValueError: If the networks do not fit one another.
    """

    generator: GRNText | GRNClass
    """Predicts all elements of a map from a corrupted one."""
    tokenizer: HBQTokenizer
    """Whose codes the generator knows."""
    text_encoder: TextEncoder | None = None
    """Reads the captions of a `GRNText`."""
    sampling: RefineConfig = field(default_factory=RefineConfig)
    """Steps, guidance and temperature where nothing else is asked for."""
    styles: Mapping[Task, PromptStyle] = field(default_factory=dict)
    """What to put around prompts, by task; only `draw_text` and the command line do so."""
    autocast: torch.dtype | None = None
    """Type in which the generator computes under autocast; None leaves that to the caller."""

    def __post_init__(self) -> None:
        """Look that the parts fit."""
        self.target = target_of(self.generator.config, self.tokenizer.config)
        if isinstance(self.generator.config, GRNTextConfig):
            if self.text_encoder is None:
                raise ValueError(
                    "a text-conditional generator needs a text encoder; pass `text_encoder`."
                )
            check_text_channels(self.generator.config, self.text_encoder)

    # --- what it is made of -----------------------------------------------------------------------

    @property
    def config(self) -> GRNTextConfig | GRNClassConfig:
        """Sizes of the generator."""
        return self.generator.config

    @property
    def is_text(self) -> bool:
        """Whether it draws from captions; else from classes."""
        return isinstance(self.generator.config, GRNTextConfig)

    @property
    def device(self) -> torch.device:
        """Where the generator is."""
        return next(self.generator.parameters()).device

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes of the weights of its parts, by name; each reads all weights."""
        parts = {"generator": self.generator, "tokenizer": self.tokenizer}
        hashes = {name: weights_hash(part) for name, part in parts.items()}
        if self.text_encoder is not None:
            hashes["text_encoder"] = weights_hash(self.text_encoder)
        return hashes

    def to(self, device: torch.device | str) -> "GeneratorPipeline":
        """Move all parts, in place."""
        for part in (self.generator, self.tokenizer, self.text_encoder):
            if part is not None:
                part.to(device)
        return self

    def latent_grid(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the grid that clips of this size have; a `GRNClass` knows no frames.

        Raises:
            ValueError: If the size does not fit the strides of the tokenizer.
        """
        grid = self.tokenizer.config.latent_shape(num_frames, height, width)[1:]
        return grid if self.is_text else grid[1:]

    # --- pixels and elements ----------------------------------------------------------------------

    @torch.no_grad()
    def tokenize(self, clips: Tensor) -> Tensor:
        """Map clips `(b, 3, f, h, w)` in [-1, 1] to the generator's elements `(b, c, *grid)`."""
        codes = self._tokenizer().tokenize(clips)
        rounds = self.tokenizer.config.num_rounds
        elements = codes_to_elements(codes, num_rounds=rounds, target=self.target)
        return elements if self.is_text else elements.squeeze(2)

    @torch.no_grad()
    def first_frame(self, pictures: Sequence[Tensor], *, size: tuple[int, int]) -> Tensor:
        """Turn pictures into the clean first latent frame of clips.

        Args:
            pictures: uint8 `(3, h, w)` in [0, 255], of any size; they are scaled until they cover
                `size`, and their centre is cut out.
            size: Height and width of the clips in pixels.

        Returns:
            Elements `(b, c, 1, h', w')`, for `with_first_frame`.

        Raises:
            ValueError: If the generator draws no clips, or the size does not fit the tokenizer.
        """
        if not self.is_text:
            raise ValueError("this generator draws classes: its pictures continue nothing.")
        covering = torch.stack([center_crop_resize(picture, size) for picture in pictures])
        return self.tokenize(to_float(covering.to(self.device)).unsqueeze(2))

    @torch.no_grad()
    def detokenize(self, elements: Tensor) -> Tensor:
        """Map elements `(b, c, *grid)` to clips `(b, 3, f, h, w)`, clamped to [-1, 1]."""
        return torch.cat([*self.decode_chunks(elements)], dim=2)

    @torch.no_grad()
    def decode_chunks(self, elements: Tensor) -> Iterator[Tensor]:
        """Decode elements `(b, c, *grid)` a few latent frames at a time.

        The activations of no more than `POSITIONS_AT_ONCE` positions per sample are in memory, at
        least those of one frame.

        Yields:
            Consecutive frames `(b, 3, f, h, w)`, clamped to [-1, 1]; joined they are the clip.
        """
        tokenizer = self._tokenizer()
        rounds = tokenizer.config.num_rounds
        codes = elements_to_codes(elements, num_rounds=rounds, target=self.target)
        codes = codes if self.is_text else codes.unsqueeze(2)
        z_hat = tokenizer.dequantize(codes)
        chunk_size = max(1, POSITIONS_AT_ONCE // codes.shape[-2:].numel())
        if z_hat.shape[2] <= chunk_size:
            yield tokenizer.decode(z_hat).float().clamp(-1, 1)
            return
        for clip in tokenizer.decode_chunks(z_hat.split(chunk_size, dim=2)):
            yield clip.float().clamp(-1, 1)

    def _tokenizer(self) -> HBQTokenizer:
        return self.tokenizer.to(self.device)

    # --- conditions -------------------------------------------------------------------------------

    def condition(self, batch: Mapping[str, Any]) -> Condition:
        """Return what samples are generated from.

        Args:
            batch: With `captions` (texts) for a `GRNText`, `class_labels` (numbers) for a
                `GRNClass`.

        Raises:
            ValueError: If the batch lacks them.
        """
        name = "captions" if self.is_text else "class_labels"
        if name not in batch:
            raise ValueError(f"this generator draws from {name!r}, got {sorted(batch)}.")
        if not self.is_text:
            return torch.as_tensor(batch["class_labels"], device=self.device)
        assert self.text_encoder is not None
        tokens = self.text_encoder.tokenize(list(batch["captions"]))
        return self.text_encoder(tokens.to(self.device))

    def null_condition(self, batch_size: int, negative_prompt: str = "") -> Condition:
        """Return what guidance steers away from: the null class, or the negative prompt."""
        if self.is_text:
            return self.condition({"captions": [negative_prompt] * batch_size})
        assert isinstance(self.generator, GRNClass)
        return self.generator.null_condition(batch_size, self.device)

    def style(self, num_frames: int, *, has_first_frame: bool = False) -> PromptStyle:
        """Return what belongs around prompts of such clips.

        Raises:
            ValueError: If there are styles, but none for this task.
        """
        task = task_of(num_frames, has_first_frame=has_first_frame)
        if self.styles and task not in self.styles:
            known = ", ".join(map(repr, self.styles))
            raise ValueError(f"these weights draw {known}, but not {task!r}.")
        return self.styles.get(task, PLAIN)

    # --- sampling ---------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        condition: Condition,
        sample_index: Tensor,
        *,
        grid: tuple[int, ...],
        config: RefineConfig | None = None,
        seed: int = 0,
        null_condition: Condition | None = None,
        constraint: Constraint | None = None,
        observer: Callable[[StepInfo], None] | None = None,
    ) -> RefineResult:
        """Draw the elements of one sample per row of a condition.

        Args:
            condition: From `condition`; `with_first_frame` adds a picture to start from.
            sample_index: `(b,)` long: names the noise of each sample.
            grid: `(f, h, w)` in latents, or `(h, w)` for a `GRNClass`; a first frame counts.
            config: Steps, guidance, temperature; `sampling` by default.
            seed: Seed of the job.
            null_condition: From `null_condition`, `b` rows or one; by default the empty prompt or
                the null class.
            constraint: Elements `(b | 1, c, *grid)` that are known beforehand; what it says about
                a given first frame is not read.
            observer: Called with a `StepInfo` after every step.

        Returns:
            Elements `(b, c, *grid)` with costs and entropies. A first frame is part of them, but
            not of what the observer sees.

        Raises:
            ValueError: If rows do not match, or as in `refine`.
        """
        config = self.sampling if config is None else config
        null = self.null_condition(1) if null_condition is None else null_condition
        first_frame: Tensor | None = None
        if isinstance(condition, FirstFrameCondition):
            first_frame, grid = condition.first_frame, _later_frames(grid)
            null = with_first_frame(null, first_frame)  # guidance acts on the text alone
            if constraint is not None:
                constraint = replace(
                    constraint,
                    known_codes=constraint.known_codes[:, :, 1:],
                    known_mask=constraint.known_mask[:, :, 1:],
                )
        with self.precision():
            if isinstance(self.generator, GRNText):
                condition, null = prepare_text(
                    self.generator, [condition, null], rows_per_call=config.rows_per_call
                )
            result = refine(
                self.generator,
                (self.generator.config.num_elements, *grid),
                condition=condition,
                null_condition=null,
                sample_index=sample_index,
                seed=seed,
                alphabet_size=self.generator.config.alphabet_size,
                config=config,
                observer=observer,
                constraint=constraint,
            )
        if first_frame is None:
            return result
        first_frame = first_frame.expand(len(result.codes), *first_frame.shape[1:])
        return replace(result, codes=torch.cat([first_frame, result.codes], dim=2))

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context in which the generator computes."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    @torch.no_grad()
    def draw(
        self,
        condition: Condition,
        sample_index: Tensor,
        *,
        size: tuple[int, int, int],
        config: RefineConfig | None = None,
        seed: int = 0,
        null_condition: Condition | None = None,
        constraint: Constraint | None = None,
        observer: Callable[[StepInfo], None] | None = None,
    ) -> Drawn:
        """Draw one picture or clip per row of a condition.

        Args:
            condition: As in `sample`.
            sample_index: As in `sample`.
            size: Frames, height and width in pixels.
            config: As in `sample`.
            seed: As in `sample`.
            null_condition: As in `sample`.
            constraint: As in `sample`.
            observer: As in `sample`.

        Returns:
            Elements and clips. The clips are decoded one by one: a batch rounds differently in the
            last bit, and the decoder needs by far the most memory.

        Raises:
            ValueError: If the size does not fit the tokenizer, or as in `sample`.
        """
        result = self.sample(
            condition,
            sample_index,
            grid=self.latent_grid(*size),
            config=config,
            seed=seed,
            null_condition=null_condition,
            observer=observer,
            constraint=constraint,
        )
        return Drawn(
            elements=result.codes,
            clips=torch.cat([self.detokenize(one) for one in result.codes.split(1)]),
            num_steps=result.num_steps,
            entropy=result.entropy,
            num_forwards=result.num_forwards,
        )

    # --- for people -------------------------------------------------------------------------------

    def draw_classes(self, class_labels: Sequence[int], **options: Any) -> Drawn:
        """Draw one picture per class.

        Args:
            class_labels: Numbers of classes.
            options: As in `draw`; the size is the generator's own.

        Raises:
            ValueError: If the generator knows no classes, or not these.
        """
        config = self.generator.config
        if not isinstance(config, GRNClassConfig):
            raise ValueError("this generator draws from text; use `draw_text`.")
        wrong = [label for label in class_labels if not 0 <= label < config.num_classes]
        if wrong:
            raise ValueError(f"`class_labels` must be in [0, {config.num_classes}), got {wrong}.")
        stride = self.tokenizer.config.spatial_stride
        size = (1, config.grid_size[0] * stride, config.grid_size[1] * stride)
        condition = self.condition({"class_labels": class_labels})
        return self.draw(condition, size=size, **self._numbers(len(class_labels)) | options)

    def draw_text(
        self,
        prompts: Sequence[str],
        *,
        size: tuple[int, int, int],
        pictures: Sequence[Tensor] | None = None,
        negative_prompt: str | None = None,
        **options: Any,
    ) -> Drawn:
        """Draw one picture or clip per prompt, each prompt in the style of its task.

        Args:
            prompts: Texts; "" is no text at all.
            size: Frames (1 for pictures), height and width in pixels.
            pictures: First frames, uint8 `(3, h, w)`; one per prompt, or one for all.
            negative_prompt: What guidance steers away from; by default what `styles` says.
            options: As in `draw`; samples are numbered from 0 on where there is no `sample_index`.

        Raises:
            ValueError: If the generator draws from classes, no list of prompts is given, or as in
                `draw`.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"`prompts` must be a list of one text or more, got {prompts!r}.")
        if not self.is_text:
            raise ValueError("this generator draws from classes; use `draw_classes`.")
        style = self.style(size[0], has_first_frame=pictures is not None)
        condition = self.condition({"captions": [style.apply(prompt) for prompt in prompts]})
        null = self.null_condition(
            1, style.negative if negative_prompt is None else negative_prompt
        )
        if pictures is not None:
            first_frame = self.first_frame(pictures, size=size[1:])
            condition = with_first_frame(condition, first_frame)
        numbers = self._numbers(len(prompts))
        return self.draw(condition, size=size, **numbers | {"null_condition": null} | options)

    def _numbers(self, count: int) -> dict[str, Any]:
        """Number the samples from 0 on, for who gives no `sample_index`."""
        return {"sample_index": torch.arange(count, device=self.device)}


def _later_frames(grid: tuple[int, ...]) -> tuple[int, ...]:
    """Return the grid that is left to draw behind a given first frame."""
    if len(grid) != 3 or grid[0] < 2:
        raise ValueError(
            "a clip that starts from a picture needs at least two latent frames, got the grid "
            f"{grid}; ask for more frames."
        )
    return grid[0] - 1, *grid[1:]
