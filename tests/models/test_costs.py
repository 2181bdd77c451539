"""Closed forms equal what PyTorch counts while the network runs."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from grn_lightning.models.code_transformer import CodeTransformer, CodeTransformerConfig
from grn_lightning.models.costs import (
    Flops,
    class_flops,
    count_flops,
    encoder_flops,
    linear_flops,
    num_parameters,
    text_flops,
    tokenizer_flops,
    transformer_flops,
)
from grn_lightning.models.grn_class import GRNClass, GRNClassConfig
from grn_lightning.models.grn_text import GRNText, GRNTextConfig, TextCondition
from grn_lightning.models.tokenizer import TokenizerConfig
from grn_lightning.models.variants import GRN_CLASS, GRN_TEXT, TOKENIZERS, VQ_TOKENIZERS
from tests.tiny_runs import TINY_CLASS, TINY_TEXT, TINY_TOKENIZER


def _codes(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.long, device="meta")


def _count(network: torch.nn.Module, *inputs: Any) -> Flops:
    return count_flops(lambda: network(*inputs))


@pytest.mark.parametrize("name", ["B-index", "L-bit"])
def test_a_class_network_costs_what_is_counted(name: str) -> None:
    config = GRN_CLASS[name]
    with torch.device("meta"):
        network = GRNClass(config)
        labels, t = torch.zeros(3, dtype=torch.long), torch.zeros(3)
    counted = _count(network, _codes(3, config.num_elements, *config.grid_size), t, labels)
    assert class_flops(config).times(3) == counted


@pytest.mark.parametrize("name", ["2b", "8b", "8b-grouped"])
@pytest.mark.parametrize("is_text_trained", [False, True])
def test_a_text_network_costs_what_is_counted(name: str, is_text_trained: bool) -> None:
    config = GRN_TEXT[name]
    config = replace(config, depth=config.blocks_per_chunk)
    with torch.device("meta"):
        network = GRNText(config)
        embeds = torch.zeros(2, 7, config.text_channels, requires_grad=is_text_trained)
        # All of a batch's tokens are captions: a mask on the meta device cannot be looked into.
        condition = TextCondition(embeds, torch.ones(2, 7, dtype=torch.bool))
        t = torch.zeros(2)
    network._joint_layout = _without_padding(network)  # type: ignore[method-assign]
    codes = _codes(2, config.num_elements, 3, 4, 5)
    counted = _count(network, codes, t, condition)
    assert text_flops(config, 60, 7, is_text_trained=is_text_trained).times(2) == counted

    first = _codes(2, config.num_elements, 1, 4, 5)
    counted = count_flops(lambda: network(codes, t, condition, first_frame=first))
    expected = text_flops(config, 80, 7, num_given=20, is_text_trained=is_text_trained)
    assert expected.times(2) == counted


def _without_padding(network: GRNText) -> Any:
    """The layout of captions that fill their row, of a mask that holds no values."""
    layout = network._joint_layout

    def joint(mask: torch.Tensor, grid: tuple[int, ...]) -> Any:
        found = layout(torch.ones(mask.shape, dtype=torch.bool, device="cpu"), grid)
        return found._replace(rotary=type(found.rotary)(*(x.to("meta") for x in found.rotary)))

    return joint


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"is_causal": False, "input_size": 9},
        {"input_channels": 3, "output_channels": 3, "channel_depth": 2},
        {"num_classes": 0, "text_channels": 24},
    ],
)
def test_a_code_transformer_costs_what_is_counted(changes: dict[str, Any]) -> None:
    config = CodeTransformerConfig(
        **{"input_size": 17, "output_size": 17, "grid_size": (3, 5), "depth": 2, "width": 32,
           "num_heads": 4, **changes}
    )  # fmt: skip
    with torch.device("meta"):
        network = CodeTransformer(config)
        condition: Any = torch.zeros(2, dtype=torch.long)
        if config.text_channels:
            condition = TextCondition(torch.zeros(2, 6, 24), torch.ones(2, 6, dtype=torch.bool))
    counted = _count(network, _codes(2, config.input_channels, 3, 5), condition)
    assert transformer_flops(config, 6 if config.text_channels else 1).times(2) == counted


def test_convolutions_are_counted_as_products() -> None:
    with torch.device("meta"):
        layer, x = torch.nn.Conv3d(3, 8, (1, 3, 3)), torch.zeros(2, 3, 4, 7, 9)
    products = 2 * 8 * 4 * 5 * 7 * 3 * 9  # clips, channels, frames, rows, columns, inputs, taps
    assert count_flops(lambda: layer(x)) == (2 * products, 2 * products)  # no gradient of data


def test_a_tokenizer_costs_what_its_clips_are() -> None:
    config = TokenizerConfig(**TINY_TOKENIZER, use_mid_attention=False)
    size = (5, 16, 16)
    whole, encoder = tokenizer_flops(config, size), encoder_flops(config, size)
    assert 0 < encoder.forward < whole.forward
    assert 1.5 < whole.backward / whole.forward <= 2
    wide = tokenizer_flops(config, (5, 16, 32))
    assert wide.forward == 2 * whole.forward


def test_published_sizes_cost_what_their_parameters_say() -> None:
    """Long rows cost about six operations per parameter and token."""
    config = replace(GRN_TEXT["2b"], attention="full")
    with torch.device("meta"):
        parameters = num_parameters(GRNText(config))
    assert parameters == 2_197_832_448
    length = 1024 + 77 + 1
    attention = 12 * length**2 * config.width * config.depth
    rest = text_flops(config, 1024, 77).total - attention
    assert rest / (6 * parameters * length) == pytest.approx(1.0, abs=0.01)


def test_prefix_attention_saves_the_products_of_text_with_pictures() -> None:
    prefix = GRNTextConfig(**TINY_TEXT)
    full = replace(prefix, attention="full")
    saved = text_flops(full, 12, 5).forward - text_flops(prefix, 12, 5).forward
    assert saved == prefix.depth * 4 * 5 * 13 * prefix.width


def test_data_need_no_gradient() -> None:
    assert linear_flops(3, 4, 5, is_first=True) == (120, 120)
    assert linear_flops(3, 4, 5) == (120, 240)


def test_frozen_parameters_are_told_apart() -> None:
    network = GRNClass(GRNClassConfig(**TINY_CLASS))
    fixed = network.pos_embed.numel()
    assert num_parameters(network) - num_parameters(network, trained_only=True) == fixed


@pytest.mark.parametrize("config", [TOKENIZERS["image-16d"], VQ_TOKENIZERS["vq-16"]])
def test_every_kind_of_tokenizer_can_be_counted(config: Any) -> None:
    encoder = encoder_flops(config, (1, 64, 64))
    assert encoder.forward < tokenizer_flops(config, (1, 64, 64)).forward
