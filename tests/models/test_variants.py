"""Every row of the tables has the published number of parameters and tensors."""

import dataclasses

import pytest
import torch
from torch import nn

from grn_lightning.models.grn_class import GRNClass
from grn_lightning.models.grn_text import GRNText
from grn_lightning.models.tokenizer import HBQTokenizer
from grn_lightning.models.variants import GRN_CLASS, GRN_TEXT, TOKENIZERS, get_variant

# name: parameters, of which trainable, tensors
TOKENIZER_SIZES = {
    "image-16d": (702_687_612, 702_687_612, 196),
    "joint-64d": (705_693_036, 705_693_036, 196),
}
CLASS_SIZES = {
    "B-index": (130_861_056, 130_664_448, 183),
    "L-index": (458_549_472, 458_287_328, 351),
    "H-index": (952_055_104, 951_727_424, 463),
    "G-index": (2_006_572_432, 2_006_146_448, 575),
    "B-bit": (130_746_240, 130_549_632, 183),
    "L-bit": (458_401_888, 458_139_744, 351),
    "H-bit": (951_858_368, 951_530_688, 463),
    "G-bit": (2_006_326_544, 2_005_900_560, 575),
}
TEXT_SIZES = {
    "0b": (18_227_200, 18_227_200, 55),
    "2b": (2_197_832_448, 2_197_832_448, 319),
    "8b": (7_890_859_520, 7_890_859_520, 407),
    "8b-grouped": (8_796_829_184, 8_796_829_184, 407),
}


def sizes_of(model_class: type[nn.Module], config) -> tuple[int, int, int]:
    with torch.device("meta"):
        model = model_class(config)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trainable = sum(numel for numel, is_trainable in sizes if is_trainable)
    return sum(numel for numel, _ in sizes), trainable, len(model.state_dict())


@pytest.mark.parametrize("name", TOKENIZER_SIZES)
def test_tokenizers_have_the_published_size(name):
    assert sizes_of(HBQTokenizer, TOKENIZERS[name]) == TOKENIZER_SIZES[name]


@pytest.mark.parametrize("name", CLASS_SIZES)
def test_class_conditional_generators_have_the_published_size(name):
    assert sizes_of(GRNClass, GRN_CLASS[name]) == CLASS_SIZES[name]


@pytest.mark.parametrize("name", TEXT_SIZES)
def test_text_conditional_generators_have_the_published_size(name):
    assert sizes_of(GRNText, GRN_TEXT[name]) == TEXT_SIZES[name]


@pytest.mark.parametrize(("name", "size"), [("0b", 18_752_000), ("2b", 2_200_192_256)])
def test_text_conditional_generators_for_indices_have_the_published_size(name, size):
    config = dataclasses.replace(GRN_TEXT[name], num_elements=64, alphabet_size=16)
    assert sizes_of(GRNText, config)[0] == size


@pytest.mark.parametrize(
    ("name", "size"),
    [("B", 131_450_880), ("L", 459_335_904), ("H", 953_038_144), ("G", 2_007_850_384)],
)
def test_class_conditional_generators_for_512_pixels_have_the_published_size(name, size):
    config = dataclasses.replace(GRN_CLASS[f"{name}-index"], grid_size=(32, 32))
    assert sizes_of(GRNClass, config)[0] == size


def test_a_tokenizer_of_256_channels_has_the_published_size():
    config = dataclasses.replace(TOKENIZERS["image-16d"], latent_channels=256)
    assert sizes_of(HBQTokenizer, config) == (717_945_132, 717_945_132, 196)


def test_bypassed_attention_keeps_its_tensors():
    """Weights of either kind load into the other; which one is meant is a switch."""
    config = dataclasses.replace(TOKENIZERS["joint-64d"], use_mid_attention=False)
    assert sizes_of(HBQTokenizer, config) == (705_693_036, 705_693_036 - 5_841_024, 196)


def test_the_two_definitions_of_the_largest_differ_in_keys_and_feed_forward():
    one, two = GRN_TEXT["8b"], GRN_TEXT["8b-grouped"]
    assert [config.key_heads * config.head_dim for config in (one, two)] == [4096, 1024]
    differing = dataclasses.replace(two, num_kv_heads=None, mlp_width=one.mlp_width)
    assert differing == one


def test_every_published_row_is_counted():
    """Rows of our own carry the name of their data set."""
    for table, sizes in (
        (TOKENIZERS, TOKENIZER_SIZES),
        (GRN_CLASS, CLASS_SIZES),
        (GRN_TEXT, TEXT_SIZES),
    ):
        assert {name for name in table if not name.startswith("digits")} == set(sizes)


@pytest.mark.parametrize("table", [GRN_CLASS, GRN_TEXT], ids=["class", "text"])
def test_the_digits_generators_fit_the_digits_tokenizer(table):
    tokenizer = TOKENIZERS["digits"]
    for name, config in table.items():
        if name.startswith("digits"):
            bits = tokenizer.latent_channels * tokenizer.num_rounds
            assert (config.num_elements, config.alphabet_size) == (bits, 2)


def test_rows_are_found_by_name_and_unknown_names_list_the_known_ones():
    assert get_variant(GRN_TEXT, "2b") is GRN_TEXT["2b"]
    with pytest.raises(ValueError, match="unknown variant '3b'; known are '0b', '2b', '8b'"):
        get_variant(GRN_TEXT, "3b")
