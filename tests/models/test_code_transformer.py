"""CodeTransformer: stored outputs, published counts, who sees what, and the cache."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors import safe_open
from torch import nn

from grn_lightning.models.code_transformer import CodeTransformer, CodeTransformerConfig
from grn_lightning.models.grn_text import TextCondition

SIZES = {"depth": 2, "width": 32, "num_heads": 2, "grid_size": (2, 3), "num_classes": 5}
CAUSAL = CodeTransformerConfig(input_size=7, output_size=7, **SIZES)
CHANNELS = CodeTransformerConfig(
    input_channels=3, input_size=4, output_channels=3, output_size=4, **SIZES
)
CHAIN = CodeTransformerConfig(
    input_channels=3, input_size=4, output_channels=3, output_size=4, channel_depth=1, **SIZES
)
FINE = CodeTransformerConfig(
    input_size=7, output_channels=2, output_size=9, is_causal=False, **SIZES
)
TEXT = CodeTransformerConfig(
    input_size=7,
    output_size=7,
    text_channels=6,
    prefix_rotation="identity",
    **SIZES | {"num_classes": 0},
)
CONTROL = dataclasses.replace(FINE, sees_earlier=True)
CAUSAL_ONES = {"one": CAUSAL, "channels": CHANNELS, "chain": CHAIN, "text": TEXT}


def build(config: CodeTransformerConfig) -> CodeTransformer:
    torch.manual_seed(0)
    model = CodeTransformer(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs(config: CodeTransformerConfig, batch_size: int = 3):
    generator = torch.Generator().manual_seed(1)
    shape = (batch_size, config.input_channels, *config.grid_size)
    codes = torch.randint(config.input_size, shape, generator=generator)
    if config.text_channels:
        embeds = torch.randn(batch_size, 4, config.text_channels, generator=generator)
        lengths = torch.tensor([4, 1, 3])[:batch_size]
        return codes, TextCondition(embeds, torch.arange(4) < lengths[:, None])
    return codes, torch.arange(batch_size) % (config.num_classes + 1)


@pytest.mark.parity
def test_published_weights_give_the_stored_logits(golden):
    with safe_open(golden / "llamagen_gpt.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 not a mapping
        meta = json.loads(file.metadata()["meta"])
    side = math.isqrt(meta["block_size"])
    config = CodeTransformerConfig(
        input_size=meta["vocab_size"],
        output_size=meta["vocab_size"],
        grid_size=(side, side),
        depth=meta["n_layer"],
        width=meta["dim"],
        num_heads=meta["n_head"],
        num_classes=meta["num_classes"],
    )
    model = CodeTransformer(config).eval()
    prefix = "weights."
    model.load_state_dict(
        {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    )
    with torch.no_grad():
        logits = model(stored["codes"].view(-1, 1, side, side), stored["class_labels"])
    expected = stored["logits_b_l_k"]
    assert (logits.flatten(1, 3) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "stage_1", "baseline", "stage_2"),
    [
        ("B", 86_509_056, 110_888_448, 98_698_752),
        ("L", 310_405_120, 342_910_976, 326_658_048),
        ("XL", 734_067_200, 774_699_520, 754_383_360),
    ],
)
def test_published_sizes_have_the_published_counts(name, stage_1, baseline, stage_2):
    depth, width, num_heads = {"B": (12, 768, 12), "L": (24, 1024, 16), "XL": (36, 1280, 20)}[name]

    def count(input_size, output_size):
        config = CodeTransformerConfig(
            input_size=input_size,
            output_size=output_size,
            is_causal=input_size == output_size,
            depth=depth,
            width=width,
            num_heads=num_heads,
        )
        with torch.device("meta"):
            return sum(p.numel() for p in CodeTransformer(config).parameters())

    counts = [count(512, 512), count(16384, 16384), count(512, 16384)]
    assert counts == [stage_1, baseline, stage_2]


@pytest.mark.parametrize("config", [*CAUSAL_ONES.values(), FINE], ids=[*CAUSAL_ONES, "fine"])
def test_the_first_loss_is_the_log_of_the_alphabet(config):
    codes, condition = inputs(config)
    torch.manual_seed(0)
    logits = CodeTransformer(config)(codes, condition)
    shape = (3, config.output_channels, *config.grid_size, config.output_size)
    assert logits.shape == shape
    torch.testing.assert_close(logits, torch.zeros(shape))


def influence(model, config):
    """Which positions change the logits of which: `[changed, predicted]`."""
    codes, condition = inputs(config)
    n = config.num_positions
    before = model(codes, condition).flatten(2, 3)
    table = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        changed = codes.flatten(2).clone()
        changed[:, :, i] = (changed[:, :, i] + 1) % config.input_size
        after = model(changed.view_as(codes), condition).flatten(2, 3)
        table[i] = (after != before).any(0).any(0).any(-1)
    return table


@torch.no_grad()
def test_a_causal_network_sees_the_past_and_a_bidirectional_one_everything():
    for config in (CAUSAL, CHANNELS):
        table = influence(build(config), config)
        assert torch.equal(table, torch.ones_like(table).triu(1))
    assert influence(build(FINE), FINE).all()


@torch.no_grad()
def test_a_chain_sees_earlier_channels_of_its_own_position():
    model, (codes, condition) = build(CHAIN), inputs(CHAIN)
    before = model(codes, condition)
    for channel in range(3):
        changed = codes.clone()
        changed[:, channel, -1, -1] = (changed[:, channel, -1, -1] + 1) % 4
        differs = (model(changed, condition) != before).any(-1).flatten(2).any(0)  # (c, n)
        expected = torch.zeros_like(differs)
        expected[channel + 1 :, -1] = True
        assert torch.equal(differs, expected)


@pytest.mark.parametrize("name", CAUSAL_ONES)
@torch.no_grad()
def test_position_by_position_equals_all_at_once(name):
    config = CAUSAL_ONES[name]
    model, (codes, condition) = build(config).double(), inputs(config)
    if config.text_channels:
        condition = TextCondition(condition.embeds.double(), condition.mask)
    whole = model(codes, condition).flatten(2, 3)  # (b, c, n, k)
    flat = codes.flatten(2)
    known, cache = model.prefill(condition)
    for i in range(config.num_positions):
        logits = [model.channel_logits(known, flat[:, :0, i])]
        for j in range(1, config.output_channels if config.channel_depth else 1):
            logits.append(model.channel_logits(known, flat[:, :j, i]))
        torch.testing.assert_close(torch.cat(logits, 1), whole[:, :, i], rtol=1e-5, atol=1e-5)
        known = model.advance(flat[:, :, i], i, cache)


@torch.no_grad()
def test_hidden_text_and_unused_rows_of_a_batch_have_no_influence():
    model, (codes, condition) = build(TEXT), inputs(TEXT)
    together = model(codes, condition)
    noisy = condition.embeds + 5 * ~condition.mask[..., None]
    torch.testing.assert_close(model(codes, TextCondition(noisy, condition.mask)), together)
    for row in range(3):
        length = int(condition.mask[row].sum())
        alone = TextCondition(
            condition.embeds[row : row + 1, :length], condition.mask[row : row + 1, :length]
        )
        # A shorter prefix has fewer slots but the same tokens at the same, unrotated places.
        torch.testing.assert_close(
            model(codes[row : row + 1], alone), together[row : row + 1], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("config", [*CAUSAL_ONES.values(), FINE], ids=[*CAUSAL_ONES, "fine"])
def test_gradients_reach_every_parameter(config):
    model, (codes, condition) = build(config).train(), inputs(config)
    model(codes, condition).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"output_size": 8}, r"must be \(output_channels, output_size\) = \(1, 8\), got \(1, 7\)"),
        ({"width": 36}, "multiple of 8, got 36"),
        ({"num_classes": 0}, "got 0 and 0"),
        ({"text_channels": 3}, "got 5 and 3"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"channel_depth": -1}, "channel_depth must be at least 0"),
        ({"prefix_rotation": "none"}, "prefix_rotation must be 'zero' or 'identity'"),
    ],
)
def test_impossible_sizes_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        CodeTransformerConfig(**{"input_size": 7, "output_size": 7, **SIZES, **options})


def test_maps_of_another_size_and_steps_of_a_bidirectional_network_are_refused():
    codes, condition = inputs(CAUSAL)
    with pytest.raises(ValueError, match=r"codes must be \(b, 1, 2, 3\), got \(3, 1, 3, 2\)"):
        build(CAUSAL)(codes.mT, condition)
    with pytest.raises(ValueError, match="predicts all positions at once"):
        build(FINE).prefill(condition)


@torch.no_grad()
@pytest.mark.parametrize("channel_depth", [0, 1])
def test_the_control_sees_the_whole_coarse_map_and_what_is_earlier(channel_depth: int) -> None:
    config = dataclasses.replace(CONTROL, channel_depth=channel_depth)
    model, (coarse, condition) = build(config), inputs(config)
    fine = torch.randint(9, (3, 2, 2, 3), generator=torch.Generator().manual_seed(2))
    before = model(coarse, condition, fine)
    for i in range(6):
        other = fine.clone()
        other.view(3, 2, 6)[:, -1, i] += 1
        after = model(coarse, condition, other % 9)
        changed = (after != before).flatten(2, 3).any(-1).any(1)  # (b, n)
        assert changed.tolist() == [[j > i for j in range(6)]] * 3
        other = coarse.clone()
        other.view(3, 6)[:, i] += 1
        assert (model(other % 7, condition, fine) != before).flatten(2).any(-1).all()


def test_only_the_control_takes_earlier_codes() -> None:
    coarse, condition = inputs(FINE)
    fine = torch.zeros(3, 2, 2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="`fine` must be given to networks that see earlier codes"):
        build(CONTROL)(coarse, condition)
    with pytest.raises(ValueError, match="`fine` must be given to networks that see earlier codes"):
        build(FINE)(coarse, condition, fine)
    with pytest.raises(ValueError, match="sees_earlier is for bidirectional networks"):
        dataclasses.replace(CAUSAL, sees_earlier=True)
