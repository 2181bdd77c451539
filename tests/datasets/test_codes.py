"""Codes come back from the disk as they were, or not at all."""

import dataclasses
import json
from typing import Any

import pytest
import torch

from grn_lightning.datasets.codes import (
    CodeFacts,
    OtherTokenizerError,
    TextFeatures,
    decode_codes,
    decode_text,
    encode_codes,
    encode_text,
    first_frames,
)

FACTS = CodeFacts(
    tokenizer_hash="aaaa000011112222",
    num_rounds=3,
    latent_channels=5,
    grid=(3, 2, 4),
    size=(9, 16, 32),
    fps=8.0,
)


def draw(facts: CodeFacts, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**facts.num_rounds, facts.shape, generator=generator)


def stored(facts: CodeFacts = FACTS) -> tuple[bytes, dict[str, Any]]:
    data, entry = encode_codes(draw(facts), facts)
    return data, json.loads(json.dumps(entry))


@pytest.mark.parametrize("num_rounds", range(1, 17))
@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 3, 5), (2, 2, 2)])
def test_every_code_survives_the_disk(num_rounds: int, grid: tuple[int, int, int]) -> None:
    for channels in (1, 7):
        facts = dataclasses.replace(
            FACTS, num_rounds=num_rounds, latent_channels=channels, grid=grid
        )
        codes = draw(facts, seed=channels)
        data, entry = encode_codes(codes, facts)
        back, known = decode_codes(data, json.loads(json.dumps(entry)))
        assert back.equal(codes)
        assert back.dtype == torch.long
        assert known == facts
        assert len(data) == -(-facts.num_bits // 8)


def test_the_bytes_are_those_that_a_person_would_write() -> None:
    facts = dataclasses.replace(FACTS, latent_channels=2, grid=(1, 1, 2))
    codes = torch.tensor([[[[5, 0]]], [[[7, 1]]]])
    data, _ = encode_codes(codes, facts)  # 101 000 111 001, then four zeros
    assert data == bytes([0b10100011, 0b10010000])


def test_every_flipped_bit_is_noticed() -> None:
    data, entry = stored()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match=r"have changed since they were written"):
            decode_codes(bytes(damaged), entry)


@pytest.mark.parametrize(
    ("name", "value"), [("grid", [3, 4, 2]), ("size", [9, 32, 16]), ("fps", None), ("crc32", 0)]
)
def test_changed_facts_are_noticed(name: str, value: Any) -> None:
    data, entry = stored()
    with pytest.raises(ValueError, match=r"have changed since they were written"):
        decode_codes(data, entry | {name: value})


def test_another_tokenizer_is_refused_with_both_hashes() -> None:
    data, entry = stored()
    assert decode_codes(data, entry, tokenizer_hash=FACTS.tokenizer_hash)[0].equal(draw(FACTS))
    with pytest.raises(OtherTokenizerError, match="aaaa000011112222.*bbbb000011112222"):
        decode_codes(data, entry, tokenizer_hash="bbbb000011112222")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2, this version reads up to 1"),
        ({"format": None}, "does not tell what the codes mean"),
        ({"num_rounds": 4}, "with 4 rounds take 60 bytes, got 45"),
    ],
)
def test_what_cannot_be_read_is_refused(change: dict[str, Any], message: str) -> None:
    data, entry = stored()
    with pytest.raises(ValueError, match=message):
        decode_codes(data, entry | change)
    with pytest.raises(ValueError, match="take 45 bytes, got 44"):
        decode_codes(data[:-1], entry)
    with pytest.raises(ValueError, match="lacks a fact .*'grid'"):
        decode_codes(data, {k: v for k, v in entry.items() if k != "grid"})


def test_codes_that_the_facts_do_not_fit_are_not_written() -> None:
    with pytest.raises(ValueError, match=r"shape \(5, 3, 2, 4\), got \(5, 3, 2, 3\)"):
        encode_codes(draw(FACTS)[..., :3], FACTS)
    with pytest.raises(ValueError, match="codes must be in 0..7"):
        encode_codes(draw(FACTS) + 1, FACTS)


def test_the_beginning_of_a_clip_is_a_slice() -> None:
    codes = draw(FACTS)
    assert first_frames(codes, FACTS, 9) is codes
    assert first_frames(codes, FACTS, 5).equal(codes[:, :2])
    assert first_frames(codes, FACTS, 1).equal(codes[:, :1])
    for wrong in (3, 13):
        with pytest.raises(ValueError, match=rf"give 1 \+ 4 k of them, {wrong} are wanted"):
            first_frames(codes, FACTS, wrong)


def test_text_features_survive_the_disk() -> None:
    mask = torch.tensor([True, True, True, False, False])
    features = TextFeatures(torch.randn(5, 6) * mask[:, None], mask)
    data, entry = encode_text(features, "cccc")
    back = decode_text(data, json.loads(json.dumps(entry)), encoder_hash="cccc")
    assert back.embeds.equal(features.embeds)
    assert back.mask.equal(mask)
    with pytest.raises(OtherTokenizerError, match="text encoder cccc.*text encoder at hand is dd"):
        decode_text(data, entry, encoder_hash="dd")
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 1
    with pytest.raises(ValueError, match="text features have changed"):
        decode_text(bytes(damaged), entry)
