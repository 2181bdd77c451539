"""Drawing into the layout of a benchmark: what its two tools have in common."""

from dataclasses import dataclass
from pathlib import Path

from grn_lightning.scripts.draw_plan import DrawOptions, SamplePlan, fingerprint
from grn_lightning.scripts.drawers import plan_samples
from grn_lightning.scripts.layouts import Layout, LayoutJob
from grn_lightning.scripts.parts import do_parts, settle_plan
from grn_lightning.scripts.records import code_version, environment, now
from grn_lightning.scripts.runs import choose_device


@dataclass(frozen=True)
class LayoutReport:
    """What was drawn, and where it lies."""

    layout: str
    """ "geneval" or "vbench"."""
    folder: Path
    """What the benchmark is pointed to."""
    num_samples: int
    """Samples in it."""
    num_prompts: int
    """Prompts that they show."""
    list_file: Path
    """How each was made."""

    def __str__(self) -> str:
        """Say what to give to the scorer."""
        scorer = {"geneval": "evaluation/evaluate_images.py", "vbench": "vbench evaluate"}
        return (
            f"{self.num_samples} samples of {self.num_prompts} prompts in '{self.folder}', for "
            f"`{scorer[self.layout]}`; '{self.list_file}' tells how each was made"
        )


def draw_layout(
    checkpoint: Path | None, layout: Layout, out: Path, options: DrawOptions, *, command: str
) -> LayoutReport | None:
    """Draw what is missing of a layout.

    Args:
        checkpoint: Who draws, or None with `options.weights`.
        layout: What becomes which file.
        out: Folder of the layout.
        options: How it is drawn.
        command: What was typed, for the record.

    Returns:
        What there is; None in all but the first of several processes.

    Raises:
        ValueError: If the generator does not draw that, or the folder holds something else.
    """
    if layout.per_prompt < 1:
        raise ValueError(f"`per_prompt` must be at least 1, got {layout.per_prompt}.")
    device = choose_device(options.device)
    drawer = plan_samples(checkpoint, options, device=device)
    plan = drawer.plan
    _check(drawer.num_classes is None, plan, layout)
    prompts = [[prompt.text, prompt.shown] for prompt in layout.prompts]
    facts = plan.facts() | {
        "layout": layout.name,
        "per_prompt": layout.per_prompt,
        "prompts": fingerprint(prompts),
    }
    settle_plan(out, facts)
    layout.prepare(out)
    job = LayoutJob(out, plan, layout)
    if not do_parts(job, devices=options.devices, device=options.device):
        return None
    record = {
        "command": command,
        "date": now(),
        "code": code_version(),
        "environment": environment(device),
        **plan.described(),
        **facts,
    }
    list_file = job.finish(record)
    count = len(layout.prompts)
    return LayoutReport(layout.name, out / layout.folder, layout.num_samples, count, list_file)


def _check(is_text: bool, plan: SamplePlan, layout: Layout) -> None:
    if not is_text:
        raise ValueError(f"{layout.name} is about prompts, and this generator draws classes.")
    frames = plan.size.num_frames
    if layout.name == "geneval" and frames != 1:
        raise ValueError(f"GenEval scores pictures, got clips of {frames} frames; --num_frames 1.")
    if layout.name == "vbench" and frames == 1:
        raise ValueError("VBench scores clips, got pictures; give `--num_frames` or `--seconds`.")
