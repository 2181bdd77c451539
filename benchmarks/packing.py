"""Training on packs against training on padded batches, and the kernels of packed attention.

    python benchmarks/packing.py
    python benchmarks/packing.py --device cuda --model grn-0b-bit --budget 16384 --dtype bf16

A mixed stream: pictures of two presets and all aspects, clips of up to 2 seconds, captions of 5 to
77 tokens. Every arm trains the same network, forwards and backwards, on the same documents; only
tokens of documents count. "Padded" fills each sample up to the longest of its batch and hides that
by a mask; "sorted" has neighbours in length in one batch, the usual remedy.
Arms take turns, and the median of their rounds is shown; on a CPU it is the time of one thread,
which a busy machine does not lengthen.
"""

import argparse
import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from grn_lightning.datasets import OrderedSource, SampleOrder, SampleRequest, TrainingOrder
from grn_lightning.datasets.packing import PackedOrder
from grn_lightning.functional.rope import Rotary
from grn_lightning.media.resolutions import TEMPLATES, frames_for, latent_size
from grn_lightning.models.grn_text import GRNText, GRNTextConfig
from grn_lightning.models.packed import PackedMaps, PackedText
from grn_lightning.models.variants import GRN_TEXT, get_variant
from grn_lightning.nn.attention import AttentionLayout

SMALL = GRNTextConfig(
    num_elements=64,
    alphabet_size=2,
    text_channels=64,
    depth=4,
    width=256,
    num_heads=4,
    mlp_width=768,
    blocks_per_chunk=2,
)
PRESETS = ("0.06M", "0.25M")


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a document of the stream is."""

    grid: tuple[int, int, int]
    num_words: int

    @property
    def tokens(self) -> int:
        """Of its caption, its map and its time."""
        return self.num_words + torch.Size(self.grid).numel() + 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small", help="'small' or a row of GRN_TEXT")
    parser.add_argument("--attention", default="prefix", choices=("prefix", "full"))
    parser.add_argument("--budget", type=int, default=2048, help="tokens of a pack")
    parser.add_argument("--stride", type=int, default=3, help="shrinks the published grids")
    parser.add_argument("--packs", type=int, default=4, help="packs per round")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    return parser.parse_args()


def sample_at(number: int, stride: int) -> Sample:
    """The sample of a running number: two pictures for each clip."""
    u = np.random.default_rng(number).random(4)
    template = [*TEMPLATES][int(u[0] * len(TEMPLATES))]
    rows, columns = latent_size(PRESETS[int(u[1] < 0.25)], template)
    frames = 1 if number % 3 else 1 + frames_for(0.25 + 1.75 * u[2]) // 4
    grid = (frames, max(1, rows // stride), max(1, columns // stride))
    return Sample(grid, 5 + int(72 * u[3] ** 2))


def make_packs(options: argparse.Namespace) -> list[list[Sample]]:
    """The first packs of the stream."""
    stream = TrainingOrder(
        [OrderedSource(order=SampleOrder([10**6], seed=0, shuffle_shards=0), batch_size=1)]
    )

    def measure(request: SampleRequest) -> int:
        return sample_at(request.number, options.stride).tokens

    order = PackedOrder(stream, measure, token_budget=options.budget, max_left_out=1.0)
    position, packs = order.start(), []
    for _ in range(options.packs):
        requests = order.batch(position).requests
        packs.append([sample_at(request.number, options.stride) for request in requests])
        position = order.advance(position)
    return packs


def make_inputs(samples: list[Sample], config: GRNTextConfig, device: str):
    """Random codes, times and text features of documents."""
    sizes = [torch.Size(sample.grid).numel() for sample in samples]
    words = [sample.num_words for sample in samples]
    codes = torch.randint(config.alphabet_size, (sum(sizes), config.num_elements), device=device)
    text = PackedText(
        torch.randn(sum(words), config.text_channels, device=device),
        torch.cat([torch.arange(n) for n in words]).to(device),
        tuple(words),
    )
    maps = PackedMaps(codes, tuple(s.grid for s in samples), (False,) * len(samples))
    return maps, torch.rand(len(samples), device=device), text


# --- arms -----------------------------------------------------------------------------------------


def run_packed(model: GRNText, samples: list[Sample], inputs, backend: str) -> Tensor:
    model.packed_backend = backend  # type: ignore[assignment]
    return model(*inputs)


def run_padded(model: GRNText, samples: list[Sample], inputs) -> Tensor:
    """The same documents as rows of one batch, filled up to the longest; logits as if packed."""
    maps, t, text = inputs
    visual = model.word_embed(maps.codes.T[None])[0].split(maps.sizes)
    words, times = model.text_proj(text.embeds).split(list(text.lengths)), model.pt_embedder(t)
    rows = [torch.cat(parts) for parts in zip(words, visual, times[:, None], strict=True)]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    is_there = place < lengths[:, None]
    mask = is_there[:, None, :] | torch.eye(len(place), dtype=torch.bool, device=tokens.device)
    if model.config.attention == "prefix":
        is_text = place < torch.tensor(text.lengths, device=tokens.device)[:, None]
        mask = mask & (is_text[:, None, :] | ~is_text[:, :, None])
    layout = AttentionLayout(padded_rotary(model, samples, tokens), mask=mask[:, None])
    x = model._run(tokens, layout)[0]
    is_visual = (place >= torch.tensor(text.lengths, device=x.device)[:, None]) & (
        place < lengths[:, None] - 1
    )
    return model.head(x[is_visual][None])[0].unflatten(-1, (-1, model.config.alphabet_size))


def padded_rotary(model: GRNText, samples: list[Sample], tokens: Tensor) -> Rotary:
    tables = [model._rotary(s.num_words, s.grid, tokens.device) for s in samples]
    pad = torch.nn.utils.rnn.pad_sequence
    return Rotary(*(pad([*parts], batch_first=True) for parts in zip(*tables, strict=True)))


def padded_batches(packs: list[list[Sample]], *, is_sorted: bool) -> list[list[Sample]]:
    """The documents of packs in as many batches of equal number, in their order or sorted."""
    documents = [sample for pack in packs for sample in pack]
    if is_sorted:
        documents = sorted(documents, key=lambda sample: sample.tokens)
    size = -(-len(documents) // len(packs))
    return [documents[i : i + size] for i in range(0, len(documents), size)]


Arm = Callable[[GRNText, list[Sample], tuple], Tensor]


def time_arm(
    model: GRNText, arm: Arm, batches: list[list[Sample]], options: argparse.Namespace
) -> float:
    """Tokens per second, forwards and backwards."""
    prepared = [(batch, make_inputs(batch, model.config, options.device)) for batch in batches]
    dtype = torch.bfloat16 if options.dtype == "bf16" else None
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    synchronize(options.device)
    start = clock()
    for batch, inputs in prepared:
        with torch.autocast(options.device, dtype=dtype, enabled=dtype is not None):
            arm(model, batch, inputs).square().mean().backward()
        model.zero_grad()
    synchronize(options.device)
    seconds = clock() - start
    tokens = sum(sample.tokens for batch in batches for sample in batch)
    return tokens / seconds


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def check_arms(model: GRNText, arms: dict[str, Arm], samples: list[Sample], device: str) -> float:
    """The largest difference of logits between the arms: they do compute the same."""
    inputs = make_inputs(samples, model.config, device)
    with torch.no_grad():
        logits = [arm(model, samples, inputs) for arm in arms.values()]
    return max((one - logits[0]).abs().max().item() for one in logits[1:])


def main() -> None:
    options = parse()
    if options.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    config = SMALL if options.model == "small" else get_variant(GRN_TEXT, options.model)
    config = dataclasses.replace(config, attention=options.attention)
    with torch.device(options.device):
        model = GRNText(config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "left out")  # the few that no pack can hold
        packs = make_packs(options)
    few = packs[: options.packs]
    fill = np.mean([sum(s.tokens for s in pack) / options.budget for pack in few])
    backends = ["documents", "dense"] + ["flex"] * (options.device != "cpu")
    arms: dict[str, Arm] = {
        f"packed, {name}": lambda m, s, i, name=name: run_packed(m, s, i, name) for name in backends
    }
    arms |= {"padded": run_padded, "padded, sorted": run_padded}
    batches = {
        name: few if name.startswith("packed") else padded_batches(few, is_sorted="sorted" in name)
        for name in arms
    }
    print(
        f"{options.model}, {options.attention}, {options.device}, {options.dtype}; budget "
        f"{options.budget}, {np.mean([*map(len, packs)]):.1f} documents of "
        f"{min(s.tokens for p in packs for s in p)} to {max(s.tokens for p in packs for s in p)} "
        f"tokens per pack"
    )
    print(f"largest difference of logits: {check_arms(model, arms, few[0], options.device):.1e}")
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    for name, arm in arms.items():
        time_arm(model, arm, batches[name][:1], options)  # kernels, tables, compilation
    for _ in range(options.rounds):
        for name, arm in arms.items():
            speeds[name].append(time_arm(model, arm, batches[name], options))
    base = statistics.median(speeds["padded"])
    print(f"{'':20}{'fill':>8}{'tokens/s':>12}{'over padded':>14}")
    for name in arms:
        shown = fill if name.startswith("packed") else padded_fill(batches[name])
        speed = statistics.median(speeds[name])
        print(f"{name:20}{shown:8.1%}{speed:12.0f}{speed / base:13.2f}x")


def padded_fill(batches: list[list[Sample]]) -> float:
    """Share of the places of padded batches that hold a token."""
    places = sum(len(batch) * max(s.tokens for s in batch) for batch in batches)
    return sum(s.tokens for batch in batches for s in batch) / places


if __name__ == "__main__":
    main()
