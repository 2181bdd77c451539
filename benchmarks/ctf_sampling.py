"""Coarse-to-fine prediction against the plain baseline: ratios of one run, random weights.

    python benchmarks/ctf_sampling.py
    python benchmarks/ctf_sampling.py --quick
    python benchmarks/ctf_sampling.py --device cuda --backbone B --fine L --decoder vq-16 --batch 64

One backbone draws 256 positions of 16,384 codes (the baseline), or of 512 clusters, after which a
bidirectional network draws all codes in one pass. Both are guided. Told are the seconds of a
picture, with and without decoding, the parts of coarse-to-fine prediction, and the ratio baseline /
coarse-to-fine: above 1, coarse-to-fine prediction is the faster one.

On a CPU the time is that of the process, so that other programs on the machine count little.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from grn_lightning.models.coarse_split import ClusterSplit
from grn_lightning.models.code_transformer import (
    BackboneConfig,
    CodeTransformer,
    CodeTransformerConfig,
)
from grn_lightning.models.variants import BACKBONES, VQ_TOKENIZERS
from grn_lightning.models.vq_tokenizer import VQTokenizer
from grn_lightning.samplers.coarse_to_fine import DrawConfig, draw_fine, draw_raster

SMALL = BackboneConfig(depth=12, width=384, num_heads=6, dropout=0.0)
"""Small enough for a CPU; the published stages are rows of `BACKBONES`."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backbone", choices=["small", *BACKBONES], default="small")
    parser.add_argument("--fine", choices=["small", *BACKBONES], default="small")
    parser.add_argument("--decoder", choices=VQ_TOKENIZERS, default="vq-digits")
    parser.add_argument("--codes", type=int, default=16384)
    parser.add_argument("--clusters", type=int, default=512)
    parser.add_argument("--grid", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--scale", type=float, default=2.0, help="guidance of the causal network")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a grid of 4 x 4, once")
    args = parser.parse_args()
    if args.quick:
        args.grid, args.batch, args.repeats = 4, 4, 1
    return args


def seconds(action: Callable[[], object], args: argparse.Namespace) -> float:
    """Return the time of a picture on the device, or of this process on a CPU."""
    is_cuda = args.device != "cpu"
    clock = time.perf_counter if is_cuda else time.process_time
    if is_cuda:
        torch.cuda.synchronize()
    start = clock()
    action()
    if is_cuda:
        torch.cuda.synchronize()
    return (clock() - start) / args.batch


def network(
    args: argparse.Namespace, name: str, *, reads: int, predicts: int, is_causal: bool
) -> CodeTransformer:
    """Return a network whose weights all count; a start from zero would make it uniform."""
    backbone = SMALL if name == "small" else replace(BACKBONES[name], dropout=0.0)
    model = CodeTransformer(
        CodeTransformerConfig(
            input_size=reads,
            output_size=predicts,
            is_causal=is_causal,
            grid_size=(args.grid, args.grid),
            **asdict(backbone),
        )
    )
    torch.nn.init.normal_(model.output.weight, std=0.02)
    return model.to(args.device).eval().requires_grad_(False)


class Drawer:
    """The networks and what they are asked."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        codes, clusters = args.codes, args.clusters
        self.args = args
        self.plain = network(args, args.backbone, reads=codes, predicts=codes, is_causal=True)
        self.coarse = network(
            args, args.backbone, reads=clusters, predicts=clusters, is_causal=True
        )
        self.fine = network(args, args.fine, reads=clusters, predicts=codes, is_causal=False)
        self.split = ClusterSplit(torch.arange(codes, device=args.device) % clusters, clusters)
        sizes = replace(VQ_TOKENIZERS[args.decoder], codebook_size=codes)
        self.decoder = VQTokenizer(sizes).to(args.device).eval().requires_grad_(False)
        self.given = {
            "condition": torch.arange(args.batch, device=args.device),
            "null_condition": torch.tensor([1000], device=args.device),
            "sample_index": torch.arange(args.batch, device=args.device),
            "seed": 0,
        }

    def raster(self, model: CodeTransformer) -> torch.Tensor:
        """Draw all positions, one after the other."""
        grid, config = self.args.grid, DrawConfig(guidance_scale=self.args.scale)
        return draw_raster(model, (1, grid, grid), config=config, **self.given).coarse

    def detail(self, coarse: torch.Tensor) -> torch.Tensor:
        """Draw all codes at once."""
        allowed = self.split.allowed(coarse)
        return draw_fine(self.fine, coarse, allowed=allowed, config=DrawConfig(), **self.given)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Make pictures."""
        return self.decoder.detokenize(codes.unsqueeze(2))


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Return the median seconds of a picture, by part."""
    drawer = Drawer(args)
    codes = coarse = torch.zeros(args.batch, 1, args.grid, args.grid, dtype=torch.long)
    codes, coarse = codes.to(args.device), coarse.to(args.device)
    actions = {
        "baseline, positions": lambda: drawer.raster(drawer.plain),
        "coarse-to-fine, positions": lambda: drawer.raster(drawer.coarse),
        "coarse-to-fine, one pass": lambda: drawer.detail(coarse),
        "decoding": lambda: drawer.decode(codes),
    }
    times: dict[str, list[float]] = {name: [] for name in actions}
    if args.device != "cpu":  # kernels are chosen
        for action in actions.values():
            action()
    for _ in range(args.repeats):  # in turns, so that a busy moment hits all
        for name, action in actions.items():
            times[name].append(seconds(action, args))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    times = measure(args)
    for name, value in times.items():
        print(f"{name:<28} {1000 * value:9.2f} ms/picture")
    plain, coarse, fine, decoding = times.values()
    print(f"steps in sequence            {args.grid**2} and {args.grid**2} + 1")
    print(f"positions alone              {plain / coarse:9.3f} x")
    print(f"without decoding             {plain / (coarse + fine):9.3f} x")
    print(f"with decoding                {(plain + decoding) / (coarse + fine + decoding):9.3f} x")


if __name__ == "__main__":
    main()
