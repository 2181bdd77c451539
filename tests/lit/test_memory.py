"""The memory of a step that was taken without memory is that of a step that was taken."""

import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from grn_lightning.lit.callbacks import EMA
from grn_lightning.lit.data import ShardData
from grn_lightning.lit.generator import LitGenerator
from grn_lightning.lit.memory import LiveBytes, TracedStep, bytes_of, without_memory
from grn_lightning.lit.rehearsal import BatchSizes, Rehearsal, StepSettings, guess_tokenizer
from grn_lightning.lit.tokenizer import load_tokenizer
from grn_lightning.models.tokenizer import TokenizerConfig
from grn_lightning.models.variants import GRN_CLASS, GRN_TEXT, TOKENIZERS
from tests.tiny_runs import TINY_CLASS, TINY_ENCODER, TINY_TEXT, TINY_TOKENIZER, source

FLOAT = 4


# --- counting -------------------------------------------------------------------------------------


def test_views_are_nothing_and_what_is_dropped_is_given_back():
    with without_memory() as live:
        x = torch.zeros(10, 100)
        assert (live.live, live.peak) == (4000, 4000)
        y = x[:5].transpose(0, 1)
        assert live.live == 4000
        z = y + 1
        assert (live.live, live.peak) == (6000, 6000)
        del x, y
        assert (live.live, live.peak) == (2000, 6000)
        live.restart()
        assert live.peak == 2000
        del z
    assert live.live == 0


def test_real_tensors_are_counted_alike():
    with LiveBytes() as live:
        x = torch.zeros(10, 100)
        x = torch.relu(x + 1)
        assert (live.live, live.peak) == (4000, 12000)  # both operands and the result
        assert bytes_of([x, x[0], x.T]) == 4000


def test_gradients_of_the_step_before_live_until_the_next_loss():
    """By hand: a linear layer without bias, whose step Lightning begins with old gradients."""
    width, batch = 64, 3
    with without_memory() as live:
        network = nn.Linear(width, width, bias=False)
        step = TracedStep(
            module=network,
            frozen=(),
            optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
            loss_of=lambda number: network(torch.zeros(batch, width)).sum(),
            autocast=torch.enable_grad,
        )
        found = step.measure(live)
    weight, row = FLOAT * width * width, FLOAT * width * batch
    assert (found.parameters, found.gradients, found.optimizer) == (weight, weight, 0)
    assert found.states == 2 * weight
    # Input, output and the loss, on top of weights and old gradients.
    assert found.compute == 2 * weight + 2 * row + FLOAT
    assert found.activations == 2 * row + FLOAT


def test_an_average_and_a_state_stay():
    with without_memory() as live:
        network = nn.Linear(8, 8, bias=False)
        step = TracedStep(
            module=network,
            frozen=(nn.Linear(2, 2, bias=False),),
            optimizer=torch.optim.AdamW(network.parameters(), foreach=False),
            loss_of=lambda number: network(torch.zeros(1, 8)).sum(),
            autocast=torch.enable_grad,
            averaged=tuple(network.parameters()),
        )
        found = step.measure(live)
    assert (found.parameters, found.average, found.frozen) == (256, 256, 16)
    assert found.optimizer == 2 * 256 + FLOAT  # and a count
    assert found.update > found.states


# --- a stage --------------------------------------------------------------------------------------


def measured_peak(module: LitGenerator, data: ShardData, **trainer: Any) -> int:
    """Most bytes that PyTorch's allocator has given out while training, as its profiler notes."""
    settings: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
    }
    settings |= {"enable_model_summary": False, "limit_val_batches": 0, "max_steps": 3}
    settings |= {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 1}
    runner = L.Trainer(use_distributed_sampler=False, **settings, **trainer)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        runner.fit(module, data)
    results: Any = profile.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    ("kind", "changes", "optimizer", "settings"),
    [
        ("class", {}, "adamw", StepSettings(has_average=True, clip=1.0)),
        pytest.param(
            *("class", {}, "muon", StepSettings(precision="bf16-mixed", is_checkpointed=True)),
            marks=pytest.mark.scale,
        ),
        ("text", {}, "adamw", StepSettings(precision="bf16-mixed", micro_batches=2)),
        pytest.param(
            *("text", {"attention": "full"}, "muon", StepSettings(has_average=True)),
            marks=pytest.mark.scale,
        ),
    ],
)
def test_steps_with_and_without_contents_need_the_same(
    kind: str, changes: dict[str, Any], optimizer: str, settings: StepSettings
) -> None:
    network = (TINY_CLASS if kind == "class" else TINY_TEXT) | changes
    text = {"text_encoder": TINY_ENCODER} if kind == "text" else {}
    rehearsal = Rehearsal(
        {"generator": network, "optim": {"name": optimizer}, "tokenizer": "unused", **text},
        TokenizerConfig(**TINY_TOKENIZER),
    )
    sizes = BatchSizes(samples=3, size=(1 if kind == "class" else 5, 16, 16))
    planned = rehearsal.measure(sizes, settings)
    found = rehearsal.measure(sizes, settings, for_real=True)
    assert planned.states == found.states
    assert planned.compute == pytest.approx(found.compute, rel=0.001)
    assert planned.update == pytest.approx(found.update, rel=0.001)


@pytest.mark.scale
@pytest.mark.parametrize(
    ("kind", "optimizer", "settings"),
    [
        ("class", "adamw", StepSettings(has_average=True, clip=1.0)),
        ("text", "muon", StepSettings(precision="bf16-mixed", micro_batches=2)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_plan_is_within_a_tenth_of_a_training(
    digits: Path, tokenizer_run: Path, kind: str, optimizer: str, settings: StepSettings
) -> None:
    network = (TINY_CLASS if kind == "class" else TINY_TEXT) | {"width": 128}
    text = {"text_encoder": TINY_ENCODER} if kind == "text" else {}
    arguments: dict[str, Any] = {"generator": network, "optim": {"name": optimizer}, **text}
    media, frames = ("image", 1) if kind == "class" else ("video", 5)

    tokenizer = load_tokenizer(tokenizer_run).config
    sizes = BatchSizes(samples=8, size=(frames, 16, 16))
    rehearsal = Rehearsal(arguments | {"tokenizer": "unused"}, tokenizer)
    planned = rehearsal.measure(sizes, settings).peak

    module = LitGenerator(**arguments, tokenizer=str(tokenizer_run))
    data = ShardData(
        [source(digits, media, 8)],  # type: ignore[list-item]
        image_size=16,
        with_classes=kind == "class",
        with_captions=kind == "text",
        num_classes=10,
    )
    measured = measured_peak(
        module,
        data,
        precision=settings.precision,
        accumulate_grad_batches=settings.micro_batches,
        gradient_clip_val=settings.clip or None,
        callbacks=[EMA()] if settings.has_average else [],
    )
    assert planned == pytest.approx(measured, rel=0.1)


def _rehearsed(settings: StepSettings, **sizes: Any) -> Any:
    network = TINY_TEXT | {"width": 128}
    arguments = {"generator": network, "tokenizer": "none", "text_encoder": TINY_ENCODER}
    rehearsal = Rehearsal(arguments, TokenizerConfig(**TINY_TOKENIZER))
    batch: dict[str, Any] = {
        "samples": 4,
        "size": (5, 64, 64),
        "is_coded": True,
        "text_tokens": 9,
    } | sizes
    return rehearsal.measure(BatchSizes(**batch), settings)


def test_checkpointing_keeps_less_and_larger_batches_more():
    plain = _rehearsed(StepSettings())
    again = _rehearsed(StepSettings(is_checkpointed=True))
    assert again.states == plain.states
    assert again.activations < 0.8 * plain.activations
    double = _rehearsed(StepSettings(), samples=8)
    assert double.states == plain.states
    assert double.activations == pytest.approx(2 * plain.activations, rel=0.1)
    half = _rehearsed(StepSettings(precision="bf16-mixed"))
    assert half.activations < plain.activations


def test_nothing_of_a_rehearsal_takes_memory():
    """The largest published network: 35 GB of weights that nobody has."""
    rehearsal = Rehearsal({"generator": "8b", "tokenizer": "none"})
    with without_memory():
        network = rehearsal._network()
        alive = weakref.ref(network)
        assert sum(p.numel() for p in network.parameters()) == 7_890_859_520
        del network
    assert rehearsal.num_parameters()["generator"] == 7_890_859_520
    assert alive() is None


@pytest.mark.parametrize("table", [GRN_CLASS, GRN_TEXT])
def test_the_tokenizer_of_every_published_generator_is_known(table):
    for name, config in table.items():
        found, tokenizer = guess_tokenizer(config.num_elements, config.alphabet_size)
        bits = config.num_elements * (config.alphabet_size - 1).bit_length()
        assert found in TOKENIZERS, name
        assert tokenizer.latent_channels * tokenizer.num_rounds == bits
