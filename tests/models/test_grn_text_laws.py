"""GRNText against a plain implementation of the published equations, one sample at a time.

The oracle reads tensors by their published names, computes in float64 and writes every sum that
the layers hide: the mask as a double loop, the rotation token by token, the softmax head by head.
"""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from grn_lightning.models.grn_text import (
    FirstFrameCondition,
    GRNText,
    GRNTextConfig,
    TextCondition,
)
from grn_lightning.samplers import concatenate_conditions, select_rows

PREFIX = GRNTextConfig(
    num_elements=6,
    alphabet_size=2,
    text_channels=10,
    depth=4,
    width=48,
    num_heads=4,
    num_kv_heads=2,
    mlp_width=40,
    blocks_per_chunk=2,
)
FULL = dataclasses.replace(PREFIX, attention="full")
BOTH = pytest.mark.parametrize("config", [PREFIX, FULL], ids=["prefix", "full"])
LENGTHS = (5, 1, 3)

EXTENTS = {1.0: (129, 129), 0.562: (97, 173), 2.0: (183, 91)}  # of the published table


def build(config: GRNTextConfig) -> GRNText:
    """Build a model in which every part matters."""
    model = GRNText(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model


def make_condition(lengths=LENGTHS) -> TextCondition:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return TextCondition(torch.randn(len(lengths), max(lengths), 10), mask)


def make_codes(num_frames: int, h: int, w: int, *, batch_size=3, k=2) -> Tensor:
    return torch.randint(k, (batch_size, 6, num_frames, h, w))


# ------------------------------------------------------------------------------------- the oracle


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def angles_of(position: tuple[float, float, float], head_dim: int) -> list[float]:
    """Angle of every channel pair: a third turns with time, a third with rows, the rest."""
    third = head_dim // 2 // 3
    counts = (third, third, head_dim // 2 - 2 * third)
    return [
        p * 10_000 ** (-i / count)
        for p, count in zip(position, counts, strict=True)
        for i in range(count)
    ]


def rotate(x: Tensor, positions: list[tuple[float, float, float]]) -> Tensor:
    """Turn the pairs of `(l, e)`."""
    rows = []
    for row, position in zip(x, positions, strict=True):
        angles = torch.tensor(angles_of(position, len(row)), dtype=torch.float64)
        a, b = row[0::2], row[1::2]
        cos, sin = angles.cos(), angles.sin()
        rows.append(torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten())
    return torch.stack(rows)


def visual_positions(first: int, num_frames: int, h: int, w: int, template: float) -> list:
    rows, columns = EXTENTS[template]
    return [
        (600 + first + f, round(i * rows / h), round(j * columns / w))
        for f in range(num_frames)
        for i in range(h)
        for j in range(w)
    ]


def one_hot(codes: Tensor, k: int) -> Tensor:
    """Codes `(c, f, h, w)` to rows `(f h w, c k)`, element-major."""
    return torch.eye(k, dtype=torch.float64)[codes.flatten(1).T].flatten(1)


def attention(w: dict, name: str, x: Tensor, positions: list, mask: Tensor, head_dim: int):
    q, k, v = (x @ w[f"{name}.{part}_proj.weight"].T for part in "qkv")
    heads = []
    group = q.shape[1] // k.shape[1]
    for head in range(q.shape[1] // head_dim):
        mine = slice(head * head_dim, (head + 1) * head_dim)
        shared = slice(head // group * head_dim, (head // group + 1) * head_dim)
        one_q = rotate(rms(q[:, mine], w[f"{name}.q_norm.weight"]), positions)
        one_k = rotate(rms(k[:, shared], w[f"{name}.k_norm.weight"]), positions)
        scores = (one_q @ one_k.T / math.sqrt(head_dim)).masked_fill(~mask, -math.inf)
        heads.append(scores.softmax(-1) @ v[:, shared])
    return torch.cat(heads, -1) @ w[f"{name}.o_proj.weight"].T


def time_token(w: dict, t: Tensor) -> Tensor:
    frequencies = 10_000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    sinusoid = torch.cat([(t * frequencies).cos(), (t * frequencies).sin()])
    hidden = silu(w["pt_embedder.mlp.0.weight"] @ sinusoid + w["pt_embedder.mlp.0.bias"])
    return w["pt_embedder.mlp.2.weight"] @ hidden + w["pt_embedder.mlp.2.bias"]


def oracle(
    model: GRNText,
    codes: Tensor,
    t: Tensor,
    text: Tensor,
    first_frame: Tensor | None = None,
    template: float = 1.0,
) -> Tensor:
    """Logits `(c, f, h, w, k)` of one sample; `[noisy, first frame, text, time]` as published."""
    w = {name: x.detach().double() for name, x in model.state_dict().items()}
    config, (c, *grid) = model.config, codes.shape
    num_noisy, offset = math.prod(grid), 0 if first_frame is None else 1
    visual, positions = one_hot(codes, config.alphabet_size), []
    positions += visual_positions(offset, *grid, template)
    if first_frame is not None:
        visual = torch.cat([visual, one_hot(first_frame, config.alphabet_size)])
        positions += visual_positions(0, 1, *grid[1:], template)
    positions += [(j, 0, 0) for j in range(len(text))] + [(512, 0, 0)]
    kinds = "v" * len(visual) + "t" * len(text) + "v"  # the time token sees what visual ones see
    embeds = text.double() @ w["text_proj.weight"].T + w["text_proj.bias"]
    visual = visual @ w["word_embed.weight"].T + w["word_embed.bias"]
    x = torch.cat([visual, embeds, time_token(w, t.double())[None]])
    mask = torch.ones(len(x), len(x), dtype=torch.bool)
    for query in range(len(x)):
        for key in range(len(x)):
            is_hidden = kinds[query] == "t" and kinds[key] == "v"
            mask[query, key] = not (is_hidden and config.attention == "prefix")
    for index in range(config.depth):
        block = f"block_chunks.{index // config.blocks_per_chunk}"
        block += f".module.{index % config.blocks_per_chunk}"
        normed = rms(x, w[f"{block}.input_layernorm.weight"])
        x = x + attention(w, f"{block}.attn", normed, positions, mask, config.head_dim)
        normed = rms(x, w[f"{block}.post_attention_layernorm.weight"])
        gate, up = (normed @ w[f"{block}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + silu(gate) * up @ w[f"{block}.mlp.down_proj.weight"].T
    logits = rms(x[:num_noisy], w["head.norm.weight"]) @ w["head.proj.weight"].T
    logits = (logits + w["head.proj.bias"]).unflatten(-1, (c, -1))
    return logits.transpose(0, 1).unflatten(1, grid)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the scale: norms, embeddings and head are float32 by intention."""
    tolerance = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance)


# --------------------------------------------------------------------------------- first frames


@BOTH
@pytest.mark.parametrize("grid", [(1, 2, 3), (3, 2, 2)], ids=["one more frame", "three more"])
def test_a_clip_behind_a_first_frame_is_the_published_sequence(config, grid):
    model, condition, t = build(config), make_condition(), torch.rand(3)
    codes, first = make_codes(*grid), make_codes(1, *grid[1:])
    template = 0.562 if grid[1:] == (2, 3) else 1.0
    config = dataclasses.replace(config, aspect_template=template)
    model.config = config
    with torch.no_grad():
        logits = model(codes, t, condition, first_frame=first)
    assert logits.shape == (*codes.shape, 2)
    for i, (embeds, mask) in enumerate(zip(*condition, strict=True)):
        assert_near(logits[i], oracle(model, codes[i], t[i], embeds[mask], first[i], template))


@BOTH
def test_a_first_frame_in_front_is_frame_zero_of_a_longer_clip(config):
    model, condition, t = build(config), make_condition(), torch.rand(3)
    clip = make_codes(4, 2, 2)
    with torch.no_grad():
        whole = model(clip, t, condition)
        rest = model(clip[:, :, 1:], t, condition, first_frame=clip[:, :, :1])
        image = model(clip[:, :, 1:], t, condition)
    torch.testing.assert_close(rest, whole[:, :, 1:])
    assert (rest - image).abs().max() > 1e-2


@BOTH
def test_every_code_of_the_first_frame_reaches_every_frame_behind_it(config):
    model, condition, t = build(config), make_condition((4,)), torch.rand(1)
    codes, first = make_codes(2, 2, 2, batch_size=1), make_codes(1, 2, 2, batch_size=1)
    with torch.no_grad():
        base = model(codes, t, condition, first_frame=first)
        for place in [(0, 0, 0, 0, 0), (0, 5, 0, 1, 1)]:
            flipped = first.clone()
            flipped[place] ^= 1
            moved = (model(codes, t, condition, first_frame=flipped) - base).abs()
            assert moved.amax(dim=(0, 1, 3, 4, 5)).min() > 1e-4


def test_one_text_cache_serves_every_first_frame():
    model, condition, t = build(PREFIX), make_condition(), torch.rand(3)
    codes, firsts = make_codes(2, 2, 2), [make_codes(1, 2, 2), make_codes(1, 2, 2)]
    with torch.no_grad():
        cache = model.encode_text(condition)
        for first in [*firsts, None]:
            expected = model(codes, t, condition, first_frame=first)
            torch.testing.assert_close(model(codes, t, cache, first_frame=first), expected)


@BOTH
def test_a_condition_with_a_first_frame_is_cut_and_joined_along_the_batch(config):
    model, condition, t = build(config), make_condition(), torch.rand(3)
    codes, first = make_codes(2, 2, 2), make_codes(1, 2, 2)
    text = model.encode_text(condition) if config is PREFIX else condition
    whole = FirstFrameCondition(text, first)
    rows = torch.tensor([2, 0])
    both = concatenate_conditions(whole, select_rows(whole, rows))
    with torch.no_grad():
        expected = model(codes, t, condition, first_frame=first)
        logits = model(torch.cat([codes, codes[rows]]), torch.cat([t, t[rows]]), both)
    torch.testing.assert_close(logits, torch.cat([expected, expected[rows]]))


@pytest.mark.parametrize("shape", [(3, 6, 2, 2, 2), (3, 6, 1, 2, 3), (1, 6, 1, 2, 2), (3, 6, 2, 2)])
def test_a_first_frame_of_another_size_is_refused(shape):
    model, condition, codes = build(PREFIX), make_condition(), make_codes(2, 2, 2)
    with pytest.raises(ValueError, match=r"first_frame must be \(3, 6, 1, 2, 2\), one latent"):
        model(codes, torch.rand(3), condition, first_frame=torch.zeros(shape, dtype=torch.long))


# ------------------------------------------------------------------------------- without a picture


@BOTH
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_heads": 4, "num_kv_heads": None},
        {"num_heads": 4, "num_kv_heads": 1},
        {"num_heads": 2, "num_kv_heads": 1},  # heads of 24 channels
        {"num_heads": 8, "num_kv_heads": 4},  # heads of 6: one pair for each axis
        {"num_heads": 3, "num_kv_heads": 3, "blocks_per_chunk": 1, "alphabet_size": 8},
    ],
    ids=str,
)
def test_a_batch_of_mixed_prompts_is_the_published_sequence_of_each(config, sizes):
    config = dataclasses.replace(config, aspect_template=2.0, **sizes)
    model, condition, t = build(config), make_condition(), torch.rand(3)
    codes = make_codes(2, 2, 2, k=config.alphabet_size)
    with torch.no_grad():
        logits = model(codes, t, condition)
    for i, (embeds, mask) in enumerate(zip(*condition, strict=True)):
        assert_near(logits[i], oracle(model, codes[i], t[i], embeds[mask], template=2.0))


@BOTH
@pytest.mark.parametrize("has_first_frame", [False, True])
def test_a_batch_of_mixed_prompts_gives_what_each_gives_alone(config, has_first_frame):
    model, condition, t = build(config), make_condition(), torch.rand(3)
    codes, first = make_codes(2, 2, 2), make_codes(1, 2, 2) if has_first_frame else None
    with torch.no_grad():
        logits = model(codes, t, condition, first_frame=first)
        for i, length in enumerate(LENGTHS):
            row = slice(i, i + 1)
            alone = TextCondition(*(part[row, :length] for part in condition))
            one = None if first is None else first[row]
            found = model(codes[row], t[row], alone, first_frame=one)
            torch.testing.assert_close(found, logits[row])
