r"""Coarse-to-fine sampling: one position after the other, then all fine labels at once (CTF).

The algorithm, for one batch of samples on a grid of n positions (arXiv 2503.16194, section 3):

    1. For every position i = 1 .. n in raster order:
       a. ask the causal network for the logits of position i given all before it, which it keeps;
          both branches in one call where the guidance scale is not 1;
       b. guide, divide by the temperature, keep the `top_k` and `top_p` likeliest, draw.
    2. Ask the bidirectional network once for the logits of all fine labels given the whole coarse
       map; guide, forbid what the coarse map does not admit, divide, truncate, draw.

Without a second network step 1 alone is the plain autoregressive baseline. Every random number is
a function of (seed, sample index, position or stage, channel): a sample is the same in any batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from grn_lightning.functional.categorical import draw
from grn_lightning.functional.guidance import guide
from grn_lightning.functional.random import Stream, counter_uniform
from grn_lightning.functional.truncation import truncate_logits
from grn_lightning.samplers.conditions import (
    Condition,
    concatenate_conditions,
    expand_rows,
    select_rows,
)


class CausalNetwork(Protocol):
    """Predicts the codes of a map one position after the other."""

    def prefill(self, condition: Any, /) -> tuple[Tensor, Any]:
        """Read a condition; return what is known before position 0 `(b, d)`, and a cache."""

    def advance(self, codes: Tensor, position: int, cache: Any, /) -> Tensor:
        """Read the codes `(b, c)` of a position; return what is known before the next."""

    def channel_logits(self, known: Tensor, codes: Tensor, /) -> Tensor:
        """Return logits `(b, j, k)` of the next `j` channels given the first, `codes` `(b, i)`."""


FineNetwork = Callable[[Tensor, Condition], Tensor]
"""Coarse map `(b, c_1, h, w)` and condition to logits `(b, c_2, h, w, k_2)`."""


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How labels are drawn from the logits of one stage."""

    guidance_scale: float = 1.0
    """Weight of the condition; 1 is the plain conditional prediction and costs half."""

    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Share of the positions (from, to) that are guided; the fine stage is one step, at 0."""

    temperature: float = 1.0
    """Divides the guided logits; 0 takes the most likely value."""

    top_k: int = 0
    """Values kept, the most likely ones; 0 keeps all."""

    top_p: float = 1.0
    """Total probability of the values kept."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        low, high = self.guidance_interval
        rules = [
            (self.guidance_scale >= 0, "guidance_scale must be at least 0", self.guidance_scale),
            (
                0 <= low < high <= 1,
                "guidance_interval must be (low, high), 0 <= low < high <= 1",
                self.guidance_interval,
            ),
            (self.temperature >= 0, "temperature must be at least 0", self.temperature),
            (self.top_k >= 0, "top_k must be at least 0", self.top_k),
            (0 < self.top_p <= 1, "top_p must be in (0, 1]", self.top_p),
        ]
        issues = [f"{text}, got {value!r}" for is_right, text, value in rules if not is_right]
        if issues:
            raise ValueError("DrawConfig: " + "; ".join(issues) + ".")

    def scale_at(self, progress: float) -> float:
        """Return the guidance scale when a share `progress` in [0, 1) of the positions is drawn."""
        low, high = self.guidance_interval
        return self.guidance_scale if low <= progress < high else 1.0

    @property
    def fine_rows(self) -> int:
        """Rows that a sample costs in the one step of the fine stage: two where guided."""
        return 1 if self.scale_at(0.0) == 1.0 else 2

    def draw(self, logits: Tensor, u: Tensor) -> Tensor:
        """Draw from guided logits `(..., k)` at uniform numbers `u` `(...)`."""
        if self.temperature > 0:
            logits = truncate_logits(logits / self.temperature, top_k=self.top_k, top_p=self.top_p)
            return draw(logits, u)
        return draw(logits, u, temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class CoarseToFineConfig:
    """How both stages draw."""

    coarse: DrawConfig = field(default_factory=DrawConfig)
    """Stage 1, position by position; also the plain baseline."""

    fine: DrawConfig = field(default_factory=DrawConfig)
    """Stage 2, one pass."""


@dataclass(frozen=True)
class RasterResult:
    """The samples and what they cost."""

    coarse: Tensor
    """`(b, c_1, h, w)` long: what stage 1 drew; of the baseline, the codes."""

    num_steps: int
    """Sequential steps: positions."""

    num_rows: int
    """Samples in all calls: twice as many at and before the last guided position."""


@torch.no_grad()
def draw_raster(
    network: CausalNetwork,
    shape: tuple[int, int, int],
    *,
    condition: Condition,
    null_condition: Condition | None = None,
    sample_index: Tensor,
    seed: int,
    config: DrawConfig,
) -> RasterResult:
    """Draw code maps position by position (step 1 of the algorithm).

    Args:
        network: Causal; asked in the mode in which the caller left it.
        shape: Channels, height and width of a map.
        condition: What to draw, one row or one per sample.
        null_condition: What guidance steers away from; needed only if a position is guided.
        sample_index: `(b,)` long, the running number of every sample.
        seed: Another seed gives other samples.
        config: Guidance, temperature, truncation.

    Returns:
        The maps as `coarse`.

    Raises:
        ValueError: If rows do not match, or guidance lacks its null condition.
    """
    channels, height, width = shape
    num_samples, num_positions = len(sample_index), height * width
    scales = [config.scale_at(i / num_positions) for i in range(num_positions)]
    num_guided = 1 + max((i for i, scale in enumerate(scales) if scale != 1.0), default=-1)
    is_guided = num_guided > 0
    rows = _both(expand_rows(condition, num_samples), null_condition, num_samples, is_guided)
    known, cache = network.prefill(rows)
    maps = sample_index.new_zeros(num_samples, channels, num_positions)
    for i, scale in enumerate(scales):
        if is_guided and i == num_guided:  # from here on the unconditional branch has no weight
            is_guided = False
            known, cache = known[:num_samples], select_rows(cache, slice(num_samples))
        uniform = partial(counter_uniform, sample_index, seed=seed, step=i, stream=Stream.DRAW)
        u = uniform(shape=(channels,))
        done = 0
        while done < channels:
            known_codes = maps[:, :done, i]
            if is_guided:
                known_codes = torch.cat([known_codes, known_codes])
            logits = _guided(network.channel_logits(known, known_codes), scale, is_guided)
            count = logits.shape[1]
            maps[:, done : done + count, i] = config.draw(logits, u[:, done : done + count])
            done += count
        if i + 1 < num_positions:
            drawn = maps[:, :, i]
            known = network.advance(torch.cat([drawn, drawn]) if is_guided else drawn, i, cache)
    return RasterResult(
        coarse=maps.unflatten(2, (height, width)),
        num_steps=num_positions,
        num_rows=(num_positions + num_guided) * num_samples,
    )


@torch.no_grad()
def draw_fine(
    network: FineNetwork,
    coarse: Tensor,
    *,
    condition: Condition,
    null_condition: Condition | None = None,
    allowed: Tensor | None = None,
    sample_index: Tensor,
    seed: int,
    config: DrawConfig,
) -> Tensor:
    """Draw all fine labels given the coarse map (step 2 of the algorithm).

    Args:
        network: Maps coarse maps and conditions to logits.
        coarse: `(b, c_1, h, w)`; guidance compares conditions, the map is that of both branches.
        condition: One row or one per sample.
        null_condition: Needed only if the scale is not 1.
        allowed: `(b, c_2, h, w, k_2)` bool, values that the coarse map admits; None admits all.
        sample_index: `(b,)` long.
        seed: As in `draw_raster`; the numbers are others.
        config: Guidance, temperature, truncation.

    Returns:
        Fine map `(b, c_2, h, w)` long.
    """
    num_samples, scale = len(sample_index), config.scale_at(0.0)
    is_guided = config.fine_rows == 2
    rows = _both(expand_rows(condition, num_samples), null_condition, num_samples, is_guided)
    logits = network(torch.cat([coarse, coarse]) if is_guided else coarse, rows)
    logits = _guided(logits, scale, is_guided)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    shape = tuple(logits.shape[1:-1])
    u = counter_uniform(sample_index, seed=seed, step=0, stream=Stream.KEEP, shape=shape)
    return config.draw(logits, u)


def _both(
    condition: Condition, null_condition: Condition | None, num_samples: int, is_guided: bool
) -> Condition:
    """Return the conditional rows, and behind them the unconditional ones if they are needed."""
    if not is_guided:
        return condition
    if null_condition is None:
        raise ValueError(
            "null_condition is missing, but guidance asks for it; pass the null class or the empty "
            "prompt, or set guidance_scale=1."
        )
    return concatenate_conditions(condition, expand_rows(null_condition, num_samples))


def _guided(logits: Tensor, scale: float, is_guided: bool) -> Tensor:
    """Join both branches; those of a step that is not guided cost no more than their rows."""
    if not is_guided:
        return logits
    conditional, unconditional = logits.chunk(2)
    return conditional if scale == 1.0 else guide(conditional, unconditional, scale)
