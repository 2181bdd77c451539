"""The same seed gives the same codes, whatever the batch, the order, the process and the company.

The generators are real networks with random weights, whose kernels round differently for another
number of rows; `rows_per_call` takes that away.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from grn_lightning.models.grn_class import GRNClass, GRNClassConfig
from grn_lightning.models.grn_text import GRNText, GRNTextConfig, TextCondition
from grn_lightning.samplers import (
    AdaptiveSteps,
    Condition,
    RefineConfig,
    refine,
    refine_queue,
    select_rows,
)

NUM_SAMPLES = 64
CONFIG = {
    "num_steps": 6,
    "guidance_scale": 2.0,
    "guidance_schedule": "interval",
    "guidance_interval": (0.3, 1.0),
}
RULES = {  # random networks are almost equally undecided about all samples
    "image, index": AdaptiveSteps(slope=1000.0, offset=-971.0, decision_step=1, min_steps=2),
    "video, bit": AdaptiveSteps(slope=1800.0, offset=-1776.0, decision_step=1, min_steps=2),
}
KINDS = tuple(RULES)


def _scramble(network: torch.nn.Module) -> torch.nn.Module:
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.12)
    return network.eval()


def network_and_conditions(
    kind: str,
) -> tuple[Callable, tuple[int, ...], int, Condition, Condition]:
    """Return generator, shape, alphabet, conditions and null condition."""
    rng = torch.Generator().manual_seed(2)
    if kind == "image, index":
        config = GRNClassConfig(
            num_elements=4,
            alphabet_size=8,
            grid_size=(4, 4),
            depth=2,
            width=48,
            num_heads=4,
            bottleneck=12,
            num_classes=10,
            num_context_tokens=2,
            context_start=1,
        )
        labels = torch.arange(NUM_SAMPLES) % 10
        return _scramble(GRNClass(config)), (4, 4, 4), 8, labels, torch.tensor([10])
    text = GRNTextConfig(
        num_elements=8,
        alphabet_size=2,
        text_channels=12,
        depth=2,
        width=48,
        num_heads=4,
        mlp_width=60,
        blocks_per_chunk=1,
    )
    lengths = torch.randint(2, 7, (NUM_SAMPLES, 1), generator=rng)
    mask = torch.arange(7)[None] < lengths
    captions = TextCondition(torch.randn(NUM_SAMPLES, 7, 12, generator=rng), mask)
    null = TextCondition(torch.zeros(1, 7, 12), torch.arange(7)[None] < 2)
    return _scramble(GRNText(text)), (8, 2, 3, 3), 2, captions, null


def hashes(
    kind: str, order: list[int], batch_size: int, **config: object
) -> tuple[dict[int, str], int]:
    """Draw samples; return what their codes hash to and how many different numbers of steps."""
    network, shape, alphabet, conditions, null = network_and_conditions(kind)
    options = {"null_condition": null, "seed": 5, "alphabet_size": alphabet}
    found, steps = {}, set()
    for start in range(0, len(order), batch_size):
        index = torch.tensor(order[start : start + batch_size])
        result = refine(
            network,
            shape,
            condition=select_rows(conditions, index),
            sample_index=index,
            config=RefineConfig(
                **{**CONFIG, "adaptive": RULES[kind], "rows_per_call": 16, **config}
            ),
            **options,
        )
        for number, codes in zip(index.tolist(), result.codes, strict=True):
            found[number] = hashlib.sha256(codes.numpy().tobytes()).hexdigest()
        steps |= set(result.num_steps.tolist())
    return found, len(steps)


def compiled_draws_the_same() -> bool:
    """Whether a compiled network gives the codes of the eager one."""
    network, shape, alphabet, labels, null = network_and_conditions("image, index")

    def codes(generator: Callable) -> Tensor:
        return refine(
            generator,
            shape,
            condition=labels[:6],
            null_condition=null,
            sample_index=torch.arange(6),
            seed=5,
            alphabet_size=alphabet,
            config=RefineConfig(**CONFIG, rows_per_call=4),
        ).codes

    return torch.equal(
        codes(torch.compile(network, backend="eager", fullgraph=True)), codes(network)
    )


def _in_threads(count: int) -> None:
    torch.set_num_threads(count)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    _in_threads(1)
    yield
    _in_threads(before)


SCRIPT = """
import json, runpy, sys, torch
torch.set_num_threads(1)
module = runpy.run_path(sys.argv[1])
some = list(range(1, module["NUM_SAMPLES"], 4))
found = {kind: module["hashes"](kind, some, 5)[0] for kind in module["KINDS"]}
print(json.dumps([found, module["compiled_draws_the_same"]()]))
"""


@pytest.fixture(scope="module")
def other_process() -> Iterator[subprocess.Popen]:
    """Let another process draw every fourth sample, five at a time.

    It also compiles, where the run-time check of shapes is not in the way.
    """
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@pytest.fixture(scope="module")
def expected(other_process: subprocess.Popen) -> dict[str, dict[int, str]]:
    found = {}
    for kind in KINDS:
        found[kind], num_different = hashes(kind, list(range(NUM_SAMPLES)), NUM_SAMPLES)
        assert num_different >= 3, "samples are to leave the batch at different steps"
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_codes_hash_the_same_in_any_batch_and_order(kind: str, expected: dict) -> None:
    forwards = list(range(NUM_SAMPLES))
    shuffled = torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(3)).tolist()
    assert hashes(kind, shuffled, 32, compact=False)[0] == expected[kind]
    for few, batch_size in ((shuffled[:12], 3), (forwards[::16], 1)):
        some = {number: expected[kind][number] for number in few}
        assert hashes(kind, few, batch_size)[0] == some


@pytest.mark.parametrize("kind", KINDS)
def test_a_queue_gives_the_same_hashes(kind: str, expected: dict) -> None:
    network, shape, alphabet, conditions, null = network_and_conditions(kind)
    samples = refine_queue(
        network,
        shape,
        condition=conditions,
        null_condition=null,
        sample_index=torch.arange(NUM_SAMPLES),
        seed=5,
        alphabet_size=alphabet,
        config=RefineConfig(**CONFIG, adaptive=RULES[kind], rows_per_call=16),
        max_batch=13,
        in_order=False,
    )
    found = {s.row: hashlib.sha256(s.codes.numpy().tobytes()).hexdigest() for s in samples}
    assert found == expected[kind]


@pytest.mark.scale
def test_another_process_gives_the_same_hashes_and_so_does_a_compiled_generator(
    expected: dict, other_process: subprocess.Popen
) -> None:
    output, _ = other_process.communicate(timeout=120)
    by_kind, compiled_draws_the_same = json.loads(output.splitlines()[-1])
    for kind, found in by_kind.items():
        assert len(found) == NUM_SAMPLES // 4
        assert found == {number: expected[kind][int(number)] for number in found}
    assert compiled_draws_the_same
