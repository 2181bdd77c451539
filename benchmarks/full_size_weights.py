"""What loading the published sizes costs: random files in the official layout, through every door.

    python benchmarks/full_size_weights.py --folder SCRATCH

Writes random files of the video tokenizer (float32, 2.8 GB) and of the class-conditional B model
(as its trainer does: weights, two averages, optimizer state; 2.6 GB), converts, loads, runs and
exports them, each in a process of its own, and prints the high-water mark of its resident memory
beyond that of the imports, in units of the file (of the weights, where the file holds more). The
files are removed at the end.
"""

import argparse
import math
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

MEGABYTE = 2**20


def peak() -> int:
    """High-water mark of resident memory in bytes; mapped files count where they were read."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def shapes_of(variant: str) -> dict[str, tuple[int, ...]]:
    from grn_lightning.models.sizes import VARIANTS, expected_shapes

    family = "tokenizer" if variant in VARIANTS["tokenizer"] else "class"
    return expected_shapes(family, VARIANTS[family][variant])  # type: ignore[arg-type]


def num_bytes(variant: str) -> int:
    """Bytes of the weights in float32."""
    return 4 * sum(math.prod(shape) for shape in shapes_of(variant).values())


def random_state(variant: str) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape).mul_(0.02) for name, shape in shapes_of(variant).items()}


def write(variant: str, file: Path) -> None:
    state = random_state(variant)
    if variant == "joint-64d":
        torch.save({"ema": state, "epoch": 0}, file)
        return
    named = {f"net.{name}": x for name, x in state.items()}
    copies = {key: {n: x.clone() for n, x in named.items()} for key in ("model", "model_ema2")}
    moments = {
        i: {"step": torch.tensor(1.0), "exp_avg": x.clone(), "exp_avg_sq": x.clone()}
        for i, x in enumerate(named.values())
    }
    torch.save(
        {
            **copies,
            "model_ema1": named,
            "optimizer": {"state": moments, "param_groups": []},
            "epoch": 599,
            "args": argparse.Namespace(method="GRN_ind", hbq_round=4),
        },
        file,
    )


def convert(file: Path, out: Path, *options: str) -> None:
    from grn_lightning.scripts.convert import convert as tool

    to = "official" if "official" in options else "ours"
    tool(file, out=out, to=to)  # type: ignore[arg-type]


def load(path: Path) -> nn.Module:
    import grn_lightning

    loaded = grn_lightning.load(path)
    return getattr(loaded, "generator", loaded)  # type: ignore[return-value]


def touch(path: Path) -> None:
    """Load and read every weight, as a forward pass does."""
    total = sum(float(parameter.sum()) for parameter in load(path).parameters())
    assert total == total


def run(path: Path) -> None:
    """Load, and run once: an image through the tokenizer, one step of the generator."""
    network = load(path)
    with torch.inference_mode():
        if hasattr(network, "tokenize"):
            network.tokenize(torch.zeros(1, 3, 1, 64, 64))
        else:
            codes = torch.zeros(1, 16, 16, 16, dtype=torch.long)
            network(codes, torch.zeros(1), torch.zeros(1, dtype=torch.long))


def fine_tune(path: Path) -> None:
    """Build a stage that starts from the weights: these are trained, so they are copied."""
    from grn_lightning.lit.tokenizer import LitTokenizer

    module = LitTokenizer("joint-64d", init_from=str(path))
    module.configure_model()


def stage(name: str, *args: str) -> None:
    """One stage, in its own process: imports first, so that their memory is not counted."""
    import grn_lightning.scripts.convert  # noqa: F401

    torch.set_num_threads(1)
    before, start = peak(), time.perf_counter()
    tools = {"write": lambda v, f: write(v, Path(f)), "convert": convert}
    tools |= {"load": load, "touch": touch, "run": run, "fine-tune": fine_tune}
    paths = args if name == "write" else tuple(Path(a) if i < 2 else a for i, a in enumerate(args))
    tools[name](*paths)  # type: ignore[operator]
    print(f"{peak() - before} {before} {time.perf_counter() - start:.2f}")


def measure(label: str, unit: int, name: str, *args: object) -> None:
    command = [sys.executable, __file__, "--stage", name, *map(str, args)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    extra, base, seconds = result.stdout.split()[-3:]
    print(
        f"{label:<34} {int(extra) / MEGABYTE:8.0f} MiB  {int(extra) / unit:5.2f} x  "
        f"{float(seconds):6.1f} s   (imports {int(base) / MEGABYTE:.0f} MiB)",
        flush=True,
    )


def main(folder: Path, variants: list[str]) -> None:
    folder.mkdir(parents=True)
    try:
        for variant in variants:
            file, ours = folder / f"{variant}.pth", folder / variant
            weights = num_bytes(variant)
            measure(f"{variant}: write the file", weights, "write", variant, file)
            size = file.stat().st_size
            print(f"{variant}: file {size:,} bytes, of which weights {weights:,}", flush=True)
            measure(f"{variant}: convert", weights, "convert", file, ours)
            for name in ("load", "touch", "run"):
                measure(f"{variant}: {name}", weights, name, ours)
            if variant == "joint-64d":
                measure(f"{variant}: fine-tune (own copy)", weights, "fine-tune", ours)
            back = folder / f"{variant}-back.pth"
            measure(f"{variant}: back to official", weights, "convert", ours, back, "official")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="new folder, 20 GB free")
    parser.add_argument("--variants", nargs="+", default=["joint-64d", "B-index"])
    parser.add_argument("--stage", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage:
        stage(*given.stage)
    elif given.folder is None:
        parser.error("--folder must be given")
    else:
        main(given.folder, given.variants)
