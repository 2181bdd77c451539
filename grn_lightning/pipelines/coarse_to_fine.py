"""CoarseToFinePipeline: the two networks of coarse-to-fine prediction, joined to a tokenizer.

With `fine=None` the causal network draws the codes themselves: the plain autoregressive baseline.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from grn_lightning.models.coarse_split import CoarseSplit, MapSizes, leak_rate
from grn_lightning.models.code_transformer import CodeTransformer
from grn_lightning.models.hashes import weights_hash
from grn_lightning.models.stored_split import split_hash
from grn_lightning.models.text_encoder import TextEncoder
from grn_lightning.models.tokenizer import HBQTokenizer
from grn_lightning.models.vq_tokenizer import VQTokenizer
from grn_lightning.samplers.coarse_to_fine import CoarseToFineConfig, draw_fine, draw_raster

FineMask = Literal["none", "sample", "train+sample"]
"""Whether stage 2 is kept within the coarse map: never, when drawing, or in training as well."""


@dataclass(frozen=True)
class CoarseToFineCodes:
    """Codes that were drawn, and what they cost."""

    codes: Tensor
    """`(b, c, h, w)` long: codes of the tokenizer."""
    coarse: Tensor
    """`(b, c_1, h, w)` long: what stage 1 drew; of the baseline, the codes."""
    num_steps: int
    """Sequential steps: positions, and one for stage 2."""
    num_rows: int
    """Samples in all calls of both networks, twice as many where guided."""
    leak_rate: Tensor
    """`(b,)` share of positions where stage 2 contradicts stage 1."""


@dataclass(frozen=True)
class CoarseToFineDrawn(CoarseToFineCodes):
    """The same, and what they show."""

    clips: Tensor
    """`(b, 3, 1, h, w)` in [-1, 1]."""


def code_sizes(tokenizer: HBQTokenizer | VQTokenizer) -> MapSizes:
    """Return channels and values of a tokenizer's codes."""
    return MapSizes(tokenizer.config.code_channels, tokenizer.config.alphabet_size)


def check_sizes(
    coarse: CodeTransformer,
    fine: CodeTransformer | None,
    split: CoarseSplit | None,
    codes: MapSizes,
) -> None:
    """Refuse networks that do not read and predict what the split makes of the codes.

    Raises:
        ValueError: If sizes differ, or one of stage 2 and split is missing.
    """
    if (fine is None) != (split is None):
        raise ValueError("a second stage needs a split, and a split a second stage.")
    if fine is not None and fine.config.sees_earlier:
        raise ValueError(
            "a stage 2 that sees earlier codes is a control for its likelihood and cannot draw; "
            "give one that was trained with `sees_earlier: false`."
        )
    wanted = [("the causal network", coarse, codes, codes)]
    if split is not None and fine is not None:
        first, second = split.coarse_sizes, split.fine_sizes
        wanted = [("stage 1", coarse, first, first), ("stage 2", fine, first, second)]
    for name, network, reads, predicts in wanted:
        c = network.config
        found = (c.input_channels, c.input_size), (c.output_channels, c.output_size)
        if found != (reads, predicts):
            raise ValueError(
                f"{name} must read {tuple(reads)} and predict {tuple(predicts)} (channels, "
                f"values), got {found[0]} and {found[1]}; the split must be the one of training."
            )


@dataclass(eq=False)
class CoarseToFinePipeline:
    """Draws pictures with networks that are trained, used in the mode in which they are left.

    Raises:
        ValueError: If the networks do not fit one another.
    """

    coarse: CodeTransformer
    """Causal: stage 1, or the baseline."""
    tokenizer: HBQTokenizer | VQTokenizer
    """Whose codes are drawn."""
    fine: CodeTransformer | None = None
    """Bidirectional: stage 2."""
    split: CoarseSplit | None = None
    """What is coarse and what is fine."""
    text_encoder: TextEncoder | None = None
    """Reads captions; None for classes."""
    sampling: CoarseToFineConfig = field(default_factory=CoarseToFineConfig)
    """How labels are drawn where nothing else is asked for."""
    fine_mask: FineMask = "train+sample"
    """Whether draws of stage 2 are kept within the coarse map."""

    def __post_init__(self) -> None:
        """Look that the parts fit."""
        check_sizes(self.coarse, self.fine, self.split, code_sizes(self.tokenizer))

    @property
    def is_text(self) -> bool:
        """Whether it draws from captions; else from classes."""
        return self.coarse.config.text_channels > 0

    @property
    def device(self) -> torch.device:
        """Where the causal network is."""
        return next(self.coarse.parameters()).device

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes of the weights of its parts, by name, and of what else decides a draw."""
        parts = {
            "coarse": self.coarse,
            "fine": self.fine,
            "tokenizer": self.tokenizer,
            "text_encoder": self.text_encoder,
        }
        hashes = {name: weights_hash(part) for name, part in parts.items() if part is not None}
        if self.split is not None:
            hashes["split"] = split_hash(self.split)
            hashes["fine_mask"] = "none" if self.fine_mask == "none" else "sample"
        return hashes

    def to(self, device: torch.device | str) -> "CoarseToFinePipeline":
        """Move all parts, in place."""
        for part in (self.coarse, self.fine, self.tokenizer, self.text_encoder):
            if part is not None:
                part.to(device)
        return self

    @torch.no_grad()
    def tokenize(self, clips: Tensor) -> Tensor:
        """Map pictures `(b, 3, 1, h, w)` to codes `(b, c, h, w)`."""
        return self.tokenizer.tokenize(clips).squeeze(2)

    @torch.no_grad()
    def detokenize(self, codes: Tensor) -> Tensor:
        """Map codes `(b, c, h, w)` to pictures `(b, 3, 1, h, w)`, clamped to [-1, 1]."""
        return self.tokenizer.detokenize(codes.unsqueeze(2)).float().clamp(-1, 1)

    def decode_chunks(self, elements: Tensor) -> Iterator[Tensor]:
        """Yield all pictures of codes `(b, c, h, w)`; pipelines of clips yield frames."""
        yield self.detokenize(elements)

    def condition(self, batch: Mapping[str, Any]) -> Any:
        """Return what samples are drawn from: `class_labels`, or the features of `captions`."""
        if not self.is_text:
            return torch.as_tensor(batch["class_labels"], device=self.device)
        assert self.text_encoder is not None
        return self.text_encoder(
            self.text_encoder.tokenize(list(batch["captions"])).to(self.device)
        )

    def null_condition(self, batch_size: int) -> Any:
        """Return what guidance steers away from: the null class, or the empty caption."""
        if self.is_text:
            return self.condition({"captions": [""] * batch_size})
        return torch.full((batch_size,), self.coarse.config.num_classes, device=self.device)

    def draw(self, condition: Any, sample_index: Tensor, **options: Any) -> CoarseToFineDrawn:
        """Draw one picture per row of a condition; see `draw_codes` for the options."""
        drawn = self.draw_codes(condition, sample_index, **options)
        return CoarseToFineDrawn(**vars(drawn), clips=self.detokenize(drawn.codes))

    @torch.no_grad()
    def draw_codes(
        self,
        condition: Any,
        sample_index: Tensor,
        *,
        config: CoarseToFineConfig | None = None,
        seed: int = 0,
        null_condition: Any | None = None,
    ) -> CoarseToFineCodes:
        """Draw the codes of one picture per row of a condition.

        Args:
            condition: From `condition`.
            sample_index: `(b,)` long: names the noise of each sample.
            config: How labels are drawn; `sampling` by default.
            seed: Seed of the job.
            null_condition: One row or `b`; by default the null class or the empty caption.

        Returns:
            Codes and costs.
        """
        config = self.sampling if config is None else config
        null = self.null_condition(1) if null_condition is None else null_condition
        given = {"condition": condition, "null_condition": null, "sample_index": sample_index}
        network = self.coarse.config
        result = draw_raster(
            self.coarse,
            (network.output_channels, *network.grid_size),
            config=config.coarse,
            seed=seed,
            **given,
        )
        codes, num_steps, num_rows = result.coarse, result.num_steps, result.num_rows
        leaks = torch.zeros(len(sample_index), device=codes.device)
        if self.fine is not None and self.split is not None:
            fine = draw_fine(
                self.fine,
                result.coarse,
                allowed=None if self.fine_mask == "none" else self.split.allowed(result.coarse),
                config=config.fine,
                seed=seed,
                **given,
            )
            codes, num_steps = self.split.join(result.coarse, fine), num_steps + 1
            num_rows += len(sample_index) * config.fine.fine_rows
            leaks = leak_rate(self.split, result.coarse, codes)
        return CoarseToFineCodes(
            codes=codes,
            coarse=result.coarse,
            num_steps=num_steps,
            num_rows=num_rows,
            leak_rate=leaks,
        )
