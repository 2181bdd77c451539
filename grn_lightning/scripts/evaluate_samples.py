"""`grn evaluate samples`: draw many samples, on any number of processes, and judge the set."""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grn_lightning.datasets.manifest import write_json
from grn_lightning.metrics import DigitJudge, Measurement, ReferenceStatistics
from grn_lightning.metrics.protocols import CONVENTIONS, Rounding, metric_name
from grn_lightning.scripts.asking import Asked, what_to_ask
from grn_lightning.scripts.draw_plan import DrawOptions, SamplePlan, fingerprint
from grn_lightning.scripts.drawers import plan_samples
from grn_lightning.scripts.parts import do_parts, settle_plan
from grn_lightning.scripts.records import (
    Figure,
    add_evaluation,
    code_version,
    command_line,
    environment,
    figures_as_json,
    now,
    read_evaluations,
)
from grn_lightning.scripts.runs import TrainedRun, choose_device, file_hash
from grn_lightning.scripts.sample_features import Extracted, FeatureJob, FeatureSource
from grn_lightning.scripts.sample_scores import (
    Compared,
    costs,
    has_numbers,
    left_out,
    measure,
    shares,
)

_OPTIONS = DrawOptions()
_RESULT_FILE = "result.json"
_MEANINGS = {
    "fid": "Frechet distance of pictures to real ones; 0 is the same distribution",
    "sfid": "the same, by features that know where in the picture they are",
    "fvd": "Frechet distance of clips to real ones; 0 is the same distribution",
    "is": "Inception score; higher is better",
    "kid": "kernel distance of pictures to real ones; 0 is the same distribution",
    "precision": "share of samples that lie among real ones",
    "recall": "share of real ones that lie among samples",
    "clip_score": "how well samples fit their captions; higher is better",
}


@dataclass(frozen=True)
class SetReport:
    """What was found, and where it lies."""

    title: str
    """What was judged."""
    measurements: tuple[Measurement, ...]
    """The numbers, with their protocols."""
    figures: tuple[Figure, ...]
    """Other numbers, with theirs."""
    folder: Path
    """Folder of the parts, the samples if they are kept, and the result."""
    file: Path
    """All that is needed to repeat the numbers."""
    left_out: tuple[str, ...] = ()
    """What could not be had, and why."""

    def __str__(self) -> str:
        """List the numbers with their protocol, one a line, as other programs may read them."""
        lines = [self.title]
        for measurement in self.measurements:
            lines.append(str(measurement))
            lines += [f"  {caveat}" for caveat in measurement.caveats]
        lines += [f"{figure.tag}={figure.text}" for figure in self.figures]
        if self.left_out:
            lines.append(f"  left out: {'; '.join(self.left_out)}")
        return "\n".join([*lines, f"all that is needed to repeat them is in '{self.file}'"])


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _one_or_each(name: str, given: Sequence[Path], count: int) -> list[Path | None]:
    """Return what was given for each of the features: nothing, one for all, or one for each."""
    if len(given) not in (0, 1, count):
        raise ValueError(
            f"`{name}` must be one file, or one for each of the {count} `features`, got "
            f"{len(given)}."
        )
    return [*given] if len(given) == count else [*given, None][:1] * count


def _compared(
    names: Sequence[str],
    weights: Sequence[Path],
    references: Sequence[Path],
    *,
    judge: Path | None,
    rounding: Rounding | None,
) -> list[Compared]:
    """Open features and references, each network once, before anything is drawn.

    Raises:
        ValueError: If one is missing, or they do not belong together.
    """
    if len(set(names)) < len(names):
        raise ValueError(f"`features` must be different ones, got {list(names)}.")
    if rounding is not None and not set(names) & set(CONVENTIONS):
        raise ValueError(
            f"`rounding` is of the Inception, {', '.join(CONVENTIONS)}, which is not among the "
            f"`features` {', '.join(names)}."
        )
    files = _one_or_each("feature_weights", weights, len(names))
    found = []
    for name, file, path in zip(
        names, files, _one_or_each("reference", references, len(names)), strict=True
    ):
        file = judge if name == DigitJudge.name and file is None else file
        how = rounding if name in CONVENTIONS else None
        features = Extracted.look(FeatureSource(name, file, how))
        reference = None
        if path is not None:
            reference = ReferenceStatistics.read(path, protocol=features.protocol)
        found.append(Compared(features, reference))
    return found


def _facts(plan: SamplePlan, asked: Asked, compared: Sequence[Compared], rest: dict) -> dict:
    """Return all that decides the parts, as plain data."""
    return {
        **plan.facts(),
        "conditions": {"count": len(asked.values), "sha256": asked.sha256, "field": asked.field},
        "features": {one.features.name: one.features.facts() for one in compared},
        **rest,
    }


def _as_figures(measurements: Sequence[Measurement]) -> list[Figure]:
    """Return measurements as reports show them."""
    return [
        Figure(
            metric_name(one.metric),
            one.protocol.parts,
            one.value,
            meaning="; ".join([_MEANINGS.get(one.metric, ""), *one.caveats]),
        )
        for one in measurements
    ]


def _record(
    job: FeatureJob,
    run: TrainedRun | None,
    compared: Sequence[Compared],
    report: SetReport,
    rest: dict[str, Any],
) -> dict[str, Any]:
    """Return all that is needed to repeat the numbers, and the numbers."""
    plan, count = job.plan, len(job.asked.values)
    about = f"{count} samples, {job.asked.origin}, {plan.size} pixels"
    return {
        "about": about,
        "stage": "generator",
        "refine": None,
        **plan.described(),
        "step": 0 if run is None else run.step,
        "samples_seen": 0 if run is None else run.samples_seen,
        "size": list(plan.size),
        "num_samples": count,
        "data": job.asked.origin,
        "split": "",
        "plan": rest.pop("plan"),
        "references": [
            {
                "features": one.features.name,
                "label": None if one.reference is None else one.reference.label,
                "sha256": None if one.reference is None else one.reference.digest,
                "protocol": None if one.reference is None else one.reference.protocol.as_dict(),
            }
            for one in compared
        ],
        "measurements": [one.as_dict() for one in report.measurements],
        "figures": figures_as_json([*_as_figures(report.measurements), *report.figures]),
        "left_out": list(report.left_out),
        "costs": costs(job),
        "psnr_by_rounds": [],
        "pictures": [],
        **rest,
    }


def _device_tag(job: FeatureJob, spent: dict[str, Any], device: str) -> list[Figure]:
    at_most, batch = job.plan.walk, f"batch {job.plan.batch_size}"
    return [
        Figure("steps/sample", at_most, spent["mean_steps"], meaning="mean number of steps"),
        Figure(
            "forwards/sample",
            at_most,
            spent["forwards_per_sample"],
            meaning="mean number of rows that the generator is asked for",
        ),
        Figure(
            "seconds/sample",
            (*at_most, device, batch),
            spent["seconds_per_sample"],
            "s",
            "condition, drawing and decoding, judges left out, added up over processes",
        ),
    ]


def evaluate_samples(
    checkpoint: Path | None = None,
    *,
    num_samples: int | None = None,
    conditions: Path | None = None,
    split: str = "val",
    features: list[str] | str = "torch_fidelity",
    reference: list[Path] | Path | None = None,
    feature_weights: list[Path] | Path | None = None,
    rounding: Literal["round", "truncate"] | None = None,
    judge: Path | None = None,
    out: Path | None = None,
    part_size: int = 256,
    keep_samples: bool = False,
    config: DrawOptions = _OPTIONS,
) -> SetReport | None:
    """Draw any number of samples on any number of processes, and judge the set by a protocol.

    A class-conditional generator draws every class equally often; with `--conditions` it draws
    those of a data set, and a text-conditional one its captions. Samples are drawn and judged in
    parts, which are kept: the same command goes on where it was interrupted. Processes are started
    by `--devices`, torchrun or SLURM, or by giving the command again where the same folder is seen;
    none of that changes a number.

    Args:
        checkpoint: Checkpoint of a generator, the folder of its run, or an export; of
            coarse-to-fine prediction its stage 1, with stage 2 as `--fine`.
        num_samples: How many samples, 50000 for publications; by default one for every condition.
        conditions: Folder of shards whose captions or classes are asked for, or a text file with
            one prompt a line; more samples than conditions must be a multiple of them.
        split: Split of those shards.
        features: One or more of `torch_fidelity`, `adm`, `clean` (the Inception, fed in the three
            ways of publications), `digits-cnn`, `dinov2`, `clip:ARCHITECTURE` and `video`.
        reference: Statistics of real pictures, for each of the features or for all of them:
            `.npz` of ADM or JiT, or what `grn evaluate stats` has written.
        feature_weights: File of the weights behind them, for each or for all; for the Inception by
            default the one in torch hub's cache, for digits that of the judge.
        rounding: How samples become bytes for the Inception; by default as the protocol does it.
            `adm` truncates, as ADM and VAR do; DiT and LlamaGen use its evaluator and `round`.
        judge: Judge of the embedded set, which also reads whether samples show what was asked for.
        out: Folder of the parts and the result; by default one in the run's folder, by a hash of
            all that decides the parts.
        part_size: Samples of a part, which one process draws; more fill its batches better.
        keep_samples: Whether samples are kept as PNG or MP4 in `OUT/samples`, by number.
        config: How samples are drawn.

    Raises:
        ValueError: If generator, conditions, features and reference do not fit together.
    """
    given, start, date = dict(locals()), time.perf_counter(), now()
    _check(part_size, judge)
    device = choose_device(config.device)
    drawer = plan_samples(checkpoint, config, device=device)
    plan, run = drawer.plan, drawer.run
    asked = what_to_ask(
        drawer.num_classes, num_samples=num_samples, conditions=conditions, split=split
    )
    compared = _compared(
        _as_list(features),
        _as_list(feature_weights),
        _as_list(reference),
        judge=judge,
        rounding=rounding,
    )
    if len(asked.values) < 2:
        raise ValueError(f"a set must have at least 2 samples, got {len(asked.values)}.")

    judge_hash = None if judge is None else file_hash(judge)
    facts = _facts(plan, asked, compared, {"part_size": part_size, "judge": judge_hash})
    if run is not None:
        read_evaluations(run.folder)  # refuses what the result could not be added to
    folder = out or _default_folder(run, facts)
    settle_plan(folder, facts)
    sources = [one.features.source for one in compared]
    job = FeatureJob(folder, plan, asked, sources, judge, part_size, keep_samples)
    missing = left_out(job, compared)
    _warn_of_no_number(job, compared, missing)
    if not do_parts(job, devices=config.devices, device=config.device):
        return None

    spent = costs(job)
    report = SetReport(
        title=f"{len(asked.values)} samples of {plan.recipe.checkpoint}, {asked.origin}, "
        f"{plan.size}",
        measurements=tuple(measure(job, compared)),
        figures=(*shares(job), *_device_tag(job, spent, device.type)),
        folder=folder,
        file=folder / _RESULT_FILE,
        left_out=tuple(missing),
    )
    record = _record(
        job,
        run,
        compared,
        report,
        {
            **drawer.origin,
            "plan": facts,
            "command": command_line(evaluate_samples, given),
            "date": date,
            "seconds": time.perf_counter() - start,
            "code": code_version(),
            "environment": environment(device),
        },
    )
    write_json(report.file, record)
    if run is not None:
        add_evaluation(run.folder, record)
    return report


def _check(part_size: int, judge: Path | None) -> None:
    if part_size < 1:
        raise ValueError(f"`part_size` must be at least 1, got {part_size}.")
    if judge is not None and not judge.is_file():
        raise ValueError(f"no judge at '{judge}'; `grn digits` writes one beside the embedded set.")


def _warn_of_no_number(
    job: FeatureJob, compared: Sequence[Compared], missing: Sequence[str]
) -> None:
    if not has_numbers(job, compared):
        warnings.warn(
            f"these samples will have no number ({'; '.join(missing)}); their features are kept, "
            "and the same command with a `--reference` judges them without drawing again.",
            stacklevel=3,
        )


def _default_folder(run: TrainedRun | None, facts: dict[str, Any]) -> Path:
    parent = Path("runs") if run is None else run.folder
    return parent / "evaluation" / f"samples-{fingerprint(facts)}"
