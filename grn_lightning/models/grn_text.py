"""GRNText: the text-conditional Generative Refinement Network for images and video.

One transformer over `[text, visual, time]` tokens. Attention is one of the two published modes:

* "prefix": text attends to text only; visual and time tokens attend to everything. Text states
  do not depend on the picture, so that their keys and values can be computed once (`encode_text`).
* "full": everything attends to everything.

Positions live in the rotary tables alone, hence the order of the groups is ours to choose; text
comes first. An image is a clip of one frame. A clip that continues a picture has the clean codes of
the picture as its latent frame 0 (`first_frame`): they enter like any codes and stand at time 0,
the codes to be predicted at times 1 .. f, and there are no logits for them. It is the published
image-to-video geometry.

Documents of different sizes go through the blocks as one packed sequence without padding
(`models/packed.py`); each gets the logits that it gets alone.

`b` batch, `c` elements per position, `k` alphabet, `f h w` grid, `n = f h w`, `l` text tokens,
`d` width, `e` head width.
"""

import dataclasses
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from grn_lightning.functional.rope import (
    ASPECT_TEMPLATES,
    NUM_TEXT_POSITIONS,
    Rotary,
    text_rotary,
    time_token_rotary,
    visual_rotary,
)
from grn_lightning.models.packed import PackedMaps, PackedText, plan_sequence
from grn_lightning.nn.attention import (
    AttentionLayout,
    KeyValue,
    PrefixAttention,
    TableCache,
    join_rotary,
)
from grn_lightning.nn.embed import CodeEmbedding, TimeEmbedding
from grn_lightning.nn.mlp import GatedMLP, LinearFP32
from grn_lightning.nn.norm import RMSNorm
from grn_lightning.nn.packed_attention import Backend, DocumentAttention


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRNTextConfig:
    """Sizes of a `GRNText`.

    Attributes:
        num_elements: Elements per position, `c` (latent channels, or bits of all channels).
        alphabet_size: Codes per element, `k` (`2**num_rounds`, or 2).
        text_channels: Width of the text features.
        depth: Number of blocks; a multiple of `blocks_per_chunk`.
        width: Width of the tokens; a multiple of `num_heads`; the head width is even.
        num_heads: Query heads.
        num_kv_heads: Key and value heads, a divisor of `num_heads`; None means `num_heads`.
        mlp_width: Width of the gated feed-forward product.
        blocks_per_chunk: Blocks per unit of sharding and checkpointing (part of tensor names).
        attention: "prefix" or "full"; weights of one mode load into the other but do not fit it.
        aspect_template: Height / width whose rotary coordinates all grids use; None picks the
            nearest published template of each grid.
    """

    num_elements: int
    alphabet_size: int
    text_channels: int = 4096
    depth: int
    width: int
    num_heads: int
    num_kv_heads: int | None = None
    mlp_width: int
    blocks_per_chunk: int
    attention: Literal["prefix", "full"] = "prefix"
    aspect_template: float | None = None

    def __post_init__(self) -> None:
        issues = []
        if self.alphabet_size < 2:
            issues.append(f"alphabet_size must be at least 2, got {self.alphabet_size}")
        if self.width % (2 * self.num_heads) or self.head_dim < 6:
            issues.append(
                "width / num_heads must be even and at least 6 (channel pairs for three axes), "
                f"got {self.width} / {self.num_heads}"
            )
        if self.num_heads % self.key_heads:
            issues.append(f"num_kv_heads must divide num_heads, got {self.num_kv_heads}")
        if self.depth % self.blocks_per_chunk:
            issues.append(
                f"depth must be a multiple of blocks_per_chunk = {self.blocks_per_chunk}, "
                f"got {self.depth}"
            )
        if self.attention not in ("prefix", "full"):
            issues.append(f"attention must be 'prefix' or 'full', got {self.attention!r}")
        if self.aspect_template not in (None, *ASPECT_TEMPLATES):
            issues.append(
                f"aspect_template must be None or one of {ASPECT_TEMPLATES}, "
                f"got {self.aspect_template}"
            )
        if issues:
            raise ValueError("GRNTextConfig: " + "; ".join(issues) + ".")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.num_heads

    @property
    def key_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads or self.num_heads


class TextCondition(NamedTuple):
    """Features of encoded captions; what the mask hides has no influence.

    Attributes:
        embeds: Token features `(b, l, text_channels)`.
        mask: Boolean `(b, l)`, True = a token of the caption.
    """

    embeds: Tensor
    mask: Tensor


class TextCache(NamedTuple):
    """Captions as the blocks see them: the whole text side of a "prefix" model.

    The batch is the first axis of every field, so that a cache can be concatenated, indexed and
    passed as `condition` like the `TextCondition` it was made from.

    Attributes:
        keys: Normalized and rotated keys `(b, depth, n, l, e)`.
        values: Values, same shape.
        mask: Boolean `(b, l)`, True = a token of the caption.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor


class FirstFrameCondition(NamedTuple):
    """Text and the picture that a clip starts from; cut and joined along the batch like its parts.

    Attributes:
        text: Features of the captions, or what `GRNText.encode_text` made of them.
        first_frame: Clean codes `(b, c, 1, h, w)` of latent frame 0. The branch without a caption
            has them too, so that guidance acts on the text alone.
    """

    text: TextCondition | TextCache
    first_frame: Tensor


class Block(nn.Module):
    """Pre-normalized attention and feed-forward branches."""

    def __init__(self, config: GRNTextConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width)
        self.attn = PrefixAttention(config.width, config.num_heads, config.key_heads)
        self.post_attention_layernorm = RMSNorm(config.width)
        self.mlp = GatedMLP(config.width, config.mlp_width)

    def forward(
        self, x: Tensor, layout: AttentionLayout, cached: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Refine tokens `x` `(b, l, d)`; also return their keys and values."""
        branch, key_value = self.attn(self.input_layernorm(x), layout, cached)
        x = x + branch
        return x + self.mlp(self.post_attention_layernorm(x)), key_value


class BlockChunk(nn.Module):
    """Consecutive blocks: the unit of sharding and activation checkpointing."""

    def __init__(self, config: GRNTextConfig) -> None:
        super().__init__()
        self.module = nn.ModuleList(Block(config) for _ in range(config.blocks_per_chunk))

    def forward(
        self, x: Tensor, layout: AttentionLayout, cached: list[KeyValue] | None = None
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run the blocks; `cached` and the result hold one pair of keys and values per block."""
        key_values = []
        for i, block in enumerate(self.module):
            x, key_value = block(x, layout, None if cached is None else cached[i])
            key_values.append(key_value)
        return x, key_values


class Head(nn.Module):
    """Normalization and the map to `c k` logits per token, in float32."""

    def __init__(self, width: int, num_logits: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.proj = LinearFP32(width, num_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens `x` `(b, n, d)` to `(b, n, c k)`."""
        return self.proj(self.norm(x))


class GRNText(nn.Module):
    """Text-conditional generator: `(codes, t, condition) -> logits`.

    Parameter names and shapes are those of the published checkpoints.

    Args:
        config: Sizes.

    Attributes:
        packed_backend: What computes the attention of packed documents, see `nn.packed_attention`.
    """

    def __init__(self, config: GRNTextConfig) -> None:
        super().__init__()
        self.config = config
        num_chunks = config.depth // config.blocks_per_chunk
        self.text_proj = LinearFP32(config.text_channels, config.width)
        self.word_embed = CodeEmbedding(config.num_elements, config.alphabet_size, config.width)
        self.pt_embedder = TimeEmbedding(config.width)
        self.block_chunks = nn.ModuleList(BlockChunk(config) for _ in range(num_chunks))
        self.head = Head(config.width, config.num_elements * config.alphabet_size)
        self.packed_backend: Backend = "auto"
        self._tables = TableCache()
        self._grid_tables = TableCache(size=64)  # packs mix presets, aspects and durations
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize every parameter as in the newest published training code.

        | parameter | start |
        |---|---|
        | linear layers and the code embedding | normal, std `sqrt(1 / (3 width))`; bias 0 |
        | `attn.o_proj`, `mlp.down_proj` | the same, divided by `sqrt(2 depth)` |
        | normalization weights | 1 |
        """
        std = (1 / (3 * self.config.width)) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, CodeEmbedding)):
                is_residual = name.endswith(("attn.o_proj", "mlp.down_proj"))
                scale = (2 * self.config.depth) ** -0.5 if is_residual else 1.0
                nn.init.normal_(module.weight, std=std * scale)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)

    def forward(
        self,
        codes: Tensor | PackedMaps,
        t: Tensor,
        condition: TextCondition | TextCache | FirstFrameCondition | PackedText,
        text_cache: TextCache | None = None,
        *,
        first_frame: Tensor | None = None,
    ) -> Tensor:
        """Predict the logits of every element.

        The tokens of a first frame are visual tokens: they attend to everything and, with "prefix"
        attention, the text does not see them. Its states thus stay what they are without a picture,
        and one text cache serves every picture.

        Args:
            codes: Corrupted codes `(b, c, f, h, w)` in [0, k); or packed documents, whose
                `condition` is packed text, and which have a time each.
            t: Time `(b,)` in [0, 1]: 0 noise, 1 data. A clean first frame does not raise it: in
                training it is the share that a mask over all `1 + f` frames would have kept.
            condition: Text features, or what `encode_text` made of them; with a first frame or
                without.
            text_cache: What `encode_text` made of the text; then its features are not read.
            first_frame: Clean codes `(b, c, 1, h, w)` of the latent frame before `codes`, unless
                `condition` has them.

        Returns:
            Logits `(b, c, f, h, w, k)` of `codes`, float32; of packed documents `(n, c, k)`, those
            of all positions but given first frames, one document behind the other.

        Raises:
            ValueError: If codes, first frame or text are of other sizes than the model's.
        """
        if isinstance(codes, PackedMaps):
            assert isinstance(condition, PackedText)
            return self._forward_packed(codes, t, condition)
        if isinstance(condition, FirstFrameCondition):
            condition, first_frame = condition
        num_logits = codes.shape[2:].numel()
        if first_frame is not None:
            codes = _put_before(first_frame, codes)
        visual = self._embed_visual(codes, t)  # (b, n + 1, d), the first frame in front
        grid = tuple(codes.shape[2:])
        cache = condition if isinstance(condition, TextCache) else text_cache
        if cache is not None:
            x = self._run(visual, self._cached_layout(cache, grid), cache)[0]
        else:
            assert isinstance(condition, TextCondition)
            text, text_mask = self._embed_text(condition)
            x = torch.cat([text, visual], dim=1)
            x = self._run(x, self._joint_layout(text_mask, grid))[0]
        logits = self.head(x[:, -1 - num_logits : -1])  # (b, n, c k); the last is the time token
        logits = logits.unflatten(-1, (-1, self.config.alphabet_size))  # element-major
        return logits.transpose(1, 2).unflatten(2, (-1, *grid[1:]))

    def encode_text(self, condition: TextCondition) -> TextCache:
        """Run the text alone through all blocks ("prefix" attention only).

        Args:
            condition: Text features and mask.

        Returns:
            Keys and values of every block; `forward` gives the same logits with and without.

        Raises:
            ValueError: If the model attends in "full" mode, where text depends on the picture.
        """
        self._require_prefix()
        text, mask = self._embed_text(condition)
        rotary = self._rotary(text.shape[1], None, text.device)
        layout = AttentionLayout(rotary, mask=_self_mask(mask) if _has_padding(mask) else None)
        key_values = self._run(text, layout, keeps=True)[1]
        keys, values = (torch.stack(group, dim=1) for group in zip(*key_values, strict=True))
        return TextCache(keys, values, mask)

    # -- packed documents -------------------------------------------------------------------------

    def _forward_packed(self, maps: PackedMaps, t: Tensor, text: PackedText) -> Tensor:
        """Predict the elements `(n, c, k)` of all documents in one sequence."""
        if maps.codes.ndim != 2 or maps.codes.shape[1] != self.config.num_elements:
            raise self._misfit_of_codes("n, {}", maps.codes)
        self._check_text(text.embeds)
        plan = plan_sequence(maps, text.lengths)
        visual = self.word_embed(maps.codes.T[None])[0]  # (n, d)
        tokens = torch.cat([self.text_proj(text.embeds), visual, self.pt_embedder(t)])
        layout = AttentionLayout(
            Rotary(*(table[plan.order] for table in self._packed_rotary(maps.grids, text))),
            packed=DocumentAttention(
                plan.lengths,
                has_closed_prefix=self.config.attention == "prefix",
                backend=self.packed_backend,
                head_width=self.config.head_dim,
                device=tokens.device,
            ),
        )
        x = self._run(tokens[plan.order][None], layout)[0]
        logits = self.head(x[:, plan.predicted])[0]  # (n, c k)
        return logits.unflatten(-1, (-1, self.config.alphabet_size))

    def _packed_rotary(self, grids: tuple[tuple[int, int, int], ...], text: PackedText) -> Rotary:
        """Tables of all text tokens, all visual tokens and all time tokens."""
        device = text.embeds.device
        words = self._rotary(NUM_TEXT_POSITIONS, None, device)
        time = time_token_rotary(self.config.head_dim)
        return join_rotary(
            Rotary(*(table[text.positions] for table in words)),
            *(self._grid_rotary(grid, device) for grid in grids),
            Rotary(*(table.to(device).expand(len(grids), -1) for table in time)),
        )

    def _grid_rotary(self, grid: tuple[int, int, int], device: torch.device) -> Rotary:
        """Tables of the visual tokens of one document."""

        def make() -> Rotary:
            template, head_dim = self.config.aspect_template, self.config.head_dim
            tables = visual_rotary(*grid, head_dim=head_dim, aspect_template=template)
            return Rotary(*(table.to(device) for table in tables))

        return self._grid_tables.get((grid, device), make)

    # -- tokens ---------------------------------------------------------------------------------

    def _embed_visual(self, codes: Tensor, t: Tensor) -> Tensor:
        """Return visual tokens and, last, the time token `(b, n + 1, d)`."""
        if codes.ndim != 5 or codes.shape[1] != self.config.num_elements:
            raise self._misfit_of_codes("b, {}, f, h, w", codes)
        visual = self.word_embed(codes).flatten(1, 3)
        return torch.cat([visual, self.pt_embedder(t)[:, None]], dim=1)

    def _embed_text(self, condition: TextCondition) -> tuple[Tensor, Tensor]:
        """Return text tokens `(b, l, d)` and their mask; hidden features are replaced by zeros."""
        embeds, mask = condition
        self._check_text(embeds)
        return self.text_proj(embeds.masked_fill(~mask[..., None], 0)), mask

    def _misfit_of_codes(self, shape: str, codes: Tensor) -> ValueError:
        return ValueError(
            f"codes must be ({shape.format(self.config.num_elements)}), got "
            f"{tuple(codes.shape)}; num_elements of the generator must fit the tokenizer."
        )

    def _check_text(self, embeds: Tensor) -> None:
        if embeds.shape[-1] != self.config.text_channels:
            batch = "b, l" if embeds.ndim == 3 else "l"
            raise ValueError(
                f"text features must be ({batch}, {self.config.text_channels}), got "
                f"{tuple(embeds.shape)}; text_channels must fit the text encoder."
            )

    # -- who attends to whom, and from where ------------------------------------------------------

    def _joint_layout(self, text_mask: Tensor, grid: tuple[int, ...]) -> AttentionLayout:
        """Text and visual tokens in one sequence."""
        length = text_mask.shape[1]
        rotary = self._rotary(length, grid, text_mask.device)
        prefix_mask = mask = None
        if _has_padding(text_mask):
            prefix_mask, mask = _self_mask(text_mask), _key_mask(text_mask, grid)
        if self.config.attention == "full":
            return AttentionLayout(rotary, mask=mask)
        return AttentionLayout(rotary, length, prefix_mask, mask)

    def _cached_layout(self, cache: TextCache, grid: tuple[int, ...]) -> AttentionLayout:
        """Visual tokens in the sequence, text in the cache."""
        self._require_prefix()
        mask = _key_mask(cache.mask, grid) if _has_padding(cache.mask) else None
        return AttentionLayout(self._rotary(0, grid, cache.mask.device), mask=mask)

    def _rotary(self, length: int, grid: tuple[int, ...] | None, device: torch.device) -> Rotary:
        """Tables of `length` text tokens, then of the visual tokens and the time token."""
        return self._tables.get(
            (length, grid, device), lambda: self._make_rotary(length, grid, device)
        )

    def _make_rotary(
        self, length: int, grid: tuple[int, ...] | None, device: torch.device
    ) -> Rotary:
        head_dim = self.config.head_dim
        rotary = text_rotary(length, head_dim)
        if grid is not None:
            template = self.config.aspect_template
            visual = visual_rotary(*grid, head_dim=head_dim, aspect_template=template)
            rotary = join_rotary(rotary, visual, time_token_rotary(head_dim))
        return Rotary(*(table.to(device) for table in rotary))

    def _require_prefix(self) -> None:
        if self.config.attention != "prefix":
            raise ValueError(
                "a text cache needs attention='prefix'; with attention='full' text attends to the "
                "picture and must be computed in every step."
            )

    # -- blocks -----------------------------------------------------------------------------------

    def _run(
        self,
        x: Tensor,
        layout: AttentionLayout,
        cache: TextCache | None = None,
        *,
        keeps: bool = False,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run all chunks; return tokens and, if `keeps`, the keys and values of every block."""
        cached: list[KeyValue] | None = None
        if cache is not None:
            cached = list(zip(cache.keys.unbind(1), cache.values.unbind(1), strict=True))
        kept: list[KeyValue] = []
        size = self.config.blocks_per_chunk
        for i, chunk in enumerate(self.block_chunks):
            x, new = chunk(x, layout, None if cached is None else cached[i * size :][:size])
            if keeps:  # not otherwise: they would outlive activation checkpointing
                kept += new
        return x, kept


def _put_before(first_frame: Tensor, codes: Tensor) -> Tensor:
    """Join codes `(b, c, 1, h, w)` and `(b, c, f, h, w)` to a clip of `1 + f` frames."""
    expected = (*codes.shape[:2], 1, *codes.shape[3:])
    if first_frame.shape != expected:
        raise ValueError(
            f"first_frame must be {expected}, one latent frame that fits codes "
            f"{tuple(codes.shape)}, got {tuple(first_frame.shape)}."
        )
    return torch.cat([first_frame, codes], dim=2)


def _has_padding(mask: Tensor) -> bool:
    """Tell whether a mask is needed; one synchronization per pass, none in a compiled graph."""
    return torch.compiler.is_compiling() or not bool(mask.all())


def _self_mask(mask: Tensor) -> Tensor:
    """Masks `(b, 1, l, l)` of text to text; every token sees itself, so that no row is empty."""
    itself = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return (mask[:, None, :] | itself)[:, None]


def _key_mask(mask: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Masks `(b, 1, 1, l + n + 1)` of any token to text, visual tokens and time."""
    num_visual = torch.Size(grid).numel() + 1
    return torch.cat([mask, mask.new_ones(len(mask), num_visual)], dim=1)[:, None, None]
