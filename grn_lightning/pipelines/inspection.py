"""Looking into a refinement: what every step does to every element, and how sure the network is.

`inspect_refinement` draws samples and keeps everything that happens to them. `inspect_accuracy`
looks into the network without drawing.

    inspection = inspect_refinement(pipeline, [3, 7], torch.arange(2), size=(1, 32, 32))
    inspection.entropy            # (steps, samples)
    inspection.shares             # (steps, samples, 4)
    inspection.elements_figure()  # a picture, which a notebook shows
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from grn_lightning.media.figures import area_figure, bar_figure, line_figure
from grn_lightning.media.images import to_uint8
from grn_lightning.media.refinement import COLOURS, StepView, shown_latents, step_page, step_strip
from grn_lightning.pipelines.conditions import Condition
from grn_lightning.pipelines.generator import POSITIONS_AT_ONCE, GeneratorPipeline
from grn_lightning.pipelines.knowledge import AccuracyInspection as AccuracyInspection
from grn_lightning.pipelines.knowledge import asked_for
from grn_lightning.pipelines.knowledge import inspect_accuracy as inspect_accuracy
from grn_lightning.samplers import RefineConfig
from grn_lightning.samplers.calibration import steps_of
from grn_lightning.samplers.stopping import AdaptiveSteps
from grn_lightning.samplers.trace import SampleTrace, Trace

STATES = tuple(COLOURS)
"""Names of the states of an element; a state is a place in this tuple."""

OVER = len(STATES)
"""State of all elements at steps that a sample did not take any more."""

DECISION_STEP = AdaptiveSteps.decision_step
"""Step, from 0, at which complexity is read where no rule says otherwise; the published one."""


@dataclass(frozen=True, eq=False)
class Inspection:
    """Some samples and how they came about; `n` steps of the longest, `b` samples."""

    traces: tuple[SampleTrace, ...]
    """What was seen of every sample."""
    labels: tuple[str, ...]
    """What was asked for."""
    sample_index: Tensor
    """`(b,)` long."""
    config: RefineConfig
    """Steps, guidance and temperature."""
    alphabet_size: int
    """Values `k` of an element."""

    # --- numbers ----------------------------------------------------------------------------------

    @cached_property
    def num_steps(self) -> Tensor:
        """`(b,)` long: steps that each sample took."""
        return torch.tensor([trace.num_steps for trace in self.traces])

    def _by_step(self, name: str) -> Tensor:
        """`(n, b)` float, NaN behind the last step of a sample."""
        values = torch.full((int(self.num_steps.max()), len(self.traces)), math.nan)
        for row, trace in enumerate(self.traces):
            values[: trace.num_steps, row] = getattr(trace, name)
        return values

    @cached_property
    def t(self) -> Tensor:
        """`(n, b)`: time at which the generator was asked; NaN behind the last step."""
        return self._by_step("t")

    @cached_property
    def entropy(self) -> Tensor:
        """`(n, b)` in [0, 1]: mean normalized entropy of the conditional prediction; NaN behind."""
        return self._by_step("entropy")

    @cached_property
    def flips(self) -> Tensor:
        """`(n, b)` in [0, 1]: share of elements that differ from the complete sample before."""
        return self._by_step("flips")

    @cached_property
    def states(self) -> Tensor:
        """`(n, b, c, *grid)` uint8: places in `STATES`; `OVER` behind the last step of a sample."""
        first = self.traces[0].codes
        shape = (int(self.num_steps.max()), len(self.traces), *first.shape[1:])
        states = torch.full(shape, OVER, dtype=torch.uint8)
        for row, trace in enumerate(self.traces):
            states[: trace.num_steps, row] = _states_of(trace)
        return states

    @cached_property
    def shares(self) -> Tensor:
        """`(n, b, 4)` in [0, 1]: share of the elements in every state; NaN behind."""
        flat = self.states.flatten(2)
        shares = torch.stack([(flat == n).float().mean(2) for n in range(OVER)], dim=2)
        return shares.masked_fill((flat[:, :, :1] == OVER), math.nan)

    @cached_property
    def codes(self) -> Tensor:
        """`(b, c, *grid)` long: the samples."""
        return torch.stack([trace.codes[-1] for trace in self.traces])

    @property
    def bits_of_map(self) -> float:
        """Bits that a map can hold: what is open where nothing is known."""
        return self.codes[0].numel() * math.log2(self.alphabet_size)

    @property
    def bits(self) -> Tensor:
        """`(n, b)`: bits of a sample that the prediction leaves open, element by element."""
        return self.entropy * self.bits_of_map

    def complexity(self, step: int | None = None) -> Tensor:
        """Return how uncertain a step left the generator: what adaptive steps decide from.

        Args:
            step: Number of the step, from 0; None takes the rule's, else `DECISION_STEP`, or the
                last one of walks that are shorter.

        Returns:
            `(b,)` float in [0, 1].

        Raises:
            ValueError: If a sample did not get that far.
        """
        if step is None:
            rule = self.config.adaptive
            wanted = DECISION_STEP if rule is None else rule.decision_step
            step = min(wanted, int(self.num_steps.min()) - 1)
        if not 0 <= step < int(self.num_steps.min()):
            raise ValueError(
                f"`step` must be in [0, {int(self.num_steps.min())}), the steps that all samples "
                f"took, got {step}."
            )
        return self.entropy[step]

    def steps_under(self, rule: AdaptiveSteps) -> Tensor:
        """Return how many steps a rule would have given to each sample, `(b,)` long.

        Until its decision step a walk is the same with and without a rule, so nothing is drawn.

        Raises:
            ValueError: If the rule decides later than a sample got, or contradicts the walk.
        """
        issues = rule.issues(self.config.num_steps)
        if issues:
            raise ValueError("AdaptiveSteps: " + "; ".join(issues) + ".")
        return steps_of(rule, self.complexity(rule.decision_step), self.config.num_steps)

    def steps_histogram(self, rule: AdaptiveSteps | None = None) -> Tensor:
        """Return how many samples took 0, 1, ... steps, `(num_steps + 1,)` long.

        Args:
            rule: Count the steps that it would have given; None counts those that were taken.
        """
        steps = self.num_steps if rule is None else self.steps_under(rule)
        return torch.bincount(steps, minlength=self.config.num_steps + 1)

    # --- pictures ---------------------------------------------------------------------------------

    def entropy_figure(self) -> Image.Image:
        """Draw the entropy of every sample by step, and their mean."""
        return line_figure(
            self._named(self.entropy),
            title="entropy of the prediction, share of the largest",
            x_label="step",
            y_limits=(0.0, 1.02),
            mean=True,
        )

    def flips_figure(self) -> Image.Image:
        """Draw the share of changed elements of every sample by step, and their mean."""
        return line_figure(
            self._named(self.flips),
            title="share of elements that a step changes",
            x_label="step",
            y_limits=(0.0, 1.02),
            mean=True,
        )

    def elements_figure(self) -> Image.Image:
        """Draw the mean shares of filled, kept, erased and blank elements by step."""
        means = self.shares.nanmean(1)
        shares = {name: means[:, n] for n, name in enumerate(STATES)}
        title = "what steps do to elements, mean share"
        return area_figure(shares, COLOURS, title=title, x_label="step")

    def complexity_figure(self, step: int | None = None) -> Image.Image:
        """Draw the complexity of every sample, the simplest first."""
        values, order = self.complexity(step).sort()
        names = [str(int(self.sample_index[row])) for row in order]
        return bar_figure(
            {"complexity": values},
            names,
            title="complexity: entropy at the decision step",
            x_label="sample, simplest first",
        )

    def steps_figure(self, rule: AdaptiveSteps | None = None) -> Image.Image:
        """Draw how many samples took how many steps."""
        counts = self.steps_histogram(rule)
        used = counts.nonzero().flatten()
        first, last = int(used[0]), int(used[-1])
        return bar_figure(
            {"samples": counts[first : last + 1]},
            [str(n) for n in range(first, last + 1)],
            title="samples by number of steps",
            x_label="steps",
            whole=True,
        )

    def pages(self, pipeline: GeneratorPipeline, row: int = 0) -> list[Image.Image]:
        """Draw a sample step by step, decoded, above the map of its elements; a film's frames."""
        return trace_pages(pipeline, self.traces[row], label=self.labels[row])

    def strip(self, pipeline: GeneratorPipeline, row: int = 0, *, columns: int = 8) -> Image.Image:
        """Draw some steps of a sample side by side, the first and the last among them."""
        trace = self.traces[row]
        count = min(columns, trace.num_steps)
        steps = torch.linspace(0, trace.num_steps - 1, count).round().long().unique().tolist()
        texts = {step: f"step {step + 1}" for step in steps}
        return step_strip(_views(pipeline, trace, texts), label=self.labels[row])

    def _named(self, values: Tensor) -> dict[str, Tensor]:
        names = zip(self.labels, self.sample_index.tolist(), values.unbind(1), strict=True)
        return {f"{number}: {label}": curve for label, number, curve in names}


def _states_of(trace: SampleTrace) -> Tensor:
    """`(n, c, *grid)` uint8: places in `STATES`."""
    return torch.stack([*trace.masks]).to(torch.uint8).argmax(0).to(torch.uint8)


def _views(
    pipeline: GeneratorPipeline, trace: SampleTrace, texts: Mapping[int, str]
) -> list[StepView]:
    """Decode some steps, by their numbers, as many at a time as the pipeline decodes positions."""
    states = _states_of(trace)
    states = states if states.ndim == 5 else states.unsqueeze(2)  # (n, c, f', h', w')
    latents = shown_latents(states.shape[2])
    stride = pipeline.tokenizer.config.temporal_stride
    at_once = max(1, POSITIONS_AT_ONCE // states[0, 0].numel())
    views, steps = [], list(texts)
    for part in (steps[n : n + at_once] for n in range(0, len(steps), at_once)):
        clips = to_uint8(pipeline.detokenize(trace.codes[part].to(pipeline.device)).cpu())
        shown = clips.transpose(1, 2)[:, [n * stride for n in latents]]  # (n, f', 3, h, w)
        views += [
            StepView(frames, states[step][:, latents], texts[step])
            for step, frames in zip(part, shown, strict=True)
        ]
    return views


def trace_pages(
    pipeline: GeneratorPipeline, trace: SampleTrace, *, label: str
) -> list[Image.Image]:
    """Draw every step of one sample: frames of the complete sample above the maps of its elements.

    Args:
        pipeline: Decodes the complete samples.
        trace: What an observer has remembered.
        label: What was asked for.

    Returns:
        One picture per step, all of one size.
    """
    texts = {
        step: f"step {step + 1} of {trace.num_steps}   t = {float(trace.t[step]):.2f}   "
        f"entropy {float(trace.entropy[step]):.2f}   "
        f"changed {100 * float(trace.flips[step]):.0f} %"
        for step in range(trace.num_steps)
    }
    return [step_page(view, label=label) for view in _views(pipeline, trace, texts)]


@torch.no_grad()
def inspect_refinement(
    pipeline: GeneratorPipeline,
    conditions: Condition | Sequence[str] | Sequence[int],
    sample_index: Tensor,
    *,
    size: tuple[int, int, int],
    config: RefineConfig | None = None,
    seed: int = 0,
    labels: Sequence[str] | None = None,
) -> Inspection:
    """Draw samples and keep everything that happens to them.

    The samples are those that `GeneratorPipeline.draw` gives with the same arguments. A step takes
    nine bytes per element in main memory, so this is for a few samples at a time.

    Args:
        pipeline: Networks to draw with.
        conditions: Captions or classes, one per sample; or a condition of as many rows.
        sample_index: `(b,)` long, no number twice.
        size: Frames, height and width in pixels.
        config: Steps, guidance, temperature; those of the pipeline by default.
        seed: Seed of the job.
        labels: What to call the samples; by default captions and classes.

    Raises:
        ValueError: If rows do not match, a number is there twice, or as in
            `GeneratorPipeline.sample`.
    """
    if len(sample_index) == 0 or len(sample_index.unique()) < len(sample_index):
        raise ValueError(
            f"`sample_index` must hold different numbers, at least one, got "
            f"{sample_index.tolist()}."
        )
    condition, known = asked_for(pipeline, conditions)
    names = labels or known or [str(number) for number in sample_index.tolist()]
    if len(names) != len(sample_index):
        raise ValueError(
            f"`conditions` and `labels` need one entry per sample, {len(sample_index)}, got "
            f"{len(names)}."
        )
    config = pipeline.sampling if config is None else config
    trace = Trace()
    pipeline.sample(
        condition,
        sample_index.to(pipeline.device),
        grid=pipeline.latent_grid(*size),
        config=config,
        seed=seed,
        observer=trace,
    )
    return Inspection(
        traces=tuple(trace[number] for number in sample_index.tolist()),
        labels=tuple(names),
        sample_index=sample_index.cpu(),
        config=config,
        alphabet_size=pipeline.config.alphabet_size,
    )
