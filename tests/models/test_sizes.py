"""Sizes are read off tensors: of every published row, and of networks of any other size."""

import dataclasses

import pytest
import torch
from torch import Tensor

from grn_lightning.models.code_transformer import CodeTransformer, CodeTransformerConfig
from grn_lightning.models.grn_class import GRNClass, GRNClassConfig
from grn_lightning.models.grn_text import GRNText, GRNTextConfig
from grn_lightning.models.sizes import (
    NETWORKS,
    VARIANTS,
    SizeHints,
    UnknownSizes,
    differences,
    expected_shapes,
    find_family,
    guess_sizes,
    nearest_variant,
    split_left_out,
    table_hints,
)
from grn_lightning.models.tokenizer import HBQTokenizer, TokenizerConfig
from grn_lightning.models.vq_tokenizer import VQTokenizer, VQTokenizerConfig

ROWS = [(family, name) for family, table in VARIANTS.items() for name in table]


def stand_ins(family, config) -> dict[str, Tensor]:
    """Tensors of full size that weigh nothing."""
    return {
        name: torch.ones(()).expand(shape)
        for name, shape in expected_shapes(family, config).items()
    }


@pytest.mark.parametrize(("family", "name"), ROWS, ids=[name for _, name in ROWS])
def test_every_row_is_recognized(family, name):
    config = VARIANTS[family][name]
    tensors = stand_ins(family, config)
    hints = SizeHints(grid_size=config.grid_size) if family == "class" else None
    guess = guess_sizes(tensors, hints)
    assert (guess.family, guess.config) == (family, config)
    shapes = {key: tuple(x.shape) for key, x in tensors.items()}
    assert nearest_variant(shapes) == (name, 0)


CLASS = GRNClassConfig(
    num_elements=6,
    alphabet_size=8,
    grid_size=(2, 6),
    depth=5,
    width=48,
    num_heads=3,
    bottleneck=7,
    num_classes=13,
    num_context_tokens=3,
    context_start=2,
)
TEXT = GRNTextConfig(
    num_elements=10,
    alphabet_size=2,
    text_channels=9,
    depth=6,
    width=72,
    num_heads=6,
    num_kv_heads=2,
    mlp_width=40,
    blocks_per_chunk=3,
    attention="full",
    aspect_template=0.562,
)
VQ = VQTokenizerConfig(
    codebook_size=11, codebook_dim=3, width=32, width_multipliers=(1, 2), feature_width=5
)
GPT = CodeTransformerConfig(
    input_size=11,
    output_size=11,
    grid_size=(2, 6),
    depth=3,
    width=48,
    num_heads=3,
    mlp_width=40,
    num_classes=7,
)
TOKENIZER = TokenizerConfig(
    latent_channels=3,
    num_rounds=2,
    encoder_width=4,
    decoder_width=6,
    width_multipliers=(1, 2, 2),
    num_res_blocks=1,
    temporal_downsample=(True, False),
    patch_size=4,
)
OTHERS = [
    (CLASS, {"num_rounds": 3, "target": "index", "context_start": 2}),
    (dataclasses.replace(CLASS, alphabet_size=2, grid_size=(6, 2)), {"context_start": 2}),
    (
        dataclasses.replace(CLASS, num_heads=12, grid_size=(4, 1)),
        {"num_rounds": 3, "context_start": 2},
    ),
    (dataclasses.replace(CLASS, grid_size=(3, 3)), {"num_rounds": 3, "context_start": 2}),
    (dataclasses.replace(CLASS, grid_size=(1, 1)), {"num_rounds": 3, "context_start": 2}),
    (TEXT, {"attention": "full", "aspect_template": 0.562}),
    (
        dataclasses.replace(TEXT, num_kv_heads=1, alphabet_size=4, blocks_per_chunk=1),
        {"attention": "full", "aspect_template": 0.562, "num_rounds": 2, "target": "index"},
    ),
    (
        dataclasses.replace(TEXT, num_kv_heads=None, attention="prefix", aspect_template=None),
        {"attention": "prefix"},
    ),
    (TOKENIZER, {"num_rounds": 2}),
    (
        dataclasses.replace(TOKENIZER, width_multipliers=(1, 1), temporal_downsample=(False,)),
        {"num_rounds": 2},
    ),
    (dataclasses.replace(TOKENIZER, num_res_blocks=3, patch_size=1), {"num_rounds": 2}),
    (VQ, {}),
    (dataclasses.replace(VQ, width_multipliers=(1, 1, 3), num_res_blocks=1), {}),
    (GPT, {"num_heads": 3, "grid_size": (2, 6)}),
    (dataclasses.replace(GPT, mlp_width=None), {"num_heads": 3, "grid_size": (2, 6)}),
]


@pytest.mark.parametrize(("config", "hints"), OTHERS)
def test_any_other_size_is_read_off(config, hints):
    (family,) = (
        name for name, table in VARIANTS.items() if type(config) in map(type, table.values())
    )
    model = NETWORKS[family](config)
    for parameter in model.parameters():
        if not bool(parameter.any()):
            torch.nn.init.ones_(parameter)
    guess = guess_sizes(model.state_dict(), SizeHints(**hints))
    assert guess.config == config
    assert guess.assumed.keys().isdisjoint(hints)


def test_attention_that_was_never_trained_is_bypassed():
    tensors = HBQTokenizer(TOKENIZER).state_dict()
    guess = guess_sizes(tensors, SizeHints(num_rounds=2))
    assert guess.config.use_mid_attention is False
    assert guess.assumed == {"use_mid_attention": False}
    told = SizeHints(num_rounds=2, use_mid_attention=True)
    assert guess_sizes(tensors, told).config == TOKENIZER


def test_what_is_assumed_is_said():
    tensors = GRNClass(CLASS).state_dict()  # 48 one-hot channels: 3 codes of 16, or 24 bits
    guess = guess_sizes(tensors)
    assert guess.assumed == {"target": "index", "num_rounds": 4, "context_start": 1}
    assert (guess.config.num_elements, guess.config.alphabet_size) == (3, 16)
    bits = guess_sizes(tensors, SizeHints(target="bit"))
    assert (bits.config.num_elements, bits.config.alphabet_size) == (24, 2)
    text = guess_sizes(GRNText(TEXT).state_dict())
    assert text.assumed == {"target": "bit", "attention": "prefix"}


def test_a_table_of_rotations_tells_heads_and_grid_and_may_be_left_out():
    state = CodeTransformer(dataclasses.replace(GPT, grid_size=(4, 4))).state_dict()
    assert guess_sizes(state).assumed == {"num_heads": 4, "grid_size": (16, 16)}
    extras = {
        "freqs_cis": torch.zeros(1 + 16, 8, 2),  # a class token and positions, half a head, cos sin
        "causal_mask": torch.ones(2, 17, 17),
        "layers.2.attention.kv_cache.k_cache": torch.zeros(2, 3, 17, 16),
    }
    assert table_hints(state) == SizeHints()
    assert table_hints(state | extras) == SizeHints(num_heads=3, grid_size=(4, 4))
    kept, left_out = split_left_out(state | extras | {"freqs": torch.zeros(1)})
    assert left_out == tuple(extras)
    assert kept.keys() == state.keys() | {"freqs"}  # what nobody knows stays, and is refused later
    vq = VQTokenizer(VQ).state_dict()
    used = {"quantize.codebook_used": torch.zeros(65536)}
    assert split_left_out(vq | used | extras) == (vq | extras, ("quantize.codebook_used",))


def test_impossible_sizes_are_refused():
    tensors = GRNClass(CLASS).state_dict()
    with pytest.raises(UnknownSizes, match="a one-hot vector of 48 cannot be made of units of 32"):
        guess_sizes(tensors, SizeHints(num_rounds=5, target="index"))
    with pytest.raises(
        ValueError, match=r"context_start must be in \[0, depth\) = \[0, 5\), got 7"
    ):
        guess_sizes(tensors, SizeHints(context_start=7))
    for num_rounds in (0, 17):
        with pytest.raises(ValueError, match=rf"num_rounds must be in 1..16, got {num_rounds}"):
            SizeHints(num_rounds=num_rounds)
    torch.nn.init.ones_(tensors["pos_embed"])
    with pytest.raises(ValueError, match="12 positions and is no table.*give `grid_size`"):
        guess_sizes(tensors)
    del tensors["blocks.0.attn.q_norm.weight"]
    with pytest.raises(UnknownSizes, match="no tensor 'blocks.0.attn.q_norm.weight'"):
        guess_sizes(tensors, SizeHints(grid_size=(2, 6)))
    with pytest.raises(UnknownSizes, match="not those of a published"):
        find_family({"conv.weight": 0, "blocks.0.norm1.weight": 0, "bias": 0})


def test_differences_are_told_by_name_and_shape():
    found = {"a": (1, 2), "b": (3,), "d": (5,)}
    wanted = {"a": (1, 2), "b": (4,), "c": ()}
    rows = [" ".join(row.split()) for row in differences(found, wanted)]
    assert rows == [
        "missing c ()",
        "unexpected d (5)",
        "other shape b (3) in the file, (4) in the model",
    ]


def test_a_file_of_nothing_known_is_near_nothing():
    assert nearest_variant({"layer.weight": (2, 2)}) is None
    near = nearest_variant({"text_proj.weight": (2304, 4096), "head.norm.weight": (2304,)})
    assert near is not None
    assert near[0] in ("0b", "digits-t2v")  # the fewest tensors are missing
