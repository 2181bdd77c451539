"""GRNText: both attention modes against a dense oracle, padding, the cache, stored outputs."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from grn_lightning.functional.rope import text_rotary, time_token_rotary, visual_rotary
from grn_lightning.models.convert import load_official
from grn_lightning.models.grn_text import GRNText, GRNTextConfig, TextCache, TextCondition
from grn_lightning.nn.attention import AttentionLayout, join_rotary

CONFIG = GRNTextConfig(
    num_elements=6,
    alphabet_size=2,
    text_channels=10,
    depth=4,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    mlp_width=48,
    blocks_per_chunk=2,
)
FULL = dataclasses.replace(CONFIG, attention="full")
IMAGE, VIDEO = (1, 2, 3), (3, 2, 2)


def build(config: GRNTextConfig = CONFIG) -> GRNText:
    """Build a model in which every part matters."""
    model = GRNText(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model


def inputs(grid=VIDEO, lengths=(5, 2, 4), alphabet_size=2):
    batch_size = len(lengths)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    condition = TextCondition(torch.randn(batch_size, 5, 10), mask)
    codes = torch.randint(alphabet_size, (batch_size, 6, *grid))
    return codes, torch.rand(batch_size), condition


@torch.no_grad()
def dense_logits(model: GRNText, codes: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """One sample without padding, `[visual, time, text]`, one dense mask in every block."""
    head_dim, grid = model.config.head_dim, tuple(codes.shape[1:])
    one_hot = torch.nn.functional.one_hot(codes.flatten(1).T, model.config.alphabet_size)
    visual = one_hot.float().flatten(1) @ model.word_embed.weight.T + model.word_embed.bias
    x = torch.cat([visual, model.pt_embedder(t[None]), model.text_proj(text)])[None]
    rotary = join_rotary(
        visual_rotary(*grid, head_dim=head_dim),
        time_token_rotary(head_dim),
        text_rotary(len(text), head_dim),
    )
    num_visual = len(visual) + 1
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    if model.config.attention == "prefix":
        mask[num_visual:, :num_visual] = False
    for chunk in model.block_chunks:
        for block in chunk.module:
            x = block(x, AttentionLayout(rotary, mask=mask))[0]
    logits = model.head(x[0, : len(visual)]).unflatten(-1, (-1, model.config.alphabet_size))
    return logits.transpose(0, 1).unflatten(1, grid)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["text_bit_image", "text_bit_video"])
@pytest.mark.parametrize("prefix", ["", "null_"])
def test_published_weights_give_the_stored_logits(golden, name, prefix):
    with safe_open(golden / f"{name}.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 not a mapping
        meta = json.loads(file.metadata()["meta"])
    config = GRNTextConfig(
        num_elements=meta["latent_channels"] * meta["rounds"],
        alphabet_size=2,
        text_channels=meta["text_channels"],
        depth=meta["depth"],
        width=meta["width"],
        num_heads=meta["heads"],
        num_kv_heads=meta["kv_heads"],
        mlp_width=meta["mlp_hidden"],
        blocks_per_chunk=meta["depth"] // meta["block_chunks"],
        attention=meta["attention"],
        aspect_template=meta["aspect_template"],
    )
    model = GRNText(config).eval()
    start = "weights."
    weights = {k.removeprefix(start): v for k, v in stored.items() if k.startswith(start)}
    load_official(model, weights)
    embeds = stored[f"{prefix}text_embeds"]
    condition = TextCondition(embeds, torch.ones(embeds.shape[:2], dtype=torch.bool))
    with torch.no_grad():
        logits = model(stored["codes"], stored["t"], condition)
    expected = stored[f"{prefix}logits_b_c_f_h_w_k"]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("config", [CONFIG, FULL], ids=["prefix", "full"])
@pytest.mark.parametrize("grid", [IMAGE, VIDEO], ids=["image", "video"])
@pytest.mark.parametrize("alphabet_size", [2, 8], ids=["bit", "index"])
def test_a_padded_batch_gives_what_each_sample_gives_alone_with_a_dense_mask(
    config, grid, alphabet_size
):
    model = build(dataclasses.replace(config, alphabet_size=alphabet_size))
    codes, t, condition = inputs(grid, alphabet_size=alphabet_size)
    with torch.no_grad():
        logits = model(codes, t, condition)
    assert logits.shape == (*codes.shape, alphabet_size)
    for i, (embeds, mask) in enumerate(zip(*condition, strict=True)):
        torch.testing.assert_close(logits[i], dense_logits(model, codes[i], t[i], embeds[mask]))


@pytest.mark.parametrize("config", [CONFIG, FULL], ids=["prefix", "full"])
def test_whatever_stands_behind_the_caption_has_no_influence(config):
    model, (codes, t, condition) = build(config), inputs(lengths=(5, 5, 5))
    more = TextCondition(
        torch.cat([condition.embeds, torch.full((3, 7, 10), torch.nan)], dim=1),
        torch.cat([condition.mask, torch.zeros(3, 7, dtype=torch.bool)], dim=1),
    )
    with torch.no_grad():
        torch.testing.assert_close(model(codes, t, more), model(codes, t, condition))


@pytest.mark.parametrize("config", [CONFIG, FULL], ids=["prefix", "full"])
def test_a_sample_without_any_text_has_finite_logits_and_gradients(config):
    model, (codes, t, condition) = build(config), inputs(lengths=(0, 3, 5))
    logits = model(codes, t, condition)
    logits.square().mean().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("lengths", [(5, 2, 4), (5, 5, 5)])
def test_encoded_text_gives_the_same_logits_and_gradients(lengths):
    model, (codes, t, condition) = build(), inputs(lengths=lengths)
    results = []
    for arguments in (
        (condition,),
        (condition, model.encode_text(condition)),
        (model.encode_text(condition),),
    ):
        logits = model(codes, t, *arguments)
        gradient = torch.autograd.grad(logits.square().mean(), model.text_proj.weight)[0]
        results.append((logits, gradient))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_encoded_text_can_be_concatenated_and_indexed_like_a_condition():
    model, (codes, t, condition) = build(), inputs()
    with torch.no_grad():
        expected = model(codes, t, condition)
        cache = model.encode_text(condition)
        rows = torch.tensor([2, 0])
        picked = TextCache(*(field[rows] for field in cache))
        both = TextCache(*(torch.cat(pair) for pair in zip(cache, picked, strict=True)))
        logits = model(torch.cat([codes, codes[rows]]), torch.cat([t, t[rows]]), both)
    torch.testing.assert_close(logits, torch.cat([expected, expected[rows]]))


def test_full_attention_has_no_text_cache():
    model, (codes, t, condition) = build(FULL), inputs()
    with pytest.raises(ValueError, match="a text cache needs attention='prefix'"):
        model.encode_text(condition)
    with pytest.raises(ValueError, match="a text cache needs attention='prefix'"):
        model(codes, t, build().encode_text(condition))


@pytest.mark.parametrize("config", [CONFIG, FULL], ids=["prefix", "full"])
def test_gradients_reach_every_parameter(config):
    model, arguments = build(config), inputs()
    model(*arguments).square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_time_text_and_every_code_matter():
    model, (codes, t, condition) = build(), inputs(lengths=(5,))
    flipped = codes.clone()
    flipped[0, -1, -1, -1, -1] ^= 1
    other_text = condition._replace(embeds=-condition.embeds)
    with torch.no_grad():
        base = model(codes, t, condition)
        others = [
            model(codes, 1 - t, condition),
            model(flipped, t, condition),
            model(codes, t, other_text),
        ]
    assert min((other - base).abs().max().item() for other in others) > 1e-3


@pytest.mark.parametrize("is_mixed", [True, False])
def test_logits_and_residual_stream_are_float32_in_mixed_and_in_true_bfloat16(is_mixed):
    model, arguments = build(), inputs()
    dtypes = set()
    for chunk in model.block_chunks:
        chunk.register_forward_hook(lambda _, args, out: dtypes.add(out[0].dtype))
    with torch.no_grad():
        rounded = model if is_mixed else copy.deepcopy(model).bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_mixed):
            logits = rounded(*arguments)
            cached = rounded(*arguments[:2], rounded.encode_text(arguments[2]))
        model.load_state_dict(rounded.state_dict())
        expected = model(*arguments)
    assert logits.dtype == torch.float32
    assert dtypes == {torch.float32}
    # bfloat16 has 8 significant bits; the errors of four blocks with two branches add up.
    atol = 0.05 * expected.abs().max().item()
    torch.testing.assert_close(logits, expected, rtol=0, atol=atol)
    torch.testing.assert_close(cached, expected, rtol=0, atol=atol)


def test_weights_start_as_in_the_newest_published_training():
    config = dataclasses.replace(CONFIG, width=192, mlp_width=256, depth=8)
    model = GRNText(config)
    base = math.sqrt(1 / (3 * 192))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm" in name)))
        else:
            is_residual = "o_proj" in name or "down_proj" in name
            expected = base / math.sqrt(16) if is_residual else base
            error = 4 / math.sqrt(2 * parameter.numel())  # four standard errors of a deviation
            assert parameter.std().item() == pytest.approx(expected, rel=error), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 32}, "width / num_heads must be even and at least 6 .* got 32 / 32"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got 3"),
        ({"blocks_per_chunk": 3}, "depth must be a multiple of blocks_per_chunk = 3, got 4"),
        ({"attention": "causal"}, "attention must be 'prefix' or 'full', got 'causal'"),
        ({"aspect_template": 1.8}, "aspect_template must be None or one of .* got 1.8"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_codes_and_text_of_other_models_are_refused():
    model, (codes, t, condition) = build(), inputs()
    with pytest.raises(ValueError, match=r"codes must be \(b, 6, f, h, w\), got \(3, 5, 3, 2, 2\)"):
        model(codes[:, :5], t, condition)
    narrow = condition._replace(embeds=condition.embeds[..., :9])
    with pytest.raises(ValueError, match=r"text features must be \(b, l, 10\), got \(3, 5, 9\)"):
        model(codes, t, narrow)
