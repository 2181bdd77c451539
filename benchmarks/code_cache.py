"""Training steps from cached codes against encoding on line, in one process: the ratio counts.

    python benchmarks/code_cache.py SHARDS CODES --tokenizer RUN [--num_frames 9] [--image_size 32]

Both arms read the same samples in the same order and hand the same elements to the same generator,
here the smallest that fits. Rounds of both arms alternate, so that a busy machine slows both; the
first one is not counted. Opening a shard of 10,000 samples with and without its stored index is
timed beside it.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from grn_lightning.datasets.manifest import write_shard
from grn_lightning.datasets.tars import index_shard, load_index
from grn_lightning.lit.data import LoaderConfig, ShardData, ShardSource
from grn_lightning.lit.generator import LitGenerator
from grn_lightning.lit.tokenizer import load_tokenizer
from grn_lightning.models.grn_text import GRNTextConfig
from grn_lightning.models.text_encoder import TextEncoderConfig


def batches(path: str, args: argparse.Namespace) -> Any:
    """Endless training batches of a folder, decoded anew each time."""
    media = "video" if args.num_frames > 1 else "image"
    source = ShardSource(
        path=path, batch_size=args.batch_size, media=media, num_frames=args.num_frames, fps=args.fps
    )
    data = ShardData(
        [source], image_size=args.image_size, with_captions=True, loader=LoaderConfig()
    )
    data.setup("fit")
    return iter(data.train_dataloader())


def generator(args: argparse.Namespace) -> LitGenerator:
    """A small text-conditional generator for the codes of the tokenizer."""
    sizes = load_tokenizer(args.tokenizer).config.element_sizes("index")
    text = TextEncoderConfig(context_length=9, width=64, layers=1)
    config = GRNTextConfig(
        num_elements=sizes.num_elements,
        alphabet_size=sizes.alphabet_size,
        text_channels=64,
        depth=args.depth,
        width=args.width,
        num_heads=4,
        mlp_width=4 * args.width,
        blocks_per_chunk=1,
    )
    module = LitGenerator(config, args.tokenizer, text_encoder=text)
    module.configure_model()
    return module


def seconds_per_round(module: LitGenerator, stream: Any, *, steps: int, backward: bool) -> float:
    """Time of some steps: reading, elements and, if asked for, prediction with gradients."""
    start = time.perf_counter()
    for _ in range(steps):
        batch = next(stream)
        x_1 = module._training_elements(batch)
        if backward:
            logits, _ = module._predict(x_1, batch["sample_index"], batch, 0.1)
            logits.float().square().mean().backward()
            module.zero_grad()
    return time.perf_counter() - start


def time_index() -> tuple[float, float]:
    """Seconds to locate 10,000 samples of three members: by headers, by the stored index."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train-000000.tar")
        samples = (
            {"__key__": f"{n:08d}", "codes": bytes(2048), "txt": b"caption", "json": b"{}"}
            for n in range(10_000)
        )
        write_shard(path, samples)
        times = []
        for read in (index_shard, load_index):
            start = time.perf_counter()
            read(path)
            times.append(time.perf_counter() - start)
    return times[0], times[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards")
    parser.add_argument("codes")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--num_frames", type=int, default=9)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--fps", type=float)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)

    module = generator(args)
    streams = {"on line": batches(args.shards, args), "cache": batches(args.codes, args)}
    same = [module._training_elements(next(stream)) for stream in streams.values()]
    differing = (same[0] != same[1]).double().mean()
    print(f"elements that differ between the arms: {differing:.2%} of {same[0].numel()}")
    for what, backward in (("reading and elements", False), ("whole step", True)):
        times: dict[str, list[float]] = {name: [] for name in streams}
        for _ in range(args.rounds + 1):
            for name, stream in streams.items():
                taken = seconds_per_round(module, stream, steps=args.steps, backward=backward)
                times[name].append(taken)
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}
        rates = {name: args.steps * args.batch_size / value for name, value in medians.items()}
        text = ", ".join(f"{name} {rate:.0f} samples/s" for name, rate in rates.items())
        print(f"{what}: {text}; ratio {rates['cache'] / rates['on line']:.1f}")
    by_headers, by_index = time_index()
    print(
        f"opening a shard of 10,000 samples: {by_headers:.2f} s by headers, {by_index:.4f} s by "
        f"its index; ratio {by_headers / by_index:.0f}"
    )


if __name__ == "__main__":
    main()
