"""The tokenizer against stored numbers of the published architecture."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from grn_lightning.models.tokenizer import HBQTokenizer, TokenizerConfig

pytestmark = pytest.mark.parity

RELATIVE_ERROR = 1e-5  # of the largest magnitude, as the numbers were stored in float32


@pytest.fixture
def stored(golden: Path) -> dict[str, Tensor]:
    with safe_open(golden / "tokenizer.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture
def tokenizer(golden: Path, stored: dict[str, Tensor]) -> HBQTokenizer:
    with safe_open(golden / "tokenizer.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["meta"])
    config = TokenizerConfig(
        latent_channels=meta["latent_channels"],
        encoder_width=meta["width"],
        decoder_width=meta["decoder_width"],
        width_multipliers=tuple(meta["width_multipliers"]),
        num_res_blocks=meta["residual_blocks"],
        temporal_downsample=tuple(map(bool, meta["temporal_down"])),
    )
    tokenizer = HBQTokenizer(config)
    prefix = "weights."
    weights = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    tokenizer.load_state_dict(weights, strict=True)
    return tokenizer.requires_grad_(False)


def assert_equal_to_scale(ours: Tensor, expected: Tensor) -> None:
    tolerance = RELATIVE_ERROR * expected.abs().max().item()
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("kind", ["image", "clip"])
def test_latents_equal_the_stored_ones(
    tokenizer: HBQTokenizer, stored: dict[str, Tensor], kind: str, chunk_size: int | None
) -> None:
    clips = stored[kind]
    z = (
        tokenizer.encode(clips)
        if chunk_size is None
        else tokenizer.encode_streaming(clips, chunk_size=chunk_size)
    )
    assert_equal_to_scale(z, stored[f"{kind}_latents"])


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("kind", ["image", "clip"])
def test_reconstructions_equal_the_stored_ones(
    tokenizer: HBQTokenizer, stored: dict[str, Tensor], kind: str, chunk_size: int | None
) -> None:
    z = stored[f"{kind}_latents"]
    clips = (
        tokenizer.decode(z)
        if chunk_size is None
        else tokenizer.decode_streaming(z, chunk_size=chunk_size)
    )
    assert_equal_to_scale(clips, stored[f"{kind}_reconstruction"])
