"""GRNClass: laws of the network, and the stored outputs of the published one."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from safetensors import safe_open

from grn_lightning.models.convert import load_official
from grn_lightning.models.grn_class import GRNClass, GRNClassConfig

CONFIG = GRNClassConfig(
    num_elements=6,
    alphabet_size=2,
    grid_size=(2, 3),
    depth=4,
    width=32,
    num_heads=2,
    bottleneck=8,
    num_classes=5,
    num_context_tokens=3,
    context_start=1,
)


def awaken(model: torch.nn.Module) -> torch.nn.Module:
    """Give zero-initialized layers weights, so that every part of the model matters."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs(config: GRNClassConfig = CONFIG, batch_size: int = 3):
    codes = torch.randint(
        config.alphabet_size, (batch_size, config.num_elements, *config.grid_size)
    )
    return codes, torch.rand(batch_size), torch.arange(batch_size) % (config.num_classes + 1)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["class_index", "class_bit"])
def test_published_weights_give_the_stored_logits(golden, name):
    with safe_open(golden / f"{name}.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 not a mapping
        meta = json.loads(file.metadata()["meta"])
    is_bit = meta["target"] == "bit"
    config = GRNClassConfig(
        num_elements=meta["latent_channels"] * (meta["rounds"] if is_bit else 1),
        alphabet_size=2 if is_bit else 2 ** meta["rounds"],
        grid_size=(meta["input_size"], meta["input_size"]),
        depth=meta["depth"],
        width=meta["hidden_size"],
        num_heads=meta["num_heads"],
        bottleneck=meta["bottleneck_dim"],
        num_classes=meta["num_classes"],
        num_context_tokens=meta["in_context_len"],
        context_start=meta["in_context_start"],
    )
    model = GRNClass(config).eval()
    prefix = "weights."
    weights = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    load_official(model, weights)
    with torch.no_grad():
        logits = model(stored["codes"], stored["t"], stored["class_labels"])
    expected = stored["logits_b_k_c_h_w"].movedim(1, -1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("alphabet_size", [2, 16])
def test_a_new_model_knows_nothing_and_loses_ln_k(alphabet_size):
    config = dataclasses.replace(CONFIG, alphabet_size=alphabet_size)
    codes, t, labels = inputs(config)
    logits = GRNClass(config)(codes, t, labels)
    assert logits.shape == (*codes.shape, alphabet_size)
    assert torch.equal(logits, torch.zeros_like(logits))
    loss = torch.nn.functional.cross_entropy(logits.movedim(-1, 1), codes)
    assert loss.item() == pytest.approx(math.log(alphabet_size))


def test_gradients_reach_every_parameter_but_the_position_table():
    model = awaken(GRNClass(CONFIG))
    model(*inputs()).square().sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"pos_embed"}


def test_a_sample_does_not_depend_on_its_batch():
    model = awaken(GRNClass(CONFIG))
    codes, t, labels = inputs()
    with torch.no_grad():
        whole = model(codes, t, labels)
        alone = model(codes[1:2], t[1:2], labels[1:2])
    torch.testing.assert_close(whole[1:2], alone)


def test_time_label_and_every_code_matter():
    model = awaken(GRNClass(CONFIG))
    codes, t, labels = inputs(batch_size=1)
    flipped = codes.clone()
    flipped[0, -1, -1, -1] ^= 1
    with torch.no_grad():
        base = model(codes, t, labels)
        for other in (
            model(codes, 1 - t, labels),
            model(codes, t, model.null_condition(1, "cpu")),
            model(flipped, t, labels),
        ):
            assert (other - base).abs().max() > 1e-3


def test_context_tokens_enter_at_their_block():
    """Blocks in front of it see n tokens, the others n and the context."""
    model = GRNClass(CONFIG)
    lengths = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model(*inputs())
    assert lengths == [6, 9, 9, 9]


def test_only_the_middle_half_of_the_blocks_drops():
    config = dataclasses.replace(CONFIG, depth=9, attention_dropout=0.1, projection_dropout=0.2)
    model = GRNClass(config)
    rates = [
        (block.attn.attention_dropout, block.attn.dropout.p, block.mlp.dropout.p)
        for block in model.blocks
    ]
    assert rates == [(0.0, 0.0, 0.0)] * 2 + [(0.1, 0.2, 0.2)] * 4 + [(0.0, 0.0, 0.0)] * 3


@pytest.mark.parametrize("is_mixed", [True, False])
def test_logits_and_residual_stream_are_float32_in_mixed_and_in_true_bfloat16(is_mixed):
    model, arguments = awaken(GRNClass(CONFIG)), inputs()
    dtypes = set()
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: dtypes.add(out.dtype))
    with torch.no_grad():
        rounded = model if is_mixed else copy.deepcopy(model).bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_mixed):
            logits = rounded(*arguments)
        model.load_state_dict(rounded.state_dict())
        expected = model(*arguments)
    assert logits.dtype == torch.float32
    assert dtypes == {torch.float32}
    # bfloat16 has 8 significant bits; the errors of four blocks with two branches add up.
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.05 * expected.abs().max().item())


def test_a_model_from_the_meta_device_is_initialized_completely():
    with torch.device("meta"):
        model = GRNClass(CONFIG)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    torch.testing.assert_close(model.pos_embed, GRNClass(CONFIG).pos_embed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 36}, r"width must be a multiple of 4 \* num_heads = 8 .* got 36"),
        ({"context_start": 4}, r"context_start must be in \[0, depth\) = \[0, 4\), got 4"),
        ({"alphabet_size": 1}, "alphabet_size must be at least 2, got 1"),
        ({"num_context_tokens": 0}, "num_context_tokens must be at least 1, got 0"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_codes_of_another_tokenizer_are_refused():
    codes, t, labels = inputs()
    with pytest.raises(ValueError, match=r"codes must be \(b, 6, 2, 3\), got \(3, 6, 2, 2\)"):
        GRNClass(CONFIG)(codes[..., :2], t, labels)
