"""Tiny pipelines with random weights in which every part matters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from grn_lightning.models.grn_class import GRNClass, GRNClassConfig
from grn_lightning.models.grn_text import GRNText, GRNTextConfig
from grn_lightning.models.text_encoder import OpenClipTextEncoder, TextEncoderConfig
from grn_lightning.models.tokenizer import HBQTokenizer, TokenizerConfig
from grn_lightning.pipelines import GeneratorPipeline
from tests.tiny_runs import TINY_CLASS, TINY_TEXT, TINY_TOKENIZER

Build = Callable[..., GeneratorPipeline]


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Replace all weights by ones that let no part vanish."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def parts() -> dict[str, Any]:
    """A tokenizer (8 x 8 pixels and 2 frames per position) and a text encoder of 40 tokens."""
    torch.manual_seed(0)
    tokenizer = randomize(HBQTokenizer(TokenizerConfig(**TINY_TOKENIZER)))
    tokenizer.conv1.bias.zero_()
    encoder = OpenClipTextEncoder(TextEncoderConfig(width=16, layers=1, context_length=40))
    return {"tokenizer": tokenizer, "text_encoder": encoder.eval().requires_grad_(False)}


@pytest.fixture(scope="session")
def build(parts: dict[str, Any]) -> Build:
    """Make a pipeline of a kind, "prefix", "full" or "class"."""

    def make(kind: str = "prefix", **settings: Any) -> GeneratorPipeline:
        torch.manual_seed(1)
        if kind == "class":
            network = randomize(GRNClass(GRNClassConfig(**TINY_CLASS)))
            return GeneratorPipeline(network, parts["tokenizer"], **settings)  # type: ignore[arg-type]
        config = GRNTextConfig(**TINY_TEXT | {"attention": kind})
        return GeneratorPipeline(randomize(GRNText(config)), **parts, **settings)  # type: ignore[arg-type]

    return make
