"""Time and peak memory of a training step of the tokenizer: whole clips against chunks.

    python benchmarks/tokenizer_paths.py
    python benchmarks/tokenizer_paths.py --device cuda --config joint-64d --size 256 --frames 17 33

A step is reconstruction, mean absolute difference, and gradients of all parameters. "stream" takes
one latent frame after the other, with gradients through what the layers keep of earlier frames;
"again" is the whole clip with residual blocks computed once more on the way back. The paths take
turns, and figures are ratios to the whole clip's. Gradients are compared first: they are the same.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from streaming import SMALL, frames_of, measured_peak
from torch import Tensor

from grn_lightning.lit.stepping import checkpoint_activations
from grn_lightning.models.tokenizer import HBQTokenizer
from grn_lightning.models.variants import TOKENIZERS, get_variant
from grn_lightning.nn.blocks3d import ResidualBlock


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="small", help="'small' or a published tokenizer")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 5, 9, 17, 33])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def whole(tokenizer: HBQTokenizer, clips: Tensor) -> Tensor:
    return tokenizer(clips).reconstruction


def stream(tokenizer: HBQTokenizer, clips: Tensor) -> Tensor:
    stride = tokenizer.config.temporal_stride
    chunks = (clips[:, :, :1], *clips[:, :, 1:].split(stride, dim=2))
    chunks = tuple(chunk for chunk in chunks if chunk.shape[2])
    z = torch.cat(list(tokenizer.encode_chunks(chunks)), dim=2)
    z_hat, _ = tokenizer.quantizer(z)
    return torch.cat(list(tokenizer.decode_chunks(z_hat.split(1, dim=2))), dim=2)


def train_step(tokenizer: HBQTokenizer, path: Callable, clips: Tensor) -> None:
    tokenizer.zero_grad()
    (path(tokenizer, clips) - clips).abs().mean().backward()
    if clips.is_cuda:
        torch.cuda.synchronize()


def gradient_gap(paths: dict[str, tuple], clips: Tensor) -> float:
    """Largest relative distance of a path's gradient to the whole clip's."""
    found = {}
    for name, (tokenizer, path) in paths.items():
        train_step(tokenizer, path, clips)
        grads = [p.grad.flatten() for p in tokenizer.parameters() if p.grad is not None]
        found[name] = torch.cat(grads)
    scale = found["whole"].norm()
    return max(float((grad - found["whole"]).norm() / scale) for grad in found.values())


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = SMALL if options.config == "small" else get_variant(TOKENIZERS, options.config)
    with torch.device(options.device):
        plain, frugal = HBQTokenizer(config), HBQTokenizer(config)
    with torch.no_grad():  # past taps start at zero: an untrained network would stream too easily
        for parameter in plain.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    frugal.load_state_dict(plain.state_dict())
    checkpoint_activations(frugal, ResidualBlock)
    paths = {"whole": (plain, whole), "stream": (plain, stream), "again": (frugal, whole)}

    print(f"{options.config}, {options.size} x {options.size}, {options.device}, one clip a step")
    print(f"{'':>8}{'whole':>20}{'stream / whole':>20}{'again / whole':>20}")
    print(f"{'frames':>8}" + f"{'s':>10}{'MiB':>10}" + f"{'time':>10}{'memory':>10}" * 2)
    for count in options.frames:
        clips = frames_of(count, options.size, options.device)
        gap = gradient_gap(paths, clips)
        seconds: dict[str, list[float]] = {name: [] for name in paths}
        for _ in range(options.repeats):
            for name, (tokenizer, path) in paths.items():
                start = time.perf_counter()
                train_step(tokenizer, path, clips)
                seconds[name].append(time.perf_counter() - start)
        time_of = {name: median(values) for name, values in seconds.items()}
        mib = {}
        for name, (tokenizer, path) in paths.items():
            tokenizer.zero_grad()
            action = partial(train_step, tokenizer, path, clips)
            mib[name] = measured_peak(action, options.device)
        cells = [f"{time_of['whole']:10.2f}{mib['whole']:10.0f}"]
        for name in ("stream", "again"):
            ratio = time_of[name] / time_of["whole"]
            cells.append(f"{ratio:10.2f}{mib[name] / mib['whole']:10.2f}")
        print(f"{count:>8}" + "".join(cells) + f"    gradients differ by {gap:.0e}", flush=True)


if __name__ == "__main__":
    main()
