"""Blocks of networks, computed once or twice; strategies and what they refuse."""

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from grn_lightning.lit.base import StageModule
from grn_lightning.lit.optim import OptimConfig, own_part, whole_tensor
from grn_lightning.lit.parts import OwnPart, blocks_of, checkpoint_blocks, own_parts
from grn_lightning.lit.strategies import (
    FSDP,
    STRATEGIES,
    ZeRO,
    by_name,
    by_number,
    named_strategy,
    refuse_lightnings_own,
    refuse_unfit,
)
from grn_lightning.models.grn_class import GRNClass, GRNClassConfig
from grn_lightning.models.grn_text import GRNText, GRNTextConfig, TextCondition
from tests.tiny_runs import TINY_CLASS, TINY_TEXT, call_grn, tokenizer_config, write_yaml


def text_network() -> tuple[GRNText, tuple[Any, ...]]:
    torch.manual_seed(0)
    network = GRNText(GRNTextConfig(**TINY_TEXT))
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    codes = torch.randint(0, 2, (2, 8, 3, 2, 2))
    return network, (codes, torch.rand(2), TextCondition(torch.randn(2, 4, 16), mask))


def class_network() -> tuple[GRNClass, tuple[Any, ...]]:
    torch.manual_seed(0)
    network = GRNClass(GRNClassConfig(**TINY_CLASS, projection_dropout=0.5))
    for parameter in network.parameters():
        parameter.data.add_(0.1)  # gates are closed at the start, and blocks of no influence
    return network, (torch.randint(0, 2, (2, 8, 2, 2)), torch.rand(2), torch.tensor([3, 10]))


def gradients(network: torch.nn.Module, arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    torch.manual_seed(1)  # of dropout
    network(*arguments).square().mean().backward()
    return [p.grad for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("build", [text_network, class_network])
def test_checkpointed_blocks_have_the_gradients_of_kept_ones(build):
    network, arguments = build()
    expected = gradients(network, arguments)
    again, _ = build()
    saved: dict[bool, int] = {}
    for is_checkpointed in (False, True):
        if is_checkpointed:
            checkpoint_blocks(again)
        again.zero_grad()
        sizes: list[int] = []

        def note(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            torch.manual_seed(1)
            again(*arguments)
        saved[is_checkpointed] = sum(sizes)
        again.zero_grad()
        found = gradients(again, arguments)
        assert len(found) == len(expected)
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    assert saved[True] < 0.6 * saved[False]
    assert again.state_dict().keys() == network.state_dict().keys()


def test_blocks_are_the_innermost_repeated_parts():
    network, _ = text_network()
    assert [type(block).__name__ for block in blocks_of(network)] == ["Block"] * 2
    network, _ = class_network()
    assert len(blocks_of(network)) == TINY_CLASS["depth"]


def test_on_one_process_a_part_is_the_whole():
    network = torch.nn.Linear(2, 3)
    parts = own_parts(network, ("weight",))
    assert list(parts) == ["weight"]
    part = parts["weight"]
    part.weights().zero_()
    assert not network.weight.any()
    whole = torch.ones(3, 2)
    assert part.cut(whole) is whole is own_part(whole, network.weight) is whole_tensor(whole)
    assert OwnPart(network.bias).master().equal(network.bias.detach())


# --- strategies -----------------------------------------------------------------------------------


def test_names_are_ours_or_left_alone():
    assert isinstance(named_strategy("fsdp"), FSDP)
    assert {"deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "fsdp"} <= STRATEGIES.keys()
    for other in ("ddp", "auto", None):
        assert named_strategy(other) is other
    given = FSDP()
    assert named_strategy(given) is given


@pytest.mark.parametrize(
    ("name", "near"), [("deepspeed_zero4", "deepspeed_zero"), ("ddpp", "ddp"), ("fdsp", "fsdp")]
)
def test_names_of_nobody_are_refused_with_ours(name, near):
    sentence = f"one of 'deepspeed_zero1', .*'fsdp_full', .* got '{name}'. Did you mean '{near}"
    with pytest.raises(ValueError, match=sentence):
        named_strategy(name)
    with pytest.raises(ValueError, match=r"got 'my cluster'\.$"):
        named_strategy("my cluster")


class Averaged(StageModule):
    """A stage that trains nothing."""

    def __init__(self) -> None:
        super().__init__(optim=None, seed=0)


OF_LIGHTNING = {
    "fsdp_cpu_offload": "FSDPStrategy",
    "deepspeed_stage_3_offload_nvme": "DeepSpeedStrategy",
}


@pytest.mark.parametrize("name", OF_LIGHTNING)
def test_other_names_of_lightnings_strategies_are_refused(name):
    sentence = f"is '{name}', Lightning's own {OF_LIGHTNING[name]}.*; set it to .*zero3.* fsdp"
    with pytest.raises(ValueError, match=sentence):
        named_strategy(name, accelerator="cpu")


@pytest.mark.parametrize("kind", [DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy])
def test_lightnings_strategies_are_refused_before_the_first_step(kind):
    sentence = f"is Lightning's own {kind.__name__}, which loses the average"
    strategy = kind()
    for refuse in (named_strategy, refuse_lightnings_own):
        with pytest.raises(ValueError, match=sentence):
            refuse(strategy)
    with pytest.raises(ValueError, match=sentence):
        refuse_unfit(strategy, OneOptimizer())
    module = Averaged()
    module._trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=sentence):
        module.configure_callbacks()


def test_ours_and_those_of_copies_are_let_pass():
    for strategy in (FSDP(), ZeRO(2), DDPStrategy(), SingleDeviceStrategy(), "ddp", "auto", None):
        assert named_strategy(strategy) is strategy


def test_a_strategy_of_lightning_ends_a_run_in_a_sentence(digits, tmp_path, capsys):
    kind = {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}
    file = write_yaml(tmp_path, tokenizer_config(tmp_path, digits, trainer={"strategy": kind}))
    for command in ("fit", "check"):
        with pytest.raises(SystemExit) as stop:
            call_grn(command, "-c", file)
        assert stop.value.code == 2
        assert "Lightning's own ModelParallelStrategy" in capsys.readouterr().err


def test_moments_are_numbered_in_the_order_of_the_optimizer():
    network = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW([{"params": [network.bias]}, {"params": [network.weight]}])
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state, names = optimizer.state_dict(), ["bias", "weight"]
    named = by_name(state, names)
    for name, parameter in network.named_parameters():
        assert named["state"][name]["exp_avg"].shape == parameter.shape
    assert [group["params"] for group in named["param_groups"]] == [["bias"], ["weight"]]
    again = by_number(named)
    assert again["param_groups"] == state["param_groups"]
    assert again["state"].keys() == state["state"].keys()


class OneOptimizer(L.LightningModule):
    """Asks for Muon."""

    optim = OptimConfig(name="muon")


def test_what_fsdp_cannot_do_is_refused(digits, tmp_path, capsys):
    module = OneOptimizer()
    refuse_unfit(FSDP(), module)  # it gathers matrices
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="FSDP trains with one optimizer, and OneOptimizer"):
        refuse_unfit(FSDP(), module)
    refuse_unfit(named_strategy("auto"), module)
    module.automatic_optimization, cast = True, FSDP()
    cast.precision_plugin = HalfPrecision("bf16-true")
    with pytest.raises(ValueError, match="FSDP trains float32 weights, got .*bf16-true`; take"):
        refuse_unfit(cast, module)
    file = write_yaml(tmp_path, tokenizer_config(tmp_path, digits, trainer={"strategy": "fsdp"}))
    sentences = {
        "fit": "the tokenizer stage: strategy FSDP takes a single optimizer; set",
        "check": "FSDP trains with one optimizer, and LitTokenizer has one for each player; set",
    }
    for command, sentence in sentences.items():
        with pytest.raises(SystemExit) as stop:
            call_grn(command, "-c", file)
        assert stop.value.code == 2
        assert sentence in capsys.readouterr().err
