"""Adaptive steps on the embedded set: is the mean number of steps better spent than evenly?

    python benchmarks/adaptive_digits.py runs/t2v-digits data/digits/clips
    python benchmarks/adaptive_digits.py runs/c2i-digits data/digits/images

Draws a sample for each of the first held-out conditions with fixed steps and with adaptive ones of
the same mean, calibrated on other samples, and lets the judge of the set look at all of them.
Also tells whether samples that took more steps are the more complex ones, by measures that know
nothing of the generator: bytes of a lossless file (PNG, all frames side by side) and the share of
neighbouring pixels between ink and background. Writes `adaptive.md`, `adaptive.json` and
`adaptive.png`.
"""

import argparse
import io
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from torch import Tensor

from grn_lightning.datasets.shards import ShardSet
from grn_lightning.lit.generator import load_generator
from grn_lightning.media.images import to_uint8
from grn_lightning.metrics import DigitJudge
from grn_lightning.samplers import RefineConfig, StepBudget, fit_steps, until_decision
from grn_lightning.scripts.drawing import draw_parts, size_for
from grn_lightning.scripts.heldout import media_of, open_held_out
from grn_lightning.scripts.judging import Judging, judge_beside
from grn_lightning.scripts.runs import open_run

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FIXED = (8, 16, 25, 50)
BUDGETS = {  # wanted mean: the rule, and the most steps
    8: (StepBudget(mean_steps=8.0, min_steps=4, decision_step=2), 24),
    16: (StepBudget(mean_steps=16.0, min_steps=8, decision_step=4), 50),
    25: (StepBudget(mean_steps=25.0, min_steps=10, decision_step=5), 50),
}
CALIBRATION_START = 100_000  # numbers of the samples on which rules are fitted


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=None, help="folder; by default in the run's")
    parser.add_argument("--num_samples", type=int, default=200)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@dataclass
class Arm:
    """One way to spend steps, and what came of it."""

    name: str
    config: RefineConfig
    mean_steps: float = 0.0
    seconds: float = 0.0
    scores: dict[str, float] | None = None
    rank_correlations: dict[str, float] | None = None


class Bench:
    """The held-out conditions, the generator and the judge."""

    def __init__(self, args: argparse.Namespace):
        self.args, run = args, open_run(args.run)
        self.folder = args.out or run.folder / "adaptive"
        shards = ShardSet.open(args.data, "val")
        source = run.source(media=media_of(shards), path=args.data)
        self.pipeline = load_generator(run.checkpoint).pipeline
        self.size = size_for(self.pipeline, run, source, num_frames=None, image_size=None)
        held_out = open_held_out(
            shards,
            split="val",
            size=self.size,
            fps=source.get("fps"),
            num_samples=args.num_samples,
            batch_size=args.batch_size,
        )
        self.batches = list(held_out)
        self.judge_file = judge_beside(args.data)
        assert self.judge_file is not None, "the embedded set lies beside its judge"
        self.judge = DigitJudge.load(self.judge_file)

    def draw(self, config: RefineConfig, *, start: int = 0, decode: bool = True):
        """Yield the batches with what was drawn for them."""
        for batch in self.batches:
            if self.pipeline.is_text:
                wanted = {"captions": batch["captions"]}
            else:
                wanted = {"class_labels": batch["class_labels"].tolist()}
            [part] = draw_parts(
                self.pipeline,
                wanted,
                batch["sample_index"] + start,
                size=self.size,
                config=config,
                seed=self.args.seed,
                batch_size=len(batch["sample_index"]),
                decode=decode,
            )
            yield batch, part

    def calibrated(self, config: RefineConfig, mean: int) -> RefineConfig:
        budget, most = BUDGETS[mean]
        config = replace(config, num_steps=most)
        walk = until_decision(config, budget.decision_step)
        parts = self.draw(walk, start=CALIBRATION_START, decode=False)
        entropies = torch.cat([part.entropy[-1] for _, part in parts])
        return replace(config, adaptive=fit_steps(entropies, budget, max_steps=most))

    def measure(self, arm: Arm) -> None:
        """Draw all samples of an arm and judge them."""
        judging = Judging(
            judge=self.judge_file, inception=None, video_features=None, device=torch.device("cpu")
        )
        steps, complexity, clock = [], [], time.process_time
        for batch, part in self.draw(arm.config):
            judging.add("samples", part.clips, batch)
            steps.append(part.num_steps)
            complexity += [complexities(clip) for clip in part.clips]
        start = clock()
        for _ in self.draw(arm.config, decode=False):
            pass
        arm.seconds = (clock() - start) / self.args.num_samples
        arm.scores = {
            figure.name: figure.value for figure in judging.figures("samples", split="val")
        }
        taken = torch.cat(steps).double()
        arm.mean_steps = taken.mean().item()
        if arm.config.adaptive is not None:
            arm.rank_correlations = {
                name: rank_correlation(taken, torch.tensor([row[name] for row in complexity]))
                for name in complexity[0]
            }


def complexities(clip: Tensor) -> dict[str, float]:
    """Measure a clip `(3, f, h, w)` in [-1, 1]: bytes of a lossless file, share of ink edges."""
    frames = to_uint8(clip).float().mean(0)  # (f, h, w)
    strip = torch.cat(list(frames.round().byte()), dim=1)
    file = io.BytesIO()
    # Eight levels of brightness, so that noise below the eye's threshold counts little.
    Image.fromarray((strip // 32 * 32).numpy()).save(file, format="png", optimize=True)
    ink = frames > 127
    edges = (ink[:, 1:] != ink[:, :-1]).float().mean() + (
        ink[:, :, 1:] != ink[:, :, :-1]
    ).float().mean()
    return {"PNG bytes": float(file.tell()), "ink edges": edges.item()}


def ranks(values: Tensor) -> Tensor:
    """Return ranks; equal values share their mean rank."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    return (ends - (counts - 1) / 2)[inverse].double()


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's coefficient."""
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def table(arms: list[Arm], args: argparse.Namespace) -> str:
    scores = list(arms[0].scores or {})
    head = ["steps", "mean", *scores, "CPU s/sample", "correlation with PNG bytes, ink edges"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for arm in arms:
        values = [
            f"{100 * value:.1f} %" if "accuracy" in name else f"{value:.2f}"
            for name, value in (arm.scores or {}).items()
        ]
        found = arm.rank_correlations or {}
        correlations = ", ".join(f"{value:+.2f}" for value in found.values())
        row = [arm.name, f"{arm.mean_steps:.2f}", *values, f"{arm.seconds:.4f}", correlations]
        lines.append("| " + " | ".join(row) + " |")
    protocol = (
        f"{args.num_samples} held-out conditions, judge and FID[digits-cnn], guidance "
        f"{args.guidance_scale:g}, seed {args.seed}; Spearman's coefficients."
    )
    return "\n".join([*lines, "", protocol, ""])


def plot(arms: list[Arm], file: Path) -> None:
    names = list(arms[0].scores or {})
    figure, panels = plt.subplots(1, len(names), figsize=(4 * len(names), 3.2))
    for panel, name in zip(panels, names, strict=True):
        for kind, marker in (("fixed", "o-"), ("adaptive", "s--")):
            some = [arm for arm in arms if arm.name.startswith(kind)]
            panel.plot(
                [arm.mean_steps for arm in some],
                [(arm.scores or {})[name] for arm in some],
                marker,
                label=kind,
            )
        panel.set_xlabel("mean steps")
        panel.set_title(name)
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


@torch.no_grad()
def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    bench = Bench(args)
    base = RefineConfig(guidance_scale=args.guidance_scale)
    arms = [Arm(f"fixed {n}", replace(base, num_steps=n)) for n in FIXED]
    arms += [Arm(f"adaptive {n}", bench.calibrated(base, n)) for n in BUDGETS]
    for arm in arms:
        bench.measure(arm)
        print(arm.name, f"{arm.mean_steps:.2f}", arm.scores, arm.rank_correlations, flush=True)
    bench.folder.mkdir(parents=True, exist_ok=True)
    text = table(arms, args)
    (bench.folder / "adaptive.md").write_text(text, encoding="utf-8")
    facts = [
        {
            "name": arm.name,
            "mean_steps": arm.mean_steps,
            "seconds": arm.seconds,
            "scores": arm.scores,
            "rank_correlations": arm.rank_correlations,
            "rule": None if arm.config.adaptive is None else vars(arm.config.adaptive),
        }
        for arm in arms
    ]
    (bench.folder / "adaptive.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    plot(arms, bench.folder / "adaptive.png")
    print(text)


if __name__ == "__main__":
    main()
