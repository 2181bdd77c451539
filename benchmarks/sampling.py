"""What adaptive steps, a queue and lean forwards save: ratios of one run, random weights.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --quick
    python benchmarks/sampling.py --device cuda --width 768 --heads 12 --depth 12

Four questions:

1. a batch with adaptive steps, mean 25, against all 50 steps for everybody;
2. how full a queue keeps the batch;
3. this sampler against a straightforward program of the published loop: two forwards at every step,
   attention with explicit scores in float32, softmax and `torch.multinomial`, without adaptivity;
4. what `rows_per_call`, which makes samples independent of their batch bit for bit, costs.

On a CPU the time is that of the process, so that other programs on the machine count little.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

from grn_lightning.models.grn_class import GRNClass, GRNClassConfig
from grn_lightning.models.grn_text import GRNText, GRNTextConfig, TextCondition
from grn_lightning.nn import attention
from grn_lightning.samplers import (
    Condition,
    RefineConfig,
    StepBudget,
    fit_steps,
    get_preset,
    refine,
    refine_queue,
    until_decision,
)
from grn_lightning.samplers.calibration import steps_of

PARTS = ("class", "text", "queue", "loop", "calls")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--loop_batch", type=int, default=16, help="samples of question 3")
    parser.add_argument("--loop_steps", type=int, default=50, help="steps of question 3")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="some of the questions")
    parser.add_argument("--quick", action="store_true", help="fewer samples, narrower networks")
    return parser.parse_args()


def seconds(action: Callable[[], object], device: str) -> float:
    """Return the time of the device for an action, or of this process on a CPU."""
    clock = time.process_time
    if device != "cpu":
        clock = time.perf_counter
        torch.cuda.synchronize()
    start = clock()
    action()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def scrambled(network: torch.nn.Module, device: str) -> torch.nn.Module:
    """Give every weight a value, so that nothing is zero and entropies differ."""
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and name != "pos_embed":
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return network.to(device).eval().requires_grad_(False)


class Drawer:
    """A network with what is asked of it."""

    def __init__(self, args: argparse.Namespace, kind: str, grid: tuple[int, ...]):
        self.device = args.device
        sizes = {"depth": args.depth, "width": args.width, "num_heads": args.heads}
        self.shape: tuple[int, ...]
        if kind == "class":  # the published geometry where the grid is 16 x 16
            config = GRNClassConfig(
                num_elements=16,
                alphabet_size=16,
                grid_size=grid,
                bottleneck=64,
                num_context_tokens=min(32, grid[0] * grid[1] // 4),
                context_start=args.depth // 3,
                **sizes,
            )
            self.network = scrambled(GRNClass(config), args.device)
            self.shape, self.alphabet = (16, *grid), 16
        else:
            config = GRNTextConfig(
                num_elements=64,
                alphabet_size=2,
                text_channels=64,
                mlp_width=8 * args.width // 3,
                blocks_per_chunk=1,
                **sizes,
            )
            self.network = scrambled(GRNText(config), args.device)
            self.shape, self.alphabet = (64, *grid), 2
        self.is_text = kind == "text"

    def condition(self, count: int) -> Condition:
        if not self.is_text:
            return torch.arange(count, device=self.device) % 1000
        embeds = torch.randn(count, 16, 64, generator=torch.Generator().manual_seed(1))
        mask = torch.arange(16)[None] < 4 + torch.arange(count)[:, None] % 12
        return self.network.encode_text(TextCondition(embeds.to(self.device), mask.to(self.device)))

    def options(self, count: int) -> dict:
        null = torch.tensor([1000], device=self.device)
        if self.is_text:
            nothing = torch.zeros(1, 16, 64, device=self.device)
            null = self.network.encode_text(TextCondition(nothing, nothing[..., 0] == 0))
        return {
            "shape": self.shape,
            "condition": self.condition(count),
            "null_condition": null,
            "sample_index": torch.arange(count, device=self.device),
            "seed": 0,
            "alphabet_size": self.alphabet,
        }

    def calibrated(self, config: RefineConfig, count: int) -> RefineConfig:
        """Return the same walk with a rule that gives 25 steps on average."""
        budget = StepBudget(mean_steps=25.0, min_steps=10)
        config_ = until_decision(config, budget.decision_step)
        entropies = refine(self.network, config=config_, **self.options(count)).entropy[5]
        rule = fit_steps(entropies, budget, max_steps=config.num_steps)
        mean = steps_of(rule, entropies, config.num_steps).double().mean()
        print(f"    calibrated: {mean:.2f} steps, entropies {entropies.min():.4f}"
              f" to {entropies.max():.4f}")  # fmt: skip
        return replace(config, adaptive=rule)


def time_saved(title: str, drawer: Drawer, preset: str, batch: int) -> None:
    """Question 1."""
    config = get_preset(preset)
    print(f"{title}, batch {batch}, {config.num_steps} steps", flush=True)
    adaptive = drawer.calibrated(config, batch)
    options = drawer.options(batch)
    fixed_s = seconds(lambda: refine(drawer.network, config=config, **options), drawer.device)
    results = []
    adaptive_s = seconds(
        lambda: results.append(refine(drawer.network, config=adaptive, **options)), drawer.device
    )
    mean = results[0].num_steps.double().mean()
    print(f"    fixed     {batch / fixed_s:8.2f} samples/s")
    print(f"    adaptive  {batch / adaptive_s:8.2f} samples/s, mean {mean:.2f} steps")
    print(f"    ratio     {fixed_s / adaptive_s:8.2f} (wanted: 1.7)", flush=True)


def occupancy(drawer: Drawer, num_requests: int, batch: int) -> None:
    """Question 2."""
    print(f"queue of {num_requests} requests, {batch} places", flush=True)
    config = drawer.calibrated(RefineConfig(), min(num_requests, 128))
    sizes: list[int] = []
    options = drawer.options(num_requests)
    queue = refine_queue(
        drawer.network,
        config=config,
        max_batch=batch,
        in_order=False,
        observer=lambda info: sizes.append(len(info.sample_index)),
        **options,
    )
    steps = [sample.num_steps for sample in queue]
    alone = 0  # what batches cost that wait for their slowest sample
    for start in range(0, num_requests, batch):
        alone += max(steps[start : start + batch])
    print(f"    mean {sum(steps) / len(steps):.2f} steps; calls {len(sizes)}, batches one after the"
          f" other would take about {alone}")  # fmt: skip
    print(f"    occupancy {sum(sizes) / (batch * len(sizes)):.1%} (wanted: 90%)", flush=True)


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, dropout: float = 0.0
) -> Tensor:
    """Scores, softmax and sum written out in float32, with a bias of zeros, as published."""
    bias = torch.zeros(q.shape[0], 1, q.shape[2], k.shape[2], device=q.device)
    scores = q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5 + bias
    return torch.softmax(scores, dim=-1).to(v.dtype) @ v


def published_loop(drawer: Drawer, config: RefineConfig, batch: int) -> Tensor:
    """The published class-conditional loop, step by step."""
    labels, k = drawer.condition(batch), drawer.alphabet
    null = torch.full_like(labels, 1000)
    r = torch.randint(0, k, (batch, *drawer.shape), device=drawer.device)
    z, low, high = r, *config.guidance_interval
    for i in range(config.num_steps):
        t, t_next = i / config.num_steps, (i + 1) / config.num_steps
        time_ = torch.full((batch,), t, device=drawer.device)
        conditional = drawer.network(z, time_, labels)
        unconditional = drawer.network(z, time_, null)
        scale = config.guidance_scale if t < high and (low == 0 or t > low) else 1.0
        logits = unconditional + scale * (conditional - unconditional)
        p = torch.softmax(logits / config.temperature, dim=-1)
        x_hat = torch.multinomial(p.reshape(-1, k), 1).view(z.shape)
        z = torch.where(torch.rand(z.shape, device=drawer.device) < t_next, x_hat, r)
    return z


@torch.no_grad()
def against_the_published_loop(drawer: Drawer, batch: int, num_steps: int) -> None:
    """Question 3."""
    config = replace(get_preset("c2i-b"), num_steps=num_steps)
    # On a CPU few rows at a time stay in the cache; a GPU wants many.
    lean = replace(config, rows_per_call=8 if drawer.device == "cpu" else None)
    print(f"published class-conditional settings, batch {batch}", flush=True)
    options = drawer.options(batch)
    refine(drawer.network, config=RefineConfig(num_steps=2), **options)  # warm up
    ours = seconds(lambda: refine(drawer.network, config=lean, **options), drawer.device)
    with mock.patch.object(attention, "attend", explicit_attention):
        loop = seconds(lambda: published_loop(drawer, config, batch), drawer.device)
    print(f"    published loop {batch / loop:8.3f} samples/s")
    print(f"    this sampler   {batch / ours:8.3f} samples/s")
    print(f"    ratio          {loop / ours:8.2f} (wanted: 2.5; 100 forwards against 77 give 1.30)")


def cost_of_equal_calls(drawer: Drawer, batch: int) -> None:
    """Question 4."""
    print(f"rows_per_call, {batch} samples, 10 steps", flush=True)
    options = drawer.options(batch)
    base = None
    for rows in (None, 64, 16, 4, 1):
        config = RefineConfig(num_steps=10, guidance_scale=2.0, rows_per_call=rows)

        def action(config: RefineConfig = config) -> object:
            return refine(drawer.network, config=config, **options)

        action()
        took = seconds(action, drawer.device)
        base = base or took
        print(f"    {rows or 'any':>4}  {took / base:6.2f} times as long", flush=True)


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    if args.quick:
        args.width, args.depth, args.heads = 32, 2, 4
        args.batch, args.loop_batch, args.requests = 16, 2, 64
    small = Drawer(args, "class", (8, 8))
    parts = {
        "class": lambda: time_saved("class-conditional, 8 x 8", small, "c2i-b", args.batch),
        "text": lambda: time_saved(
            "text-conditional, 2 x 4 x 4", Drawer(args, "text", (2, 4, 4)), "t2v", args.batch
        ),
        "queue": lambda: occupancy(Drawer(args, "class", (4, 4)), args.requests, args.batch),
        "loop": lambda: against_the_published_loop(
            Drawer(args, "class", (16, 16)), args.loop_batch, args.loop_steps
        ),
        "calls": lambda: cost_of_equal_calls(small, args.batch),
    }
    for name in args.parts or parts:
        parts[name]()


if __name__ == "__main__":
    main()
