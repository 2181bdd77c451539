"""GRNClass: the class-conditional Generative Refinement Network.

A bidirectional transformer over the positions of a latent grid. Time and class modulate every
block (adaLN); from the middle on, tokens that know the class stand in front of the sequence.

`b` batch, `c` elements per position, `k` alphabet, `h w` grid, `n = h w` tokens, `d` width.
"""

import dataclasses

import torch
from torch import Tensor, nn

from grn_lightning.functional.rope import Rotary, rope_2d_class
from grn_lightning.nn.attention import FusedAttention, TableCache, join_rotary
from grn_lightning.nn.embed import CodeEmbedding, LabelEmbedding, TimeEmbedding, sincos_2d
from grn_lightning.nn.mlp import LinearFP32, SwiGLU, full_precision
from grn_lightning.nn.modulation import Modulation, modulate
from grn_lightning.nn.norm import RMSNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRNClassConfig:
    """Sizes of a `GRNClass`.

    Attributes:
        num_elements: Elements per position, `c` (latent channels, or bits of all channels).
        alphabet_size: Codes per element, `k` (`2**num_rounds`, or 2).
        grid_size: Height and width of the latent grid.
        depth: Number of blocks.
        width: Width of the tokens; a multiple of 4 and of `num_heads`.
        num_heads: Attention heads; the head width is a multiple of 4.
        bottleneck: Width between the two linear layers of the code embedding.
        num_classes: Classes without the null class, which gets the index behind the last one.
        num_context_tokens: Tokens that carry the class in front of the sequence.
        context_start: Index of the first block that sees the context tokens.
        attention_dropout: Dropout rate on attention weights, in the middle blocks only.
        projection_dropout: Dropout rate on attention results and in the feed-forward layers, idem.
    """

    num_elements: int
    alphabet_size: int
    grid_size: tuple[int, int] = (16, 16)
    depth: int
    width: int
    num_heads: int
    bottleneck: int
    num_classes: int = 1000
    num_context_tokens: int = 32
    context_start: int
    attention_dropout: float = 0.0
    projection_dropout: float = 0.0

    def __post_init__(self) -> None:
        issues = []
        if self.alphabet_size < 2:
            issues.append(f"alphabet_size must be at least 2, got {self.alphabet_size}")
        if self.width % (4 * self.num_heads):
            issues.append(
                f"width must be a multiple of 4 * num_heads = {4 * self.num_heads} "
                f"(two rotated axes of channel pairs), got {self.width}"
            )
        if not 0 <= self.context_start < self.depth:
            issues.append(
                f"context_start must be in [0, depth) = [0, {self.depth}), got {self.context_start}"
            )
        if self.num_context_tokens < 1:
            issues.append(f"num_context_tokens must be at least 1, got {self.num_context_tokens}")
        if issues:
            raise ValueError("GRNClassConfig: " + "; ".join(issues) + ".")

    @property
    def mlp_width(self) -> int:
        """Width of the gated product: two thirds of four times the width, rounded down."""
        return int(self.width * 4 * 2 / 3)


class BottleneckEmbedding(nn.Module):
    """Codes `(b, c, h, w)` to tokens `(b, h w, d)` through a narrow linear layer without bias."""

    def __init__(self, config: GRNClassConfig) -> None:
        super().__init__()
        self.proj1 = CodeEmbedding(
            config.num_elements, config.alphabet_size, config.bottleneck, order="class"
        )
        self.proj2 = PointwiseConv(config.bottleneck, config.width)

    def forward(self, codes: Tensor) -> Tensor:
        """Embed `codes`; tokens in row-major order."""
        return self.proj2(self.proj1(codes).flatten(1, 2))


class PointwiseConv(LinearFP32):
    """A linear layer whose weight keeps the shape `(d, e, 1, 1)` of a pointwise convolution."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(self.weight.detach()[..., None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `(..., e)` to float32 `(..., d)`."""
        with full_precision(x.device):
            return nn.functional.linear(
                x.float(), self.weight.float().flatten(1), self.bias.float()
            )


class Block(nn.Module):
    """Attention and feed-forward branches, each shifted, scaled and gated by the condition."""

    def __init__(
        self, config: GRNClassConfig, *, attention_dropout: float, projection_dropout: float
    ) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.width)
        self.attn = FusedAttention(
            config.width,
            config.num_heads,
            attention_dropout=attention_dropout,
            projection_dropout=projection_dropout,
        )
        self.norm2 = RMSNorm(config.width)
        self.mlp = SwiGLU(config.width, config.mlp_width, dropout=projection_dropout)
        self.adaLN_modulation = Modulation(config.width, 6)

    def forward(self, x: Tensor, c: Tensor, rotary: Rotary) -> Tensor:
        """Refine tokens `x` `(b, l, d)` given the conditioning vector `c` `(b, d)`."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)
        x = x + gate_a * self.attn(modulate(self.norm1(x), shift_a, scale_a), rotary)
        return x + gate_m * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Modulated normalization and the map to `k c` logits per token, in float32."""

    def __init__(self, width: int, num_logits: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = LinearFP32(width, num_logits)
        self.adaLN_modulation = Modulation(width, 2, is_fp32=True)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map tokens `x` `(b, n, d)` to `(b, n, k c)`."""
        shift, scale = self.adaLN_modulation(c)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class GRNClass(nn.Module):
    """Class-conditional generator: `(codes, t, class_labels) -> logits`.

    Parameter names and shapes are those of the published checkpoints.

    Args:
        config: Sizes.
    """

    def __init__(self, config: GRNClassConfig) -> None:
        super().__init__()
        self.config = config
        height, width = config.grid_size
        self.x_embedder = BottleneckEmbedding(config)
        self.t_embedder = TimeEmbedding(config.width)
        self.y_embedder = LabelEmbedding(config.num_classes, config.width)
        self.pos_embed = nn.Parameter(
            torch.empty(1, height * width, config.width), requires_grad=False
        )
        self.in_context_posemb = nn.Parameter(
            torch.empty(1, config.num_context_tokens, config.width)
        )
        self.blocks = nn.ModuleList(self._block(i) for i in range(config.depth))
        self.final_layer = FinalLayer(config.width, config.alphabet_size * config.num_elements)
        self._tables = TableCache()
        self.init_weights()

    def _block(self, index: int) -> Block:
        """Build one block; only the middle half of the blocks drops anything."""
        quarter = self.config.depth // 4
        is_middle = quarter <= index < 3 * quarter
        return Block(
            self.config,
            attention_dropout=self.config.attention_dropout if is_middle else 0.0,
            projection_dropout=self.config.projection_dropout if is_middle else 0.0,
        )

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize every parameter as published.

        | parameter | start |
        |---|---|
        | linear layers and the code embedding | Xavier uniform of the flattened matrix; bias 0 |
        | class table, time embedding, `in_context_posemb` | normal, std 0.02 |
        | modulation layers, last linear layer | 0 |
        | normalization weights | 1 |
        | `pos_embed` | fixed 2-D sines and cosines |

        The first logits are therefore exactly 0 and the first loss is `ln k`.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, CodeEmbedding)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        time_weights = [p for p in self.t_embedder.parameters() if p.ndim == 2]
        class_table = self.y_embedder.embedding_table.weight
        for weight in (*time_weights, class_table, self.in_context_posemb):
            nn.init.normal_(weight, std=0.02)
        modulations = [m.linear for m in self.modules() if isinstance(m, Modulation)]
        for layer in (*modulations, self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.pos_embed.copy_(sincos_2d(*self.config.grid_size, self.config.width))

    def forward(self, codes: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        """Predict the logits of every element.

        Args:
            codes: Corrupted codes `(b, c, h, w)` in [0, k).
            t: Time `(b,)` in [0, 1]: 0 noise, 1 data.
            class_labels: `(b,)` in [0, num_classes]; `num_classes` is the null class.

        Returns:
            Logits `(b, c, h, w, k)`, float32.
        """
        self._check(codes)
        label = self.y_embedder(class_labels)  # (b, d)
        c = self.t_embedder(t) + label
        x = self.x_embedder(codes) + self.pos_embed.float()  # (b, n, d)
        rotary = self._rotary(0, codes.device)
        for i, block in enumerate(self.blocks):
            if i == self.config.context_start:
                x = torch.cat([label[:, None] + self.in_context_posemb.float(), x], dim=1)
                rotary = self._rotary(self.config.num_context_tokens, codes.device)
            x = block(x, c, rotary)
        logits = self.final_layer(x[:, self.config.num_context_tokens :], c)  # (b, n, k c)
        logits = logits.unflatten(-1, (self.config.alphabet_size, -1))  # class-major
        return logits.permute(0, 3, 1, 2).unflatten(2, self.config.grid_size)

    def null_condition(self, batch_size: int, device: torch.device | str) -> Tensor:
        """Return labels `(b,)` of the null class."""
        return torch.full((batch_size,), self.config.num_classes, device=device)

    def _check(self, codes: Tensor) -> None:
        expected = (self.config.num_elements, *self.config.grid_size)
        if tuple(codes.shape[1:]) != expected:
            raise ValueError(
                f"codes must be (b, {', '.join(map(str, expected))}), got {tuple(codes.shape)}; "
                "num_elements and grid_size of the generator must fit the tokenizer and the data."
            )

    def _rotary(self, num_context_tokens: int, device: torch.device) -> Rotary:
        return self._tables.get(
            (num_context_tokens, device), lambda: self._make_rotary(num_context_tokens, device)
        )

    def _make_rotary(self, num_context_tokens: int, device: torch.device) -> Rotary:
        """Tables `(num_context_tokens + n, e/2)`; context tokens are not rotated."""
        head_dim = self.config.width // self.config.num_heads
        context = torch.zeros(num_context_tokens, head_dim // 2)
        grid = rope_2d_class(*self.config.grid_size, head_dim=head_dim)
        rotary = join_rotary(Rotary(context + 1, context), grid)
        return Rotary(*(table.to(device) for table in rotary))
