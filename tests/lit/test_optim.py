"""Optimizers, parameter groups and the schedule that counts samples."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grn_lightning.functional.orthogonalize import orthogonalize
from grn_lightning.lit.optim import Muon, OptimConfig, configure_optimizers, parameter_groups
from grn_lightning.models.grn_class import GRNClass, GRNClassConfig
from grn_lightning.models.grn_text import GRNText, GRNTextConfig
from grn_lightning.models.text_encoder import OpenClipTextEncoder, TextEncoderConfig
from grn_lightning.models.tokenizer import HBQTokenizer, TokenizerConfig
from tests.tiny_runs import TINY_CLASS, TINY_ENCODER, TINY_TEXT, TINY_TOKENIZER

MODELS = {
    "tokenizer": lambda: HBQTokenizer(TokenizerConfig(**TINY_TOKENIZER)),
    "class": lambda: GRNClass(GRNClassConfig(**TINY_CLASS)),
    "text": lambda: GRNText(GRNTextConfig(**TINY_TEXT)),
    "encoder": lambda: OpenClipTextEncoder(TextEncoderConfig(**TINY_ENCODER)),
}


def gradients(parameters: list[Tensor], num_steps: int) -> Iterator[list[Tensor]]:
    """The same random gradients of different size, for every optimizer that asks."""
    rng = torch.Generator().manual_seed(7)
    for _ in range(num_steps):
        yield [
            10 ** float(torch.randn((), generator=rng))
            * torch.randn(p.shape, generator=rng, dtype=p.dtype)
            for p in parameters
        ]


def run(optimizer: torch.optim.Optimizer, grads: Iterator[list[Tensor]]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in grads:
        for parameter, grad in zip(parameters, step, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()


def build(model: nn.Module, config: OptimConfig, seen: list[int], total: int | None = None) -> Any:
    built = configure_optimizers(model, config, total_samples=total, samples_seen=lambda: seen[0])
    return built["optimizer"], built["lr_scheduler"]["scheduler"]


# --- updates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_groups_without_muon_move_as_torch_s_adamw_moves_them(weight_decay):
    first = [torch.randn(3, 5, dtype=torch.float64), torch.randn(7, dtype=torch.float64)]
    ours, theirs = copy.deepcopy(first), copy.deepcopy(first)
    settings: dict[str, Any] = {"lr": 0.01, "weight_decay": weight_decay}
    run(Muon([{"params": ours, "use_muon": False, **settings}], betas=(0.8, 0.99)),
        gradients(first, 20))  # fmt: skip
    run(torch.optim.AdamW(theirs, betas=(0.8, 0.99), **settings), gradients(first, 20))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (6, 3, 2, 2)])
def test_matrices_move_as_published(shape):
    """Keller Jordan's reference update, written out for one parameter."""
    start = torch.randn(shape, dtype=torch.float64)
    moved = start.clone()
    group = {"params": [moved], "lr": 0.02, "weight_decay": 0.1, "use_muon": True}
    run(Muon([group], momentum=0.9), gradients([start], 4))

    expected, buffer = start.flatten(1), torch.zeros_like(start.flatten(1))
    for (grad,) in gradients([start], 4):
        matrix = grad.flatten(1)
        buffer = 0.9 * buffer + 0.1 * matrix
        update = orthogonalize(0.1 * matrix + 0.9 * buffer)
        ratio = max(1, update.shape[0] / update.shape[1]) ** 0.5
        expected = (1 - 0.02 * 0.1) * expected - 0.02 * ratio * update
    torch.testing.assert_close(moved.flatten(1), expected)


def test_a_parameter_moves_the_same_alone_and_among_others():
    shapes = [(6, 4), (6, 2, 2), (6, 4), (5, 3)]
    start = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    together, alone = copy.deepcopy(start), copy.deepcopy(start)
    settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "use_muon": True}
    run(Muon([{"params": together, **settings}]), gradients(start, 3))
    run(Muon([{"params": [p], **settings} for p in alone]), gradients(start, 3))
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_parameters_without_a_gradient_do_not_move():
    still, moving = torch.ones(2, 3), torch.ones(2, 3)
    moving.grad = torch.randn(2, 3)
    for use_muon in (True, False):
        group = {"params": [still, moving], "lr": 0.1, "weight_decay": 0.5, "use_muon": use_muon}
        Muon([group]).step()
    assert still.equal(torch.ones(2, 3))
    assert not moving.equal(torch.ones(2, 3))


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_restored_optimizer_goes_on_bitwise(name):
    model = MODELS["class"]()
    other = copy.deepcopy(model)
    config, seen = OptimConfig(name=name, weight_decay=0.1), [0]
    straight, _ = build(model, config, seen)
    broken, _ = build(other, config, seen)
    parameters = [p for group in straight.param_groups for p in group["params"]]
    grads = list(gradients(parameters, 4))
    run(straight, iter(grads))
    run(broken, iter(grads[:2]))
    resumed, _ = build(other, config, seen)
    resumed.load_state_dict(copy.deepcopy(broken.state_dict()))
    run(resumed, iter(grads[2:]))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert mine.equal(theirs)


# --- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_trainable_parameter_is_in_exactly_one_group(model, name):
    module = MODELS[model]()
    groups = parameter_groups(module, OptimConfig(name=name, weight_decay=0.1))
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    assert all(group["params"] for group in groups)


@pytest.mark.parametrize("model", MODELS)
def test_gains_and_biases_do_not_decay_and_tables_are_not_orthogonalized(model):
    module = MODELS[model]()
    config = OptimConfig(name="muon", lr=1e-3, muon_lr=0.02, weight_decay=0.1)
    group_of = {id(p): g for g in parameter_groups(module, config) for p in g["params"]}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        group, leaf = group_of[id(parameter)], name.rsplit(".", 1)[-1]
        is_vector = sum(size > 1 for size in parameter.shape) <= 1
        is_table = any(word in name for word in ("embedding", "posemb")) and not is_vector
        expected = (0.0 if is_vector else 0.1, not is_vector and not is_table)
        assert (group["weight_decay"], group["use_muon"]) == expected, name
        assert group["lr"] == (0.02 if group["use_muon"] else 1e-3)
        assert is_vector or "bias" not in leaf


def test_a_shared_weight_is_grouped_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    groups = parameter_groups(model, OptimConfig())
    assert sum(len(group["params"]) for group in groups) == 3


def test_adamw_knows_no_muon_rate():
    optimizer, _ = build(MODELS["class"](), OptimConfig(name="adamw", lr=3e-4), [0])
    assert {group["lr"] for group in optimizer.param_groups} == {3e-4}


# --- schedule -------------------------------------------------------------------------------------


def rates(config: OptimConfig, *, batch_size: int, num_steps: int) -> dict[int, list[float]]:
    """Learning rates with which each step moves, by the samples seen before it."""
    seen = [0]
    model = MODELS["class"]()
    optimizer, schedule = build(model, config, seen, total=160)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = {}
    for grads in gradients(parameters, num_steps):
        found[seen[0]] = [group["lr"] for group in optimizer.param_groups]
        run(optimizer, iter([grads]))
        seen[0] += batch_size
        schedule.step()
    return found


def test_the_curve_is_the_same_for_every_batch_size():
    config = OptimConfig(name="muon", warmup_samples=40, schedule="cosine", decay_fraction=0.5)
    small = rates(config, batch_size=8, num_steps=20)
    large = rates(config, batch_size=16, num_steps=10)
    assert set(large) < set(small)
    assert large == {seen: small[seen] for seen in large}


def test_every_group_warms_up_and_decays_from_its_own_rate():
    config = OptimConfig(
        name="muon", lr=1e-3, muon_lr=0.02, warmup_samples=40, schedule="linear", decay_fraction=0.5
    )
    for seen, found in rates(config, batch_size=8, num_steps=20).items():
        factor = min(1, (seen + 1) / 40) * min(1, (160 - seen) / 80)
        expected = [0.02 * factor, 1e-3 * factor, 1e-3 * factor]
        assert all(math.isclose(a, b) for a, b in zip(found, expected, strict=True)), seen


def test_the_configured_total_beats_the_trainer_s():
    config = OptimConfig(schedule="linear", total_samples=100, lr=1.0)
    optimizer, _ = build(MODELS["class"](), config, [75], total=1000)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25)


def test_a_resumed_run_takes_its_settings_from_its_own_configuration():
    model, seen = MODELS["class"](), [0]
    old, old_schedule = build(model, OptimConfig(name="muon", lr=1e-3, muon_lr=0.02), seen)
    parameters = [p for group in old.param_groups for p in group["params"]]
    run(old, gradients(parameters, 2))
    state = copy.deepcopy((old.state_dict(), old_schedule.state_dict()))

    seen[0] = 20
    config = OptimConfig(
        name="muon", lr=5e-4, muon_lr=0.01, weight_decay=0.2, momentum=0.8, warmup_samples=42
    )
    new, schedule = build(model, config, seen)
    new.load_state_dict(state[0])
    schedule.load_state_dict(state[1])
    found = [(g["lr"], g["weight_decay"], g["momentum"]) for g in new.param_groups]
    assert found == [(0.005, 0.2, 0.8), (2.5e-4, 0.2, 0.8), (2.5e-4, 0.0, 0.8)]
    assert new.state[parameters[0]]["momentum"].equal(old.state[parameters[0]]["momentum"])
    run(new, gradients(parameters, 1))
    seen[0] = 41
    schedule.step()
    assert [group["lr"] for group in new.param_groups] == [0.01, 5e-4, 5e-4]


# --- refusals -------------------------------------------------------------------------------------


def test_a_decay_without_an_end_is_refused():
    with pytest.raises(ValueError, match="'linear' schedule needs `total_samples`, got None"):
        build(MODELS["class"](), OptimConfig(schedule="linear"), [0])


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("name", "sgd", "one of"),
        ("lr", 0.0, "positive"),
        ("muon_lr", -1.0, "positive"),
        ("betas", (0.9, 1.0), r"in \[0, 1\)"),
        ("momentum", 1.0, r"in \[0, 1\)"),
        ("weight_decay", -0.1, "at least 0"),
        ("warmup_samples", -1, "at least 0"),
        ("schedule", "step", "one of"),
        ("total_samples", 0, "positive or null"),
        ("decay_fraction", 0.0, r"in \(0, 1\]"),
    ],
)
def test_what_cannot_be_meant_is_refused(field, value, allowed):
    with pytest.raises(ValueError, match=f"`{field}` must be {allowed}"):
        OptimConfig(**{field: value})


def test_all_issues_are_told_at_once():
    with pytest.raises(ValueError, match="`lr` must be positive.*`decay_fraction` must be in"):
        OptimConfig(lr=-1, decay_fraction=2)
