"""Sizes of published networks, read off the names and shapes of their tensors.

Most sizes are told by a shape. What is not told (binary rounds, attention mode, where the context
tokens enter, the form of the codes) comes from hints, and without a hint from the nearest published
variant; a `SizeGuess` says which.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from grn_lightning.functional.hbq import MAX_ROUNDS
from grn_lightning.models.code_transformer import CodeTransformer, CodeTransformerConfig
from grn_lightning.models.grn_class import GRNClass, GRNClassConfig
from grn_lightning.models.grn_text import GRNText, GRNTextConfig
from grn_lightning.models.tokenizer import COLOURS, HBQTokenizer, TokenizerConfig
from grn_lightning.models.variants import (
    BACKBONES,
    GRN_CLASS,
    GRN_TEXT,
    LLAMAGEN,
    TOKENIZERS,
    VQ_TOKENIZERS,
)
from grn_lightning.models.vq_tokenizer import VQTokenizer, VQTokenizerConfig
from grn_lightning.nn.embed import sincos_2d

Family = Literal["tokenizer", "class", "text", "vq", "gpt"]
FAMILIES = get_args(Family)
AnyConfig = (
    TokenizerConfig | GRNClassConfig | GRNTextConfig | VQTokenizerConfig | CodeTransformerConfig
)
Shape = tuple[int, ...]

NETWORKS: dict[Family, type[nn.Module]] = {
    "tokenizer": HBQTokenizer,
    "class": GRNClass,
    "text": GRNText,
    "vq": VQTokenizer,
    "gpt": CodeTransformer,
}
VARIANTS: dict[Family, Mapping[str, AnyConfig]] = {
    "tokenizer": TOKENIZERS,
    "class": GRN_CLASS,
    "text": GRN_TEXT,
    "vq": VQ_TOKENIZERS,
    "gpt": LLAMAGEN,
}
_LANDMARKS: dict[Family, re.Pattern[str]] = {
    "tokenizer": re.compile(r"(encoder|decoder)\.(conv1|downsamples|upsamples|middle|head)\."),
    "class": re.compile(r"(x_embedder|y_embedder|in_context_posemb|final_layer|blocks\.\d)"),
    "text": re.compile(r"(text_proj|word_embed|pt_embedder|block_chunks\.\d)"),
    "vq": re.compile(
        r"(encoder|decoder)\.(conv_in|conv_blocks|mid|norm_out|conv_out)\.|quant|post_quant_conv"
    ),
    "gpt": re.compile(
        r"tok_embeddings|cls_embedding|layers\.\d+\.(attention|ffn_norm|feed_forward)"
    ),
}
_LEFT_OUT: dict[Family, re.Pattern[str]] = {
    "vq": re.compile(r"quantize\.codebook_used"),  # a list of codes that training has seen
    "gpt": re.compile(r"freqs_cis|causal_mask|layers\.\d+\.attention\.kv_cache\.[kv]_cache"),
}
"""What published files may hold besides weights: what can be computed, or belongs to a moment."""
_ROUNDS = 4  # of all published weights
_MAX_ROWS = 20


@dataclass(frozen=True, kw_only=True)
class SizeHints:
    """What the tensors of a published file do not tell; None takes what is likely."""

    num_rounds: int | None = None
    """Binary rounds M of the tokenizer; 4 in all published weights."""
    target: Literal["index", "bit"] | None = None
    """Whether a generator predicts codes of `2**num_rounds` letters, or their bits."""
    grid_size: tuple[int, int] | None = None
    """Height and width of the latent grid of a class-conditional or autoregressive generator."""
    num_heads: int | None = None
    """Attention heads of an autoregressive generator."""
    context_start: int | None = None
    """First block of a class-conditional generator that sees the context tokens."""
    attention: Literal["prefix", "full"] | None = None
    """Whether text sees the picture ("full") or not ("prefix")."""
    aspect_template: float | None = None
    """Height / width whose coordinates all grids of a text-conditional generator use."""
    use_mid_attention: bool | None = None
    """Whether the attention in the middle of a tokenizer acts or is bypassed."""

    def __post_init__(self) -> None:
        if self.num_rounds is not None and not 1 <= self.num_rounds <= MAX_ROUNDS:
            raise ValueError(f"num_rounds must be in 1..{MAX_ROUNDS}, got {self.num_rounds}.")

    def over(self, others: "SizeHints") -> "SizeHints":
        """Return these hints, and those of others where there is none here."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return SizeHints(**(asdict(others) | known))


@dataclass(frozen=True)
class SizeGuess:
    """The sizes of a network whose tensors were looked at."""

    family: Family
    """Which of the published architectures it is."""
    config: AnyConfig
    """Its sizes."""
    assumed: dict[str, Any] = field(default_factory=dict)
    """Fields that neither tensors nor hints told, with the value that was taken."""


class UnknownSizes(ValueError):
    """Tensors that are those of no published architecture."""


# --------------------------------------------------------------------------- families, variants


def shape_text(shape: Shape) -> str:
    """Write a shape as a person does."""
    return f"({', '.join(map(str, shape))})"


def find_family(tensors: Mapping[str, Any]) -> Family:
    """Return the architecture whose names these are.

    Raises:
        UnknownSizes: If they are of none.
    """
    counts = {
        family: sum(pattern.match(name) is not None for name in tensors)
        for family, pattern in _LANDMARKS.items()
    }
    family = max(counts, key=lambda name: counts[name])
    if 2 * counts[family] <= len(tensors):
        raise UnknownSizes("the names are not those of a published tokenizer or generator")
    return family


@lru_cache(maxsize=32)
def expected_shapes(family: Family, config: AnyConfig) -> dict[str, Shape]:
    """Return names and shapes of all tensors of a network."""
    with torch.device("meta"):
        state = NETWORKS[family](config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def table_hints(tensors: Mapping[str, Tensor]) -> SizeHints:
    """Return what the table of rotations tells that an autoregressive generator may come with.

    Its shape is `(1 + positions, half of a head, 2)`; the grid is taken to be a square.
    """
    table, norm = tensors.get("freqs_cis"), tensors.get("norm.weight")
    if table is None or norm is None or table.ndim != 3 or len(norm) % (2 * table.shape[1]):
        return SizeHints()
    side = math.isqrt(len(table) - 1)
    grid_size = (side, side) if side * side == len(table) - 1 else None
    return SizeHints(num_heads=len(norm) // (2 * table.shape[1]), grid_size=grid_size)


def split_left_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Take out what may be left out of a network's file: buffers that no weights depend on.

    Returns:
        All other tensors, and the names of what was taken out.
    """
    try:
        pattern = _LEFT_OUT.get(find_family(tensors))
    except UnknownSizes:
        pattern = None
    names = tuple(name for name in tensors if pattern is not None and pattern.fullmatch(name))
    return {name: x for name, x in tensors.items() if name not in names}, names


def differences(shapes: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
    """List the tensors that are missing, left over, or of another shape; one line each."""
    rows = [
        f"missing      {name} {shape_text(expected[name])}" for name in expected.keys() - shapes
    ]
    rows.sort()
    rows += [f"unexpected   {name} {shape_text(shapes[name])}" for name in shapes.keys() - expected]
    rows += [
        f"other shape  {name} {shape_text(shapes[name])} in the file, {shape_text(shape)} in the "
        "model"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    return rows


def nearest_variant(shapes: Mapping[str, Shape]) -> tuple[str, int] | None:
    """Return the published variant with the most similar tensors, and how many of them differ.

    Similar is first who has the same names, then who has similar numbers of values under them.
    """
    best: tuple[tuple[float, float], str, int] | None = None
    for family, table in VARIANTS.items():
        if not any(_LANDMARKS[family].match(name) for name in shapes):
            continue
        for name, config in table.items():
            expected = expected_shapes(family, config)
            common = shapes.keys() & expected.keys()
            sizes = [(math.prod(shapes[key]), math.prod(expected[key])) for key in common]
            apart = sum(abs(math.log(max(a, 1) / b)) for a, b in sizes)
            score = (len(shapes.keys() ^ expected.keys()), apart)
            if best is None or score < best[0]:
                count = score[0] + sum(shapes[key] != expected[key] for key in common)
                best = (score, name, count)
    return None if best is None else best[1:]


def misfit(shapes: Mapping[str, Shape], rows: list[str], what: str) -> str:
    """Return the message for tensors that do not fit: a table, and who comes near."""
    if len(rows) > _MAX_ROWS:
        rows = [*rows[:_MAX_ROWS], f"... and {len(rows) - _MAX_ROWS} more"]
    near = nearest_variant(shapes)
    text = "; no known variant is near."
    if near is not None:
        name, count = near
        differ = f"{count} of its tensors differ" if count else "all of its tensors fit"
        text = f"; the nearest known variant is {name!r} ({differ})."
    return "\n  ".join([what + text, *rows])


# --------------------------------------------------------------------------- sizes


class _Shapes(NamedTuple):
    """Shapes by name; a missing one ends the search."""

    shapes: dict[str, Shape]

    def __call__(self, name: str, axis: int) -> int:
        if name not in self.shapes or axis >= len(self.shapes[name]):
            raise UnknownSizes(f"there is no tensor {name!r} of a published shape")
        return self.shapes[name][axis]

    def count(self, pattern: str) -> int:
        """Count the numbers 0, 1, 2, ... that stand for `N` in the name of a tensor."""
        number = 0
        while pattern.replace("N", str(number)) in self.shapes:
            number += 1
        if number == 0:
            raise UnknownSizes(f"there is no tensor {pattern.replace('N', '0')!r}")
        return number


def guess_sizes(tensors: Mapping[str, Tensor], hints: SizeHints | None = None) -> SizeGuess:
    """Read the sizes of a network off its tensors.

    Args:
        tensors: All of them, under their published names.
        hints: What is known besides; it goes before what is likely.

    Raises:
        UnknownSizes: If a tensor that tells a size is missing.
        ValueError: If the sizes are impossible, alone or with the hints.
    """
    hints = hints or SizeHints()
    family = find_family(tensors)
    guess = {
        "tokenizer": _guess_tokenizer,
        "class": _guess_class,
        "text": _guess_text,
        "vq": _guess_vq,
        "gpt": _guess_gpt,
    }[family]
    shapes = _Shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return guess(tensors, shapes, hints)


def _divide(total: int, by: int, what: str) -> int:
    if by < 1 or total % by:
        raise UnknownSizes(f"{what} of {total} cannot be made of units of {by}")
    return total // by


def was_attention_trained(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the attention in the middle of a tokenizer has ever acted.

    A new projection is zero, and one that is bypassed in training stays so.
    """
    names = [f"{side}.middle.1.proj.weight" for side in ("encoder", "decoder")]
    return any(name not in tensors or bool(tensors[name].any()) for name in names)


def _guess_tokenizer(tensors: Mapping[str, Tensor], shape: _Shapes, hints: SizeHints) -> SizeGuess:
    assumed: dict[str, Any] = {}
    first = "encoder.conv1.weight"
    encoder_width, pixels = shape(first, 0), shape(first, 1)
    levels = shape.count("encoder.downsamples.N.downsamples.0.residual.2.weight")
    blocks = shape.count("encoder.downsamples.0.downsamples.N.residual.2.weight")
    widths = [
        shape(f"encoder.downsamples.{n}.downsamples.0.residual.2.weight", 0) for n in range(levels)
    ]
    multipliers = tuple(_divide(width, encoder_width, "an encoder width") for width in widths)
    last = shape("decoder.head.2.weight", 1)
    use_attention = hints.use_mid_attention
    if use_attention is None:
        use_attention = assumed["use_mid_attention"] = was_attention_trained(tensors)
    if hints.num_rounds is None:
        assumed["num_rounds"] = _ROUNDS
    config = TokenizerConfig(
        latent_channels=shape("conv2.weight", 0),
        num_rounds=hints.num_rounds or _ROUNDS,
        encoder_width=encoder_width,
        decoder_width=_divide(last, multipliers[0], "a decoder width"),
        width_multipliers=multipliers,
        num_res_blocks=blocks,
        temporal_downsample=tuple(
            f"encoder.downsamples.{n}.downsamples.{blocks}.time_conv.weight" in tensors
            for n in range(levels - 1)
        ),
        patch_size=max(1, round(math.sqrt(pixels / COLOURS))),
        use_mid_attention=use_attention,
    )
    return SizeGuess("tokenizer", config, assumed)


def _guess_elements(
    total: int, family: Family, hints: SizeHints, assumed: dict[str, Any]
) -> tuple[int, int]:
    """Split the number of one-hot channels into elements and letters of their alphabet."""
    alphabet, target = 2 ** (hints.num_rounds or _ROUNDS), hints.target
    if target is None:
        rows = [(c.num_elements, c.alphabet_size) for c in VARIANTS[family].values()]  # type: ignore[union-attr]
        published = next((row for row in rows if math.prod(row) == total), None)
        if total % alphabet:
            target = "bit"
        elif published is not None and hints.num_rounds in (None, _ROUNDS):
            target = "bit" if published[1] == 2 else "index"
        else:  # those of the weights that were published
            target = "index" if family == "class" else "bit"
        assumed["target"] = target
    if target == "index" and hints.num_rounds is None:
        assumed["num_rounds"] = _ROUNDS
    size = alphabet if target == "index" else 2
    return _divide(total, size, "a one-hot vector"), size


def _guess_grid(positions: Tensor, width: int) -> tuple[int, int]:
    """Find the grid whose table of positions this is, or else take a square."""
    num_tokens = positions.shape[1]
    for height in range(1, num_tokens + 1):
        if num_tokens % height == 0 and width % 4 == 0 and num_tokens > 1:
            table = sincos_2d(height, num_tokens // height, width)
            if torch.allclose(positions[0].float(), table, atol=1e-2):
                return height, num_tokens // height
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(
            f"`pos_embed` has {num_tokens} positions and is no table that tells their grid; give "
            "`grid_size`."
        )
    return side, side


def _guess_context_start(depth: int, rows: Mapping[str, GRNClassConfig]) -> int:
    """Where the context tokens enter in the published network of this depth, or the nearest one."""
    near = min(rows.values(), key=lambda row: abs(math.log(row.depth / depth)))
    return near.context_start * depth // near.depth


def _guess_class(tensors: Mapping[str, Tensor], shape: _Shapes, hints: SizeHints) -> SizeGuess:
    assumed: dict[str, Any] = {}
    width, depth = shape("pos_embed", 2), shape.count("blocks.N.attn.qkv.weight")
    elements = _guess_elements(shape("x_embedder.proj1.weight", 1), "class", hints, assumed)
    start = hints.context_start
    if start is None:
        start = assumed["context_start"] = _guess_context_start(depth, GRN_CLASS)
    head_dim = shape("blocks.0.attn.q_norm.weight", 0)
    config = GRNClassConfig(
        num_elements=elements[0],
        alphabet_size=elements[1],
        grid_size=hints.grid_size or _guess_grid(tensors["pos_embed"], width),
        depth=depth,
        width=width,
        num_heads=_divide(width, head_dim, "a width"),
        bottleneck=shape("x_embedder.proj1.weight", 0),
        num_classes=shape("y_embedder.embedding_table.weight", 0) - 1,
        num_context_tokens=shape("in_context_posemb", 1),
        context_start=start,
    )
    return SizeGuess("class", config, assumed)


def _guess_text(tensors: Mapping[str, Tensor], shape: _Shapes, hints: SizeHints) -> SizeGuess:
    assumed: dict[str, Any] = {}
    width, total = shape("word_embed.weight", 0), shape("word_embed.weight", 1)
    elements = _guess_elements(total, "text", hints, assumed)
    num_chunks = shape.count("block_chunks.N.module.0.attn.q_proj.weight")
    per_chunk = shape.count("block_chunks.0.module.N.attn.q_proj.weight")
    block = "block_chunks.0.module.0."
    head_dim = shape(f"{block}attn.q_norm.weight", 0)
    num_heads = _divide(width, head_dim, "a width")
    kv_heads = _divide(shape(f"{block}attn.k_proj.weight", 0), head_dim, "a width of keys")
    attention = hints.attention
    if attention is None:
        near = min(GRN_TEXT.values(), key=lambda row: abs(math.log(row.width / width)))
        attention = assumed["attention"] = near.attention
    config = GRNTextConfig(
        num_elements=elements[0],
        alphabet_size=elements[1],
        text_channels=shape("text_proj.weight", 1),
        depth=num_chunks * per_chunk,
        width=width,
        num_heads=num_heads,
        num_kv_heads=None if kv_heads == num_heads else kv_heads,
        mlp_width=shape(f"{block}mlp.gate_proj.weight", 0),
        blocks_per_chunk=per_chunk,
        attention=attention,
        aspect_template=hints.aspect_template,
    )
    return SizeGuess("text", config, assumed)


def _guess_vq(tensors: Mapping[str, Tensor], shape: _Shapes, hints: SizeHints) -> SizeGuess:
    width, levels = (
        shape("encoder.conv_in.weight", 0),
        shape.count("encoder.conv_blocks.N.res.0.conv1.weight"),
    )
    widths = [shape(f"encoder.conv_blocks.{n}.res.0.conv1.weight", 0) for n in range(levels)]
    config = VQTokenizerConfig(
        codebook_size=shape("quantize.embedding.weight", 0),
        codebook_dim=shape("quantize.embedding.weight", 1),
        width=width,
        width_multipliers=tuple(_divide(wide, width, "an encoder width") for wide in widths),
        num_res_blocks=shape.count("encoder.conv_blocks.0.res.N.conv1.weight"),
        feature_width=shape("encoder.conv_out.weight", 0),
    )
    return SizeGuess("vq", config)


def _guess_gpt(tensors: Mapping[str, Tensor], shape: _Shapes, hints: SizeHints) -> SizeGuess:
    assumed: dict[str, Any] = {}
    width, depth = shape("norm.weight", 0), shape.count("layers.N.attention.wqkv.weight")
    num_heads, grid_size = hints.num_heads, hints.grid_size
    if num_heads is None:
        near = min(BACKBONES.values(), key=lambda row: abs(math.log(row.width / width)))
        is_fitting = width % (4 * near.num_heads) == 0
        num_heads = assumed["num_heads"] = near.num_heads if is_fitting else max(1, width // 64)
    if grid_size is None:
        grid_size = assumed["grid_size"] = CodeTransformerConfig.grid_size
    config = CodeTransformerConfig(
        input_size=shape("tok_embeddings.weight", 0),
        output_size=shape("output.weight", 0),
        grid_size=grid_size,
        depth=depth,
        width=width,
        num_heads=num_heads,
        num_classes=shape("cls_embedding.embedding_table.weight", 0) - 1,
    )
    mlp_width = shape("layers.0.feed_forward.w1.weight", 0)
    if mlp_width != config.hidden:
        config = replace(config, mlp_width=mlp_width)
    return SizeGuess("gpt", config, assumed)
