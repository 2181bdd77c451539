"""`grn evaluate`: judge a trained tokenizer or generator on held-out data."""

import time
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grn_lightning.datasets.shards import ShardSet
from grn_lightning.lit.generator import LitGenerator, load_generator
from grn_lightning.lit.tokenizer import load_tokenizer
from grn_lightning.models.tokenizers import Tokenizer
from grn_lightning.nn.perceptual import find_vgg_weights
from grn_lightning.samplers import RefineConfig
from grn_lightning.scripts.drawing import size_for
from grn_lightning.scripts.evaluate_generator import evaluate_generator
from grn_lightning.scripts.evaluate_tokenizer import evaluate_tokenizer
from grn_lightning.scripts.heldout import media_of, open_held_out
from grn_lightning.scripts.judging import Judging, judge_beside
from grn_lightning.scripts.pictures import Gallery, new_folder
from grn_lightning.scripts.records import (
    Figure,
    Findings,
    add_evaluation,
    command_line,
    environment,
    figures_as_json,
    now,
    read_evaluations,
)
from grn_lightning.scripts.runs import (
    STAGES,
    ClipSize,
    TrainedRun,
    choose_device,
    file_hash,
    open_run,
)

_REFINE = RefineConfig()
_NUM_SAMPLES = 200  # of a generator, whose samples are not for free


@dataclass(frozen=True)
class EvaluationReport:
    """What was found, and where it lies."""

    title: str
    """What was judged on what."""
    figures: tuple[Figure, ...]
    """The numbers."""
    by_rounds: tuple[Figure, ...]
    """For a tokenizer, PSNR of 1, 2, ... rounds."""
    file: Path
    """The run's `evaluation.json`; this evaluation is its last."""
    pictures: Path
    """Folder of the pictures."""
    rounds: tuple[dict[str, Any], ...] = ()
    """For a tokenizer, bits per pixel and all scores of 1, 2, ... rounds."""
    left_out: tuple[str, ...] = ()
    """What could not be judged, and why."""

    def __str__(self) -> str:
        """List the numbers with their protocol."""
        table = [figure for figure in self.by_rounds if not self.rounds]
        figures = (*self.figures, *table)
        width = max(len(figure.tag) for figure in figures)
        lines = []
        for figure in figures:
            lines.append(f"  {figure.tag:<{width}}  {figure.text:>10}")
            lines += [f"    {caveat}" for caveat in figure.caveats]
        lines += self._table()
        if self.left_out:
            lines.append(f"  left out: {'; '.join(self.left_out)}")
        return "\n".join(
            [self.title, *lines, f"pictures in '{self.pictures}', all facts in '{self.file}'"]
        )

    def _table(self) -> list[str]:
        """Scores over decoded rounds, beside their bits per pixel."""
        if not self.rounds:
            return []
        names = list(self.rounds[0]["scores"])
        protocol = f"[{','.join(self.by_rounds[0].protocol[1:])}]" if self.by_rounds else ""
        lines = ["       rounds  bits/pixel" + "".join(f"{name + protocol:>18}" for name in names)]
        for row in self.rounds:
            label = row["rounds"] or "unquantized"
            scores = "".join(f"{row['scores'][name]:>18.4f}" for name in names)
            lines.append(f"  {label:>11}  {row['bits_per_pixel']:>10.4f}{scores}")
        return lines


def _check(run: TrainedRun, given: dict[str, Any]) -> None:
    """Refuse what cannot be meant or written down, and warn of what has no effect."""
    read_evaluations(run.folder)
    if run.stage in STAGES:
        raise ValueError(
            f"'{run.checkpoint}' is a stage of coarse-to-fine prediction: `grn evaluate "
            "samples` judges it, with its other half as `--fine`, and `grn sample` draws from it."
        )
    batch_size, num_samples = given["batch_size"], given["num_samples"]
    if batch_size < 1 or (num_samples is not None and num_samples < 2):
        got = f"`batch_size`={batch_size} and `num_samples`={num_samples}"
        raise ValueError(f"`batch_size` must be at least 1, `num_samples` at least 2, got {got}.")
    if run.stage == "tokenizer" and (given["refine"] != _REFINE or given["tokenizer"] is not None):
        warnings.warn(
            f"`refine` and `tokenizer` are ignored: '{run.checkpoint}' is a tokenizer, which is "
            "not sampled from.",
            stacklevel=3,
        )


def _default_count(run: TrainedRun, available: int) -> int:
    return available if run.stage == "tokenizer" else min(_NUM_SAMPLES, available)


def _load(run: TrainedRun, tokenizer: Path | None) -> LitGenerator | Tokenizer:
    if run.stage == "tokenizer":
        return load_tokenizer(run.checkpoint)
    return load_generator(run.checkpoint, tokenizer=None if tokenizer is None else str(tokenizer))


def _size(
    trained: LitGenerator | Tokenizer, run: TrainedRun, source: dict[str, Any], **wanted: Any
) -> ClipSize:
    if isinstance(trained, LitGenerator):
        return size_for(trained, run, source, **wanted)
    size = run.choose_size(source, **wanted)
    trained.config.latent_shape(*size)  # refuses what does not fit the strides
    return size


def _record(
    run: TrainedRun, findings: Findings, size: ClipSize, facts: dict[str, Any]
) -> dict[str, Any]:
    """Return all that is needed to repeat the evaluation, and what it found."""
    return {
        "stage": run.stage,
        "checkpoint": str(run.checkpoint),
        "checkpoint_sha256": file_hash(run.checkpoint),
        "step": run.step,
        "samples_seen": run.samples_seen,
        "size": list(size),
        **facts,
        "figures": figures_as_json(findings.figures),
        "psnr_by_rounds": figures_as_json(findings.by_rounds),
        "codes": findings.codes,
        "rounds": [row | {"bits_per_pixel": _finite(row)} for row in findings.rounds],
        "left_out": findings.left_out,
        "pictures": [asdict(picture) for picture in findings.pictures],
    }


def _files(run: TrainedRun, given: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return the files of the networks that judged, with their hashes, by option."""
    files = {name: given[name] for name in ("inception", "video_features")}
    if run.stage == "tokenizer":
        with suppress(ValueError):  # without the file LPIPS was left out
            files["vgg"] = find_vgg_weights(given["vgg"])
    return {
        name: {"file": str(file), "sha256": file_hash(file)}
        for name, file in files.items()
        if file is not None
    }


def _finite(row: dict[str, Any]) -> float | None:
    """Bits per pixel as JSON holds them: nothing without a quantizer, where they are infinite."""
    return row["bits_per_pixel"] if row["rounds"] else None


def evaluate(
    checkpoint: Path,
    data: Path,
    *,
    split: str = "val",
    num_samples: int | None = None,
    judge: Path | None = None,
    inception: Path | None = None,
    protocol: str = "torch_fidelity",
    video_features: Path | None = None,
    vgg: Path | None = None,
    refine: RefineConfig = _REFINE,
    seed: int = 0,
    batch_size: int = 16,
    num_frames: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    tokenizer: Path | None = None,
    device: str = "auto",
) -> EvaluationReport:
    """Judge a trained tokenizer or generator, with averaged weights, on held-out data.

    A tokenizer reconstructs the samples; a generator draws one for the caption or class of each.
    Numbers and all that is needed to repeat them are appended to `evaluation.json` in the run's
    folder, pictures go to a new folder `evaluation/001`, `evaluation/002`, ... beside it.

    Args:
        checkpoint: Checkpoint of a tokenizer or a generator, or the folder of its run.
        data: Folder of shards.
        split: Split to judge on.
        num_samples: Judge the first so many; by default all for a tokenizer, 200 for a generator.
        judge: Judge of the embedded set; by default `judge.safetensors` beside the data, if there.
        inception: File of the Inception weights, which adds the Frechet distance of publications.
        protocol: How the Inception is fed, as publications do it: `torch_fidelity`, `adm` or
            `clean`; part of the name of its numbers.
        video_features: TorchScript file of a video network (I3D for publications), which adds the
            Frechet distance of clips.
        vgg: File of torchvision's VGG-16 weights for LPIPS of a tokenizer; by default those in
            torchvision's folder, if they are there.
        refine: Steps, guidance and temperature of a generator.
        seed: Seed of a generator's noise.
        batch_size: Samples at a time; more need more memory.
        num_frames: Frames of a clip; by default as in training.
        image_size: Height and width in pixels, or one number for both; by default as in training.
        tokenizer: Where a generator's tokenizer lies, if not where it lay in training.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: If checkpoint, data and options do not fit together.
    """
    given, start, date = dict(locals()), time.perf_counter(), now()
    run, shards = open_run(checkpoint), ShardSet.open(data, split)
    _check(run, given)
    num_samples = num_samples or _default_count(run, len(shards))
    judge = judge or judge_beside(data)
    source = run.source(media=media_of(shards), path=data)
    trained = _load(run, tokenizer).to(choose_device(device))
    size = _size(trained, run, source, num_frames=num_frames, image_size=image_size)
    held_out = open_held_out(
        shards,
        split=split,
        size=size,
        fps=source.get("fps"),
        num_samples=num_samples,
        batch_size=batch_size,
    )
    judging = Judging(
        judge=judge,
        inception=inception,
        video_features=video_features,
        device=choose_device(device),
        protocol=protocol,
    )
    gallery = Gallery(new_folder(run.folder / "evaluation"), root=run.folder, fps=held_out.fps)
    if isinstance(trained, LitGenerator):
        findings = evaluate_generator(
            trained, held_out, judging, size=size, config=refine, seed=seed, gallery=gallery
        )
    else:
        findings = evaluate_tokenizer(
            trained, held_out, judging, size=size, gallery=gallery, vgg=vgg
        )

    facts = {
        "data": str(data),
        "data_sha256": held_out.digest.hexdigest(),
        "split": split,
        "num_samples": judging.count,
        "seed": seed,
        "refine": asdict(refine) if run.stage == "generator" else None,
        "judge": None if judge is None else {"file": str(judge), "sha256": file_hash(judge)},
        "files": _files(run, given),
        "weights": trained.pipeline.hashes if isinstance(trained, LitGenerator) else None,
        "fps": held_out.fps,
        "command": command_line(evaluate, given),
        "date": date,
        "seconds": time.perf_counter() - start,
        "environment": environment(choose_device(device)),
    }
    file = add_evaluation(run.folder, _record(run, findings, size, facts))
    return EvaluationReport(
        title=f"{run.stage} {run.checkpoint} on the first {judging.count} of split {split} in "
        f"{data}, {size}",
        figures=tuple(findings.figures),
        by_rounds=tuple(findings.by_rounds),
        file=file,
        pictures=gallery.folder,
        rounds=tuple(findings.rounds),
        left_out=tuple(findings.left_out),
    )
