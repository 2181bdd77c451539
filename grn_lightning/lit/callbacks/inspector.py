"""What refinement does and what the network knows, at every validation: panels for TensorBoard.

Every process draws the same few samples, so that sharded weights can be gathered, and counts the
held-out samples of its own batches, whose sums are reduced; the first process writes. Which ones
count is said by their numbers, so any number of processes and any batch size shows the same.
docs/inspector.md says how to read each panel.
"""

import math
import warnings
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import lightning as L
import torch
from torch import Tensor

from grn_lightning.datasets.order import ValidationBatchSampler
from grn_lightning.functional import elements_to_codes
from grn_lightning.lit.base import require_stage
from grn_lightning.lit.cached import cached_elements
from grn_lightning.lit.callbacks.due import is_nth_validation
from grn_lightning.lit.callbacks.tensorboard import (
    has_tensorboard,
    log_film,
    log_histogram,
    log_layout,
    log_picture,
    log_text,
)
from grn_lightning.lit.generator import LitGenerator
from grn_lightning.media.figures import bar_figure
from grn_lightning.metrics.refinement import CodeComparison, RefinementAlarms, compare_codes
from grn_lightning.metrics.rounds import RoundAccuracy, RoundAccuracyResult
from grn_lightning.pipelines.inspection import Inspection, inspect_refinement
from grn_lightning.pipelines.knowledge import AccuracyInspection, accuracy_at_times
from grn_lightning.samplers import AdaptiveSteps, RefineConfig, StepBudget, fit_steps

_STEPS_PER_SECOND = 3.0
_HOLD = 4  # so many times the last step is shown
_LAYOUT = {
    "loss": [r"train/loss", r"val/loss"],
    "right elements of held-out samples, by time": [r"val_accuracy/t.*"],
    "right bits of held-out samples, by round": [r"val_accuracy/round.*"],
    "right elements in training, by time": [r"train_accuracy/t.*"],
    "judges": [r"val/.*_accuracy"],
    "refinement": [r"inspect/(complexity|flips_last)"],
    "drawn codes beside true ones": [r"inspect/(balance_gap|.*_ratio)"],
}


@dataclass(frozen=True)
class HeldOut:
    """One held-out sample, as processes tell each other of it."""

    number: int
    """Its position in the validation set."""
    elements: Tensor
    """`(c, *grid)` small integers, in main memory."""
    size: tuple[int, int, int]
    """Frames, height and width in pixels."""
    asked: dict[str, Any]
    """Its caption, class or text features, by the name of the batch's field."""


class Inspector(L.Callback):
    """Draw a few samples of the averaged weights at validations and show how they came about.

    Scalars, pictures, histograms and a text, all under `inspect/`, and the accuracy by round of the
    quantizer as `val_accuracy/roundN`. Samples have the conditions of the first held-out ones; of
    clips of several sizes those with the most frames are drawn.

    Args:
        num_samples: Samples that are drawn.
        num_held_out: Held-out samples of each size, the first so many by number, that count after
            the network was shown them at every time; at least `num_samples`.
        num_times: Times at which it is shown them, in the middles of equal parts of [0, 1].
        every_n_validations: Inspect at every n-th validation only; a resumed training counts on.
        refine: Steps, guidance and temperature.
        alarms: Limits; null takes the defaults.

    Raises:
        ValueError: If a number is too small.
    """

    def __init__(
        self,
        num_samples: int = 16,
        num_held_out: int = 64,
        num_times: int = 10,
        every_n_validations: int = 1,
        refine: RefineConfig | None = None,
        alarms: RefinementAlarms | None = None,
    ):
        given = {
            "num_samples": (num_samples, 2),
            "num_held_out": (num_held_out, num_samples),
            "num_times": (num_times, 2),
            "every_n_validations": (every_n_validations, 1),
        }
        for name, (value, minimum) in given.items():
            if value < minimum:
                raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")
        self.num_samples, self.num_held_out = num_samples, num_held_out
        self.num_times, self.every_n_validations = num_times, every_n_validations
        self.refine = refine or RefineConfig()
        self.alarms = alarms or RefinementAlarms()
        self._validations = 0
        self._forget()

    def _forget(self) -> None:
        self._is_due = False
        self._starts: list[int] = [0]  # number of each source's first sample
        self._seen: dict[int, int] = {}  # rows of each source, the same on every process
        self._ends: dict[tuple[int, int, int], int] = {}  # of each size, the first that counts not
        self._rows: list[HeldOut] = []
        self._accuracy: RoundAccuracy | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a run of another stage."""
        require_stage(self, pl_module, LitGenerator)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lay out the charts of several scalars."""
        log_layout(trainer, _LAYOUT)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Decide whether this validation is inspected."""
        assert isinstance(pl_module, LitGenerator)
        self._forget()
        if not trainer.sanity_checking:
            so_far, self._validations = self._validations, self._validations + 1
            every = self.every_n_validations
            self._is_due = is_nth_validation(trainer, every=every, so_far=so_far)
        sampler = getattr(trainer.val_dataloaders, "batch_sampler", None)
        if isinstance(sampler, ValidationBatchSampler):
            self._starts = [*accumulate(sampler.num_samples, initial=0)][:-1]

    def _end_of_count(self, batch: Any, size: tuple[int, int, int], world_size: int) -> int | None:
        """Return the number of the first sample that does not count any more.

        None if on no process a sample of this batch counts; all processes answer alike.
        """
        source = bisect_right(self._starts, int(batch["sample_index"][0])) - 1
        seen = self._seen.get(source, 0)
        self._seen[source] = seen + len(batch["weights"])
        first = self._starts[source] + seen * world_size  # of this batch, over all processes
        end = self._ends.setdefault(size, first + self.num_held_out)
        return end if first < end else None

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show this batch to the network and remember what was asked for, while budgets last."""
        if not self._is_due or not {"clips", "codes"} & set(batch):
            return
        assert isinstance(pl_module, LitGenerator)
        size = tuple(batch["clip_size"] if "clip_size" in batch else batch["clips"].shape[2:])
        end = self._end_of_count(batch, size, trainer.world_size)
        if end is None:
            return
        pipeline = pl_module.pipeline
        if "codes" in batch:
            x_1 = cached_elements(batch, pipeline, tokenizer_hash=pl_module.tokenizer_hash)
        else:
            x_1 = pl_module.tokenize(batch["clips"])
        if self._accuracy is None:
            rounds = pl_module.tokenizer.config.num_rounds
            self._accuracy = RoundAccuracy(num_rounds=rounds, num_bins=self.num_times)
            self._accuracy.to(pl_module.device)
        accuracy_at_times(
            self._accuracy,
            pipeline,
            x_1,
            pl_module.condition(batch),
            sample_index=batch["sample_index"],
            weights=batch["weights"] * (batch["sample_index"] < end),
        )
        self._remember(batch, x_1, size)

    def _remember(self, batch: Any, x_1: Tensor, size: tuple[int, int, int]) -> None:
        """Keep as many rows as this process could be asked for."""
        fields = ("text_embeds", "text_mask", "captions", "class_labels")
        values = {name: batch[name] for name in fields if name in batch}
        small = x_1.to(torch.uint8 if int(x_1.max()) < 256 else torch.int32).cpu()
        for row, number in enumerate(batch["sample_index"].tolist()):
            if sum(kept.size == size for kept in self._rows) >= self.num_samples:
                return
            if batch["weights"][row] > 0:
                asked = {name: _row(part[row]) for name, part in values.items()}
                self._rows.append(HeldOut(number, small[row], size, asked))

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw on every process, write on the first; the averaged weights are in place."""
        if not self._is_due or self._accuracy is None:
            return
        assert isinstance(pl_module, LitGenerator)
        result = self._accuracy.compute()
        rows = _first_of_all(self._rows, self.num_samples)
        self._forget()
        for number, accuracy in enumerate(result.mean_by_round.tolist()):
            pl_module.log(f"val_accuracy/round{number}", accuracy)
        if not rows:
            return
        found = _drawn_like(rows, pl_module, self.refine)
        compared = _beside(found, rows, pl_module)
        alarms = self.alarms.sentences(compared, found.entropy)
        _log_scalars(pl_module, found, compared, len(alarms))
        if trainer.is_global_zero:
            for text in alarms:
                warnings.warn(f"samples at step {trainer.global_step}: {text}", stacklevel=2)
        if has_tensorboard(trainer):
            log_text(trainer, "inspect/alarms", "\n".join(f"- {t}" for t in alarms) or "none")
            _log_refinement(trainer, pl_module, found)
            _log_knowledge(trainer, result, compared)
            _log_steps(trainer, found)


# --- rows -----------------------------------------------------------------------------------------


def _row(value: Any) -> Any:
    """Return a row of a batch in main memory, without what it was cut from."""
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _first_of_all(rows: list[HeldOut], count: int) -> list[HeldOut]:
    """Return the first held-out samples with the most frames, the same ones on every process."""
    everyone: list[Any] = [rows]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        everyone = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, rows)
    joined = [row for part in everyone for row in part]
    if not joined:
        return []
    longest = max(row.size for row in joined)
    alike = [row for row in joined if row.size == longest]
    return sorted(alike, key=lambda row: row.number)[:count]


def _drawn_like(rows: list[HeldOut], module: LitGenerator, refine: RefineConfig) -> Inspection:
    """Draw a sample for the condition of every row, with the row's number."""
    first = rows[0].asked
    batch: dict[str, Any] = {name: [row.asked[name] for row in rows] for name in first}
    for name, values in batch.items():
        if isinstance(values[0], Tensor):
            batch[name] = torch.stack(values).to(module.device)
    name = "captions" if module.is_text else "class_labels"
    labels = [str(value) for value in batch[name]] if name in batch else None
    if labels and not module.is_text:
        labels = [str(int(value)) for value in batch[name]]
    return inspect_refinement(
        module.pipeline,
        module.condition(batch),
        torch.tensor([row.number for row in rows]),
        size=rows[0].size,
        config=refine,
        labels=labels,
    )


def _beside(found: Inspection, rows: list[HeldOut], module: LitGenerator) -> CodeComparison:
    """Compare drawn codes with those of the held-out samples."""
    rounds, target = module.tokenizer.config.num_rounds, module.target
    drawn, true = (
        elements_to_codes(elements, num_rounds=rounds, target=target)
        for elements in (found.codes, torch.stack([row.elements for row in rows]).long())
    )
    return compare_codes(drawn, true, num_rounds=rounds)


# --- panels ---------------------------------------------------------------------------------------


def _log_scalars(
    module: LitGenerator, found: Inspection, compared: CodeComparison, num_alarms: int
) -> None:
    flips, entropy = (
        float(torch.stack([getattr(trace, name)[-1] for trace in found.traces]).mean())
        for name in ("flips", "entropy")
    )
    values: dict[str, float] = {
        "complexity": float(found.complexity().mean()),
        "open_bits_first": float(found.bits[0].mean()),
        "open_bits_last": entropy * found.bits_of_map,
        "flips_last": flips,
        "balance_gap": float(compared.balance_gap.max()),
        "entropy_ratio": compared.entropy_ratio,
        "difference_ratio": compared.difference_ratio,
        "num_alarms": float(num_alarms),
    }
    for name, value in values.items():
        if not math.isnan(value):  # ratios of nothing are
            module.log(f"inspect/{name}", value)


def _log_refinement(trainer: L.Trainer, module: LitGenerator, found: Inspection) -> None:
    """Write maps and curves of the steps."""
    pages = found.pages(module.pipeline)
    log_film(trainer, "inspect/maps", pages + pages[-1:] * _HOLD, fps=_STEPS_PER_SECOND)
    log_picture(trainer, "inspect/strip", found.strip(module.pipeline))
    log_picture(trainer, "inspect/elements", found.elements_figure())
    log_picture(trainer, "inspect/entropy", found.entropy_figure())
    log_picture(trainer, "inspect/flips", found.flips_figure())


def _log_knowledge(
    trainer: L.Trainer, result: RoundAccuracyResult, compared: CodeComparison
) -> None:
    """Write accuracy by time and round, and the balance of drawn bits beside that of true ones."""
    result = RoundAccuracyResult(*(part.cpu() for part in result))
    times = (torch.arange(len(result.loss)) + 0.5) / len(result.loss)
    known = AccuracyInspection(times, result)
    log_picture(trainer, "inspect/accuracy", known.figure())
    log_picture(trainer, "inspect/accuracy_map", known.map())
    ones = {
        name: report.ones_fraction.reshape(-1)
        for name, report in (("held out", compared.true), ("drawn", compared.drawn))
    }
    rounds = [str(number) for number in range(len(ones["drawn"]))]
    figure = bar_figure(
        ones,
        rounds,
        title="share of ones among bits",
        x_label="round, most significant first",
        y_limits=(0.0, 1.0),
        middle=0.5,
    )
    log_picture(trainer, "inspect/bit_balance", figure)


def _log_steps(trainer: L.Trainer, found: Inspection) -> None:
    """Write complexities, and how many steps samples get of an adaptive rule."""
    rule = found.config.adaptive or rule_of_half(found)
    log_picture(trainer, "inspect/complexity_by_sample", found.complexity_figure())
    values = found.complexity()
    if torch.isfinite(values).all():
        edges = torch.linspace(0, 1, 51)
        log_histogram(trainer, "inspect/complexity_histogram", values, edges=edges)
    if rule is None:
        return
    steps = found.num_steps if found.config.adaptive else found.steps_under(rule)
    edges = torch.arange(found.config.num_steps + 2) - 0.5
    log_histogram(trainer, "inspect/steps_histogram", steps.double(), edges=edges)
    log_picture(trainer, "inspect/steps_by_sample", found.steps_figure(rule))


def rule_of_half(found: Inspection) -> AdaptiveSteps | None:
    """Return the rule by which these samples would take half as many steps on average.

    A tenth of the steps is walked before the decision, a fifth at least, as `grn calibrate` does
    of 50. None where walks are too short or an entropy is NaN.
    """
    most = found.config.num_steps
    decision = max(1, most // 10)
    budget = StepBudget(
        mean_steps=most / 2, min_steps=max(decision + 1, most // 5), decision_step=decision
    )
    is_long = budget.min_steps <= budget.mean_steps and int(found.num_steps.min()) > decision
    if not is_long or not torch.isfinite(found.entropy[decision]).all():
        return None
    return fit_steps(found.complexity(decision), budget, max_steps=most)
