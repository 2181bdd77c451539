"""Codes on disk: packed bits, and the facts without which they mean nothing.

A sample of a code shard has the member ``codes``, the string of bits of `functional.pack_codes`
(M bits per code, most significant first, channels before positions), and in its ``json`` an entry
of the same name::

    {"codes": {"format": 1, "tokenizer_hash": "0123456789abcdef", "num_rounds": 4,
               "latent_channels": 12, "grid": [3, 2, 2], "size": [9, 32, 32], "fps": null,
               "crc32": 305419896}}

A mirrored copy, if there is one, is the member ``flip.codes`` with an entry of that name; the codes
of four corners are ``crop1.codes`` to ``crop4.codes``, mirrored ``flip.crop1.codes`` and so on. The
checksum covers facts and bits, so that neither changes unnoticed. Text features are the member
``text.npz`` with the entry ``text.npz``.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from grn_lightning.functional.hbq import pack_codes, unpack_codes

FORMAT = 1
CODES = "codes"
NUM_CROPS = 5
"""Centre (or the whole), and four corners."""
TEXT = "text.npz"

_ADVICE = "encode the shards again with `grn encode`"


class OtherTokenizerError(ValueError):
    """Codes or text features are those of another network than the one at hand."""


def codes_member(crop: int = 0, is_flipped: bool = False) -> str:
    """Return the member that holds the codes of a crop.

    Example:
        >>> codes_member(), codes_member(2, is_flipped=True)
        ('codes', 'flip.crop2.codes')
    """
    parts = [*["flip"] * is_flipped, *[f"crop{crop}"] * (crop > 0), CODES]
    return ".".join(parts)


CODE_MEMBERS = tuple(
    codes_member(crop, flip) for crop in range(NUM_CROPS) for flip in (False, True)
)
"""All members that may hold codes."""


@dataclass(frozen=True, kw_only=True)
class CodeFacts:
    """What packed codes mean."""

    tokenizer_hash: str
    """Of the tokenizer's weights; its codes mean nothing to another one."""
    num_rounds: int
    """Bits per code."""
    latent_channels: int
    """Codes per position."""
    grid: tuple[int, int, int]
    """Frames, rows and columns of positions."""
    size: tuple[int, int, int]
    """Frames, height and width in pixels that were encoded."""
    fps: float | None = None
    """Frames per second that a video was read at; None where its frames were taken as they are."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape `(d, f', h', w')` of the codes."""
        return (self.latent_channels, *self.grid)

    @property
    def num_bits(self) -> int:
        """Bits of the codes."""
        return self.num_rounds * torch.Size(self.shape).numel()

    def plain(self) -> dict[str, Any]:
        """Return the facts as JSON holds them."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


def _checksum(plain: Mapping[str, Any], data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(json.dumps(plain, sort_keys=True).encode()))


def encode_codes(codes: Tensor, facts: CodeFacts) -> tuple[bytes, dict[str, Any]]:
    """Pack the codes of one sample.

    Args:
        codes: `(d, f', h', w')` integers in `[0, 2**num_rounds)`.
        facts: What they mean.

    Returns:
        The bytes of the member and its entry in the sample's JSON.

    Raises:
        ValueError: If the codes have another shape or range than the facts say.
    """
    if tuple(codes.shape) != facts.shape:
        raise ValueError(f"codes must be of shape {facts.shape}, got {tuple(codes.shape)}.")
    data = pack_codes(codes.cpu(), num_rounds=facts.num_rounds).numpy().tobytes()
    plain = {"format": FORMAT, **facts.plain()}
    return data, plain | {"crc32": _checksum(plain, data)}


def _as_facts(entry: Mapping[str, Any]) -> CodeFacts:
    try:
        values = {field.name: entry[field.name] for field in fields(CodeFacts)}
        grid, size = tuple(values["grid"]), tuple(values["size"])
        return CodeFacts(**(values | {"grid": grid, "size": size}))
    except (KeyError, TypeError) as error:
        raise ValueError(f"the entry of its codes lacks a fact ({error}); {_ADVICE}.") from error


def check_format(entry: Any) -> None:
    """Refuse an entry that this version cannot read.

    Raises:
        ValueError: If it is none, or of a newer format.
    """
    number = entry.get("format") if isinstance(entry, Mapping) else None
    if not isinstance(number, int):
        raise ValueError(f"its json does not tell what the codes mean; {_ADVICE}.")
    if number > FORMAT:
        raise ValueError(
            f"its codes have format {number}, this version reads up to {FORMAT}; update "
            f"grn_lightning, or {_ADVICE}."
        )


def check_hash(found: str, expected: str | None, *, what: str = "tokenizer") -> None:
    """Refuse what another network has made.

    Raises:
        OtherTokenizerError: Naming both hashes.
    """
    if expected is not None and found != expected:
        raise OtherTokenizerError(
            f"the cache was made by {what} {found}, but the {what} at hand is {expected}; take "
            f"the former, or {_ADVICE}."
        )


def decode_codes(
    data: bytes, entry: Any, *, tokenizer_hash: str | None = None
) -> tuple[Tensor, CodeFacts]:
    """Unpack the codes of one sample; the inverse of `encode_codes`.

    Args:
        data: Bytes of the member.
        entry: Its entry in the sample's JSON.
        tokenizer_hash: Of the tokenizer at hand; None takes the codes of any.

    Returns:
        Codes `(d, f', h', w')`, long, and what they mean.

    Raises:
        OtherTokenizerError: If another tokenizer has made them; it is a `ValueError`.
        ValueError: If the format is newer, or size or checksum do not fit.
    """
    check_format(entry)
    facts = _as_facts(entry)
    num_bytes = -(-facts.num_bits // 8)
    if len(data) != num_bytes:
        raise ValueError(
            f"codes of shape {facts.shape} with {facts.num_rounds} rounds take {num_bytes} bytes, "
            f"got {len(data)}; {_ADVICE}."
        )
    plain = {name: value for name, value in entry.items() if name != "crc32"}
    if _checksum(plain, data) != entry.get("crc32"):
        raise ValueError(f"its codes have changed since they were written (CRC32); {_ADVICE}.")
    check_hash(facts.tokenizer_hash, tokenizer_hash)
    packed = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
    return unpack_codes(packed, shape=facts.shape, num_rounds=facts.num_rounds), facts


def first_frames(codes: Tensor, facts: CodeFacts, num_frames: int) -> Tensor:
    """Return the codes of the beginning of a clip.

    The tokenizer is causal: the codes of the first frames do not depend on the later ones.

    Args:
        codes: `(d, f', h', w')`.
        facts: What they mean.
        num_frames: Frames wanted, in pixels.

    Raises:
        ValueError: If there are fewer, or the number falls into the middle of a position.
    """
    known, positions = facts.size[0], facts.grid[0]
    if num_frames == known:
        return codes
    stride = (known - 1) // (positions - 1) if positions > 1 else 1
    if num_frames > known or (num_frames - 1) % stride:
        raise ValueError(
            f"its codes are those of {known} frames and can give 1 + {stride} k of them, "
            f"{num_frames} are wanted."
        )
    return codes[:, : 1 + (num_frames - 1) // stride]


# --- text features --------------------------------------------------------------------------------


class TextFeatures(NamedTuple):
    """What a text encoder made of one caption.

    Attributes:
        embeds: `(l, c)` float32, zero where masked out.
        mask: `(l,)` bool.
    """

    embeds: Tensor
    mask: Tensor


def encode_text(features: TextFeatures, encoder_hash: str) -> tuple[bytes, dict[str, Any]]:
    """Pack the features of one caption; what the mask leaves out is not stored."""
    buffer = io.BytesIO()
    kept = features.embeds[features.mask].cpu().float().numpy()
    np.savez(buffer, embeds=kept, mask=features.mask.cpu().numpy())
    plain = {"format": FORMAT, "encoder_hash": encoder_hash, "num_tokens": len(kept)}
    data = buffer.getvalue()
    return data, plain | {"crc32": _checksum(plain, data)}


def decode_text(data: bytes, entry: Any, *, encoder_hash: str | None = None) -> TextFeatures:
    """Unpack the features of one caption; the inverse of `encode_text`.

    Raises:
        OtherTokenizerError: If another text encoder has made them.
        ValueError: If the format is newer, or the bytes have changed.
    """
    check_format(entry)
    plain = {name: value for name, value in entry.items() if name != "crc32"}
    if _checksum(plain, data) != entry.get("crc32"):
        raise ValueError(
            f"its text features have changed since they were written (CRC32); {_ADVICE}."
        )
    check_hash(str(entry.get("encoder_hash")), encoder_hash, what="text encoder")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as table:
            kept, mask = torch.from_numpy(table["embeds"]), torch.from_numpy(table["mask"])
    except (KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"its text features cannot be read ({error}); {_ADVICE}.") from error
    embeds = kept.new_zeros(len(mask), kept.shape[1])
    embeds[mask] = kept
    return TextFeatures(embeds, mask)
