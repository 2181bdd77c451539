"""The sections of a report, from the samples down to the settings."""

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import torch
import yaml

from grn_lightning import __version__
from grn_lightning.scripts.records import Picture, environment, figures_from_json, now
from grn_lightning.scripts.report_curves import Chart, Line, charts_of, draw_chart
from grn_lightning.scripts.report_inspector import add_panels, has_panels
from grn_lightning.scripts.report_page import Page, named
from grn_lightning.scripts.report_runs import Told
from grn_lightning.scripts.runs import ClipSize


def _protocol(evaluation: dict[str, Any]) -> str:
    """One line: on what an evaluation was made, and how."""
    line = evaluation.get("about") or (
        f"First {evaluation['num_samples']} of split {evaluation['split']} in "
        f"{evaluation['data']}, {ClipSize(*evaluation['size'])} pixels"
    )
    refine = evaluation["refine"]
    if refine is not None:
        line += (
            f"; {refine['num_steps']} steps, guidance {refine['guidance_scale']:g}, temperature "
            f"{refine['temperature']:g}, seed {evaluation['seed']}"
        )
    if (draw := evaluation.get("draw")) is not None:  # coarse-to-fine prediction
        for stage in ("coarse", "fine") if evaluation.get("fine") else ("coarse",):
            line += (
                f"; {stage} labels at guidance {draw[stage]['guidance_scale']:g}, temperature "
                f"{draw[stage]['temperature']:g}"
            )
        line += f", seed {evaluation['seed']}"
    return line + f"; checkpoint after {evaluation['step']} steps."


def _pictures(evaluation: dict[str, Any], kind: str) -> list[Picture]:
    return [Picture(**row) for row in evaluation["pictures"] if row["kind"] == kind]


def _add_samples(page: Page, told: Told, evaluation: dict[str, Any]) -> None:
    samples = _pictures(evaluation, "sample")
    is_judged = any(picture.is_right is not None for picture in samples)
    page.paragraph(
        f"{len(samples)} samples of {told.name}, one for each of the first captions or classes of "
        "the held-out set; none was picked."
        + " ✓ or ✗ is what an independent judge reads."
        * is_judged
    )
    page.paragraph(_protocol(evaluation), kind="muted")
    page.pictures(told.run.folder, samples, kind="samples")
    for strip in _pictures(evaluation, "strip"):
        page.folded_picture(told.run.folder / strip.file, "The first of them frame by frame")


def _add_figures(page: Page, told: Told) -> None:
    page.heading(told.name, level=3)
    if not told.evaluations:
        page.missing("No numbers yet", told.evaluate_command)
    for evaluation in told.evaluations:
        page.figures(_protocol(evaluation), figures_from_json(evaluation["figures"]))


def _add_reconstructions(page: Page, told: Told) -> None:
    for evaluation in told.evaluations:
        page.heading(f"{told.name} on {evaluation['data']}", level=3)
        page.paragraph("Original, reconstruction, difference.", kind="muted")
        page.pictures(told.run.folder, _pictures(evaluation, "sample"), kind="triples")
        for strip in _pictures(evaluation, "strip"):
            page.folded_picture(told.run.folder / strip.file, "Frame by frame")


def _judged_how(config: Path | None) -> str:
    """Say how samples were judged during the training, if its configuration tells."""
    content = yaml.safe_load(config.read_text()) if config else None
    trainer = (content or {}).get("trainer") or {}
    callbacks = trainer.get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if str(callback.get("class_path", "")).endswith("EvaluateSamples"):
            arguments = callback.get("init_args", {})
            steps = (arguments.get("refine") or {}).get("num_steps", "default")
            return f"{arguments.get('num_samples', 'default')} held-out captions, {steps} steps"
    return ""


def _rounds_chart(told: Told) -> list[Chart]:
    """PSNR over the number of rounds that are decoded."""
    lines = []
    for evaluation in told.evaluations:
        figures = figures_from_json(evaluation["psnr_by_rounds"])
        rounds = [float(figure.protocol[0].removeprefix("M=")) for figure in figures]
        label = f"{evaluation['data']}, {figures[0].protocol[1]} of {figures[0].protocol[2]}"
        lines.append(Line(label, rounds, [figure.value for figure in figures]))
    title = "PSNR in dB over rounds M decoded"
    if len(lines) == 1:
        title += f" ({lines[0].label})"
    return [draw_chart(title, lines, x_label="rounds M")] if lines else []


def _add_curves(page: Page, told: Told) -> None:
    page.heading(told.name, level=3)
    charts = _rounds_chart(told) if told.run.stage == "tokenizer" else []
    if told.history is not None:
        charts = charts_of(told.history, judged_how=_judged_how(told.config)) + charts
    else:
        page.missing("No event files of TensorBoard", "grn fit")
    page.charts(charts)


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.1f} min" if hours < 2 else f"{hours:.1f} h"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _add_clock(page: Page, stories: Sequence[Told]) -> None:
    """Append how long every stage took, in the order of time."""
    stages = []
    for told in stories:
        steps = f"{told.run.step:,} steps, {told.run.samples_seen:,} samples"
        if told.history is not None:
            stages.append((told.history.started, told.history.seconds, f"train {told.name}", steps))
        for evaluation in told.evaluations:
            started = datetime.fromisoformat(evaluation["date"]).timestamp()
            what = f"{evaluation['num_samples']} samples of {evaluation['data']}"
            stages.append((started, evaluation["seconds"], f"evaluate {told.name}", what))
    rows = [
        (named(name, f"{what}; begun {_time(started)}"), _duration(seconds))
        for started, seconds, name, what in sorted(stages)
    ]
    page.table(["", ""], rows)


def _environments(evaluations: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return where the evaluations ran; what differs between them stands side by side."""
    known = [evaluation["environment"] for evaluation in evaluations]
    known = known or [environment(torch.device("cpu"))]
    names = list(dict.fromkeys(name for facts in known for name in facts))
    values = {
        name: dict.fromkeys(facts[name] for facts in known if name in facts) for name in names
    }
    return [(name, " / ".join(value)) for name, value in values.items()]


def _add_making(page: Page, stories: Sequence[Told]) -> None:
    page.heading("How it was made")
    page.heading("Wall-clock", level=3)
    _add_clock(page, stories)
    page.heading("Commands", level=3)
    page.paragraph("Each training is repeated from the configuration below.", kind="muted")
    evaluations = [e for told in stories[::-1] for e in told.evaluations[::-1]]
    fits = [f"grn fit -c {told.config}" for told in stories[::-1] if told.config]
    page.code("\n".join([*fits, *(evaluation["command"] for evaluation in evaluations)]))
    page.heading("Environment", level=3)
    page.facts(_environments(evaluations))
    page.heading("Configuration", level=3)
    for told in stories:
        if told.config:
            page.code(told.config.read_text(), summary=f"{told.name}: config.yaml")
        else:
            page.missing(f"{told.name} has no config.yaml", "grn fit")


def build_page(stories: Sequence[Told]) -> Page:
    """Lay out what is known of some runs, samples first."""
    page = Page("Report: " + ", ".join(told.name for told in stories))
    page.add("<header>")
    page.add(f"<h1>{escape(', '.join(told.name for told in stories))}</h1>")
    page.paragraph(f"grn_lightning {__version__}, {now()[:16].replace('T', ' ')} UTC", kind="muted")
    page.add("</header>")
    generators = [told for told in stories if told.run.stage == "generator"]
    tokenizers = [told for told in stories if told.run.stage == "tokenizer"]
    for told in generators:
        shown = [one for one in told.evaluations if _pictures(one, "sample")]  # sets have none
        if not shown:
            page.missing(f"No samples of {told.name} yet", told.evaluate_command)
        for evaluation in shown:
            _add_samples(page, told, evaluation)
    page.heading("Numbers")
    for told in stories:
        _add_figures(page, told)
    if any(told.evaluations for told in tokenizers):
        page.heading("Reconstructions")
        for told in tokenizers:
            _add_reconstructions(page, told)
    watched = [told for told in generators if has_panels(told.history)]
    if watched:
        page.heading("Refinement")
        page.paragraph(
            "What the steps of sampling do and what the network knows, at the last validation of "
            "the training. `docs/inspector.md` says how to read it."
        )
        for told in watched:
            assert told.history is not None
            add_panels(page, told.name, told.history)
    page.heading("Training")
    for told in stories:
        _add_curves(page, told)
    _add_making(page, stories)
    if page.left_out:
        where = sorted({str(file.parent) for file in page.left_out})
        page.paragraph(
            f"{len(page.left_out)} pictures were left out to keep the page small; they lie in "
            f"{', '.join(f'`{folder}`' for folder in where)}.",
            kind="muted",
        )
    return page
