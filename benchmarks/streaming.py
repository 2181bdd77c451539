"""Peak memory of the tokenizer over the length of a clip: whole, and chunk by chunk.

    python benchmarks/streaming.py
    python benchmarks/streaming.py --device cuda --config joint-64d --size 256

A figure is what torch has allocated above the loaded tokenizer at the peak. Every point is a
process of its own. Chunks are made when they are asked for and dropped when they are used, as in
decoding to a file; the whole clip is held as one tensor.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import accumulate

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from grn_lightning.models.tokenizer import HBQTokenizer, TokenizerConfig
from grn_lightning.models.variants import TOKENIZERS, get_variant

SMALL = TokenizerConfig(encoder_width=16, decoder_width=16)  # the published structure, narrow
MIB = 2**20


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="small", help="'small' or a published tokenizer")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--frames", type=int, nargs="+", default=[5, 41, 81, 161, 321])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)  # one measurement
    return parser.parse_args()


def measured_peak(action: Callable[[], None], device: str) -> float:
    """MiB that an action has allocated at its peak, through torch's own allocators."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))) / MIB


def frames_of(num_frames: int, size: int, device: str) -> Tensor:
    return torch.rand(1, 3, num_frames, size, size, device=device) * 2 - 1


def stream(tokenizer: HBQTokenizer, direction: str, num_frames: int, size: int, device: str):
    """Encode or decode one latent frame after the other, keeping nothing."""
    num_latents, d = 1 + (num_frames - 1) // 4, tokenizer.config.latent_channels

    def frames() -> Iterator[Tensor]:
        for i in range(num_latents):
            yield frames_of(4 if i else 1, size, device)

    def latents() -> Iterator[Tensor]:
        for _ in range(num_latents):
            yield torch.zeros(1, d, 1, size // 16, size // 16, device=device)

    if direction == "encode":
        chunks = tokenizer.encode_chunks(frames())
    else:
        chunks = tokenizer.decode_chunks(latents())
    for _ in chunks:
        pass


@torch.inference_mode()
def measure(options: argparse.Namespace) -> dict[str, float]:
    direction, mode, count = options.point[0], options.point[1], int(options.point[2])
    torch.set_num_threads(1)
    device, size = options.device, options.size
    config = SMALL if options.config == "small" else get_variant(TOKENIZERS, options.config)
    with torch.device(device):
        tokenizer = HBQTokenizer(config).eval()
    stream(tokenizer, direction, 5, min(64, size), device)  # libraries, kernels, workspaces
    shape = config.latent_shape(count, size, size)
    actions = {
        ("stream", "encode"): lambda: stream(tokenizer, direction, count, size, device),
        ("stream", "decode"): lambda: stream(tokenizer, direction, count, size, device),
        ("whole", "encode"): lambda: tokenizer.encode(frames_of(count, size, device)),
        ("whole", "decode"): lambda: tokenizer.decode(torch.zeros(1, *shape, device=device)),
    }
    start = time.perf_counter()
    mib = measured_peak(actions[mode, direction], device)
    return {"mib": mib, "seconds": time.perf_counter() - start}


def main() -> None:
    options = parse()
    if options.point:
        print(json.dumps(measure(options)))
        return
    print(
        f"{options.config}, {options.size} x {options.size}, {options.device}: MiB above the model"
    )
    print(f"{'frames':>8}" + "".join(f"{name:>18}" for name in ("encode", "", "decode", "")))
    print(f"{'':>8}" + f"{'whole':>18}{'stream':>18}" * 2)
    for count in options.frames:
        cells = []
        for direction in ("encode", "decode"):
            for mode in ("whole", "stream"):
                command = [sys.executable, __file__, *sys.argv[1:]]
                command += ["--point", direction, mode, str(count)]
                result = subprocess.run(command, capture_output=True, text=True)
                cells.append(describe(result))
        print(f"{count:>8}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def describe(result: subprocess.CompletedProcess) -> str:
    """Show a measurement; one that did not fit into memory is a result as well."""
    if result.returncode:
        return "out of memory" if "memory" in result.stderr else f"rc {result.returncode}"
    figures = json.loads(result.stdout.splitlines()[-1])
    return f"{figures['mib']:.0f} ({figures['seconds']:.1f} s)"


if __name__ == "__main__":
    main()
