"""Whether networks fit one another: a generator its tokenizer, a text encoder its generator."""

from typing import Literal

from grn_lightning.models.grn_class import GRNClassConfig
from grn_lightning.models.grn_text import GRNTextConfig
from grn_lightning.models.text_encoder import TextEncoder
from grn_lightning.models.tokenizer import TokenizerConfig


def target_of(
    generator: GRNClassConfig | GRNTextConfig, tokenizer: TokenizerConfig
) -> Literal["index", "bit"]:
    """Return the form in which a generator predicts the codes of a tokenizer.

    Raises:
        ValueError: If the sizes fit neither form.
    """
    asked = (generator.num_elements, generator.alphabet_size)
    sizes = {target: tuple(tokenizer.element_sizes(target)) for target in tokenizer.targets}
    for target, size in sizes.items():
        if size == asked:
            return target
    raise ValueError(
        "the generator's (`num_elements`, `alphabet_size`) must be "
        f"{' or '.join(map(str, sizes.values()))} for a tokenizer of {tokenizer.latent_channels} "
        f"channels and {tokenizer.num_rounds} rounds with quantizer "
        f"'{tokenizer.quantizer.name}', got {asked}."
    )


def check_text_channels(config: GRNTextConfig, encoder: TextEncoder) -> None:
    """Refuse a text encoder of another width than the generator reads.

    Raises:
        ValueError: If the widths differ.
    """
    if config.text_channels != encoder.text_channels:
        raise ValueError(
            f"`generator.text_channels` must be the text encoder's width {encoder.text_channels}, "
            f"got {config.text_channels}."
        )
