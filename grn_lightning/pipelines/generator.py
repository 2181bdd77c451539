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

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from grn_lightning.functional import codes_to_elements, element_sizes, elements_to_codes
from grn_lightning.models.grn_class import GRNClass, GRNClassConfig
from grn_lightning.models.grn_text import FirstFrameCondition, GRNText, GRNTextConfig
from grn_lightning.models.hashes import weights_hash
from grn_lightning.models.text_encoder import TextEncoder
from grn_lightning.models.tokenizer import HBQTokenizer, TokenizerConfig
from grn_lightning.pipelines.conditions import Condition, prepare_text, with_first_frame
from grn_lightning.samplers import ForwardCount, RefineConfig, RefineResult, StepInfo, refine

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


def target_of(
    generator: GRNClassConfig | GRNTextConfig, tokenizer: TokenizerConfig
) -> Literal["index", "bit"]:
    """Return the form in which a generator predicts the codes of a tokenizer.

    Raises:
        ValueError: If the sizes fit neither form.
    """
    asked = (generator.num_elements, generator.alphabet_size)
    channels, rounds = tokenizer.latent_channels, tokenizer.num_rounds
    targets: tuple[Literal["index"], Literal["bit"]] = ("index", "bit")
    sizes = {t: tuple(element_sizes(channels, num_rounds=rounds, target=t)) for t in targets}
    for target in targets:
        if sizes[target] == asked:
            return target
    raise ValueError(
        "the generator's (`num_elements`, `alphabet_size`) must be "
        f"{sizes['index']} or {sizes['bit']} for a tokenizer of {channels} channels and {rounds} "
        f"rounds, got {asked}."
    )


def check_text_channels(config: GRNTextConfig, encoder: TextEncoder) -> None:
    """Refuse a text encoder of another width than the generator reads.

    Raises:
        ValueError: If the widths differ.
    """
    if config.text_channels != encoder.text_channels:
        raise ValueError(
            f"`generator.text_channels` must be the text encoder's width {encoder.text_channels}, "
            f"got {config.text_channels}."
        )


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
        if isinstance(self.generator, GRNText):
            condition, null = prepare_text(self.generator, [condition, null])
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
        )
        if first_frame is None:
            return result
        first_frame = first_frame.expand(len(result.codes), *first_frame.shape[1:])
        return replace(result, codes=torch.cat([first_frame, result.codes], dim=2))

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
        )
        return Drawn(
            elements=result.codes,
            clips=torch.cat([self.detokenize(one) for one in result.codes.split(1)]),
            num_steps=torch.full_like(sample_index, len(result.entropy)),
            entropy=result.entropy,
            num_forwards=result.num_forwards,
        )


def _later_frames(grid: tuple[int, ...]) -> tuple[int, ...]:
    """Return the grid that is left to draw behind a given first frame."""
    if len(grid) != 3 or grid[0] < 2:
        raise ValueError(
            "a clip that starts from a picture needs at least two latent frames, got the grid "
            f"{grid}; ask for more frames."
        )
    return grid[0] - 1, *grid[1:]
