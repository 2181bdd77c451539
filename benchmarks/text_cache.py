"""How much faster is a forward whose captions were prepared once than one on features as encoded?

    python benchmarks/text_cache.py

Variant "0b" on 3 x 12 x 16 positions with random weights; two captions of 40 and 12 tokens, padded
to 512 as an encoder returns them. One thread; the best of several rounds that take turns.
"""

import argparse
import dataclasses
import time

import torch

from grn_lightning.models.grn_text import GRNText, TextCondition
from grn_lightning.models.variants import GRN_TEXT
from grn_lightning.pipelines import prepare_text


@torch.no_grad()
def compare(attention: str, rounds: int) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(GRN_TEXT["0b"], attention=attention, text_channels=64)
    model = GRNText(config).eval()
    mask = torch.arange(512)[None] < torch.tensor([[40], [12]])
    encoded = TextCondition(torch.randn(2, 512, 64), mask)
    codes, t = torch.randint(2, (2, 256, 3, 12, 16)), torch.rand(2)
    [prepared] = prepare_text(model, [encoded])
    best = {"encoded": float("inf"), "prepared": float("inf")}
    for _ in range(rounds):
        for name, condition in (("encoded", encoded), ("prepared", prepared)):
            start = time.perf_counter()
            model(codes, t, condition)
            best[name] = min(best[name], time.perf_counter() - start)
    error = (model(codes, t, encoded) - model(codes, t, prepared)).abs().max()
    ratio = best["encoded"] / best["prepared"]
    print(f"{attention:<7} prepared {ratio:.2f}x as fast; largest difference of logits {error:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for attention in ("prefix", "full"):
        compare(attention, rounds)


if __name__ == "__main__":
    main()
