"""A stage without weights or data, ready to take a step: what `grn plan` looks at.

Nothing is read from disk but, if it is there, the settings of the tokenizer. The stage's own
`training_step` runs, so that its memory is found and not described.
"""

import re
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grn_lightning.lit.generator import LitGenerator
from grn_lightning.lit.memory import LiveBytes, StepMemory, TracedStep, without_memory
from grn_lightning.lit.optim import OptimConfig, configure_optimizers
from grn_lightning.lit.parts import blocks_of, checkpoint_blocks
from grn_lightning.models.costs import num_parameters
from grn_lightning.models.grn_class import GRNClass, GRNClassConfig
from grn_lightning.models.grn_text import GRNText, TextCondition
from grn_lightning.models.text_encoder import TINY, UMT5, OpenClipTextEncoder, TextEncoder
from grn_lightning.models.tokenizer import TokenizerConfig
from grn_lightning.models.tokenizers import build_tokenizer
from grn_lightning.models.variants import TOKENIZERS

UMT5_BYTES = 2 * 5_680_910_336
"""Weights of UMT5-XXL's encoder in bfloat16."""

TEXT_TOKENS = 77
"""Tokens of a caption where nothing tells."""


@dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """What one device reads in one micro-batch."""

    samples: int
    """Pictures or clips."""
    size: tuple[int, int, int]
    """Frames, height and width in pixels."""
    is_coded: bool = False
    """Whether codes come from a cache; else the tokenizer makes them of pixels."""
    has_text_features: bool = False
    """Whether features of captions come from a cache."""
    text_tokens: int = TEXT_TOKENS
    """Tokens of a caption."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How a step is taken."""

    precision: str = "32-true"
    """As `trainer.precision` says it."""
    clip: float = 0.0
    """Largest norm of the gradients; 0 for any."""
    micro_batches: int = 1
    """`trainer.accumulate_grad_batches`."""
    has_average: bool = False
    """Whether an EMA callback runs."""
    is_checkpointed: bool = False
    """Activation checkpointing of every block."""


class Blocks(NamedTuple):
    """Units in which a strategy gathers weights, in bytes of float32."""

    largest: int
    """The largest block."""
    outside: int
    """Weights outside of blocks."""


class StandInEncoder(TextEncoder):
    """Features of captions from an encoder that is frozen, elsewhere, or not there yet.

    Args:
        channels: Width of the features.
        length: Tokens of every caption.
    """

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.channels, self.length = channels, length

    @property
    def text_channels(self) -> int:
        """Width of the features."""
        return self.channels

    @property
    def context_length(self) -> int:
        """Number of tokens of every caption."""
        return self.length

    def tokenize(self, captions: list[str]) -> Tensor:
        """Return tokens that say nothing."""
        return torch.ones(len(captions), self.length, dtype=torch.long)

    def forward(self, tokens: Tensor) -> TextCondition:
        """Return features that say nothing."""
        embeds = torch.zeros(*tokens.shape, self.channels)
        return TextCondition(embeds, torch.ones(tokens.shape, dtype=torch.bool))


def guess_tokenizer(num_elements: int, alphabet_size: int) -> tuple[str, TokenizerConfig]:
    """Return the tokenizer whose codes a generator of this kind learns.

    Args:
        num_elements: Elements per position.
        alphabet_size: Codes per element: 2 for bits of `num_rounds` rounds.
    """
    for name, config in TOKENIZERS.items():
        rounds = config.num_rounds
        bits = (config.latent_channels * rounds, 2)
        index = (config.latent_channels, 2**rounds)
        if (num_elements, alphabet_size) in (bits, index):
            return name, config
    near = TOKENIZERS["joint-64d"]
    channels = num_elements // near.num_rounds if alphabet_size == 2 else num_elements
    return "joint-64d with other channels", replace(near, latent_channels=max(1, channels))


class Rehearsal:
    """A generator stage as `trainer.fit` would build it, without contents.

    Args:
        settings: `init_args` of a `LitGenerator`, as plain data.
        tokenizer: Sizes of its tokenizer; None guesses them from the generator.

    Raises:
        ValueError: If the settings cannot be meant.
    """

    def __init__(self, settings: Mapping[str, Any], tokenizer: TokenizerConfig | None = None):
        self.settings = dict(settings) | {"init_from": None, "cache_codes": False}
        module = LitGenerator(**self.settings)
        self.config = module.generator_config
        self.text_config = module.text_config
        self.optim: OptimConfig = module.optim
        self.tokenizer_name, guessed = guess_tokenizer(
            self.config.num_elements, self.config.alphabet_size
        )
        self.tokenizer_config = guessed if tokenizer is None else tokenizer

    @property
    def is_text(self) -> bool:
        """Whether captions are learned from."""
        return not isinstance(self.config, GRNClassConfig)

    @property
    def has_trained_encoder(self) -> bool:
        """Whether the text encoder is trained along."""
        return self.text_config is not None and self.text_config.architecture == TINY

    @property
    def encoder_bytes(self) -> int:
        """Weights of a frozen text encoder that computes on the device; those of UMT5-XXL."""
        config = self.text_config
        is_here = config is not None and config.architecture == UMT5 and config.device != "cpu"
        return UMT5_BYTES if is_here else 0

    def _encoder(self, batch: BatchSizes) -> TextEncoder | None:
        if self.text_config is None:
            return None
        if self.has_trained_encoder:
            return OpenClipTextEncoder(self.text_config)
        assert not isinstance(self.config, GRNClassConfig)
        return StandInEncoder(self.config.text_channels, batch.text_tokens)

    def _put_networks(
        self, module: LitGenerator, batch: BatchSizes, *, is_checkpointed: bool = False
    ) -> None:
        """Give the stage new networks; to be called where tensors have no contents."""
        tokenizer = build_tokenizer(self.tokenizer_config).requires_grad_(False).eval()

        def adopt() -> None:
            object.__setattr__(module, "tokenizer", tokenizer)
            object.__setattr__(module, "tokenizer_hash", "none")

        tokenizer.__dict__["to"] = lambda *_: tokenizer  # it is where it should be
        module.__dict__["_adopt_tokenizer"] = adopt
        network = self._network()
        module.adopt(network, self._encoder(batch))
        if is_checkpointed:
            checkpoint_blocks(network)
        module.train()

    def batch(self, batch: BatchSizes) -> Any:
        """Return a batch without contents."""
        number = batch.samples
        made: dict[str, Any] = {
            "keys": [str(n) for n in range(number)],
            "sample_index": torch.zeros(number, dtype=torch.long),
            "weights": torch.ones(number),
        }
        if batch.is_coded:
            shape = self.tokenizer_config.latent_shape(*batch.size)
            made |= {"codes": torch.zeros(number, *shape, dtype=torch.long)}
            made |= {"tokenizer_hash": "none", "clip_size": batch.size}
        else:
            made["clips"] = torch.zeros(number, 3, *batch.size)
        if not self.is_text:
            return made | {"class_labels": torch.zeros(number, dtype=torch.long)}
        if batch.has_text_features:
            assert not isinstance(self.config, GRNClassConfig)
            channels = self.config.text_channels
            made["text_embeds"] = torch.zeros(number, batch.text_tokens, channels)
            made["text_mask"] = torch.ones(number, batch.text_tokens, dtype=torch.bool)
        return made | {"captions": ["a"] * number}

    def measure(
        self, sizes: BatchSizes, settings: StepSettings, *, for_real: bool = False
    ) -> StepMemory:
        """Take two steps and return what the second needs.

        Args:
            sizes: The micro-batch.
            settings: How a step is taken.
            for_real: Whether tensors have contents; else nothing is needed but patience.
        """
        module = LitGenerator(**self.settings)
        _detach_from_trainer(module)
        with LiveBytes() if for_real else without_memory() as live:
            self._put_networks(module, sizes, is_checkpointed=settings.is_checkpointed)
            parts = [part for name in module.averaged if (part := getattr(module, name, None))]
            trained = tuple(p for part in parts for p in part.parameters() if p.requires_grad)
            optimizer = configure_optimizers(
                module, self.optim, total_samples=1_000_000, samples_seen=lambda: 0
            )["optimizer"]
            step = TracedStep(
                module=module,
                frozen=(module.tokenizer,),
                optimizer=optimizer,
                loss_of=lambda number: module.training_step(self.batch(sizes), number),
                autocast=partial(_autocast, settings.precision),
                num_micro_batches=settings.micro_batches,
                averaged=trained if settings.has_average else (),
                clip=settings.clip,
            )
            found = step.measure(live)
        more = self.encoder_bytes
        return replace(
            found,
            frozen=found.frozen + more,
            compute=found.compute + more,
            update=found.update + more,
        )

    def time(self, sizes: BatchSizes, settings: StepSettings, *, steps: int = 3) -> float:
        """Take a few micro-batches for real, on the CPU, and return the seconds of the fastest.

        Args:
            sizes: The micro-batch; its codes and captions say nothing.
            settings: Precision.
            steps: How many are taken.
        """
        module = LitGenerator(**self.settings)
        _detach_from_trainer(module)
        self._put_networks(module, sizes)
        best = float("inf")
        for number in range(steps):
            batch = self.batch(sizes)
            start = time.perf_counter()
            with _autocast(settings.precision):
                loss = module.training_step(batch, number)
            loss.backward()
            best = min(best, time.perf_counter() - start)
            module.zero_grad()
        return best

    def blocks(self) -> Blocks:
        """Return the units in which strategies gather the network's weights."""
        with torch.device("meta"):
            network = self._network()
        sizes = [_bytes(block) for block in blocks_of(network)]
        return Blocks(largest=max(sizes), outside=_bytes(network) - sum(sizes))

    def _network(self) -> GRNText | GRNClass:
        if isinstance(self.config, GRNClassConfig):
            return GRNClass(self.config)
        return GRNText(self.config)

    def num_parameters(self) -> dict[str, int]:
        """Count the parameters of every network, by name."""
        with torch.device("meta"):
            sizes = BatchSizes(samples=1, size=(1, 1, 1))
            parts: dict[str, nn.Module] = {"generator": self._network()}
            if (encoder := self._encoder(sizes)) is not None:
                parts["text_encoder"] = encoder
            parts["tokenizer"] = build_tokenizer(self.tokenizer_config)
        return {name: num_parameters(part) for name, part in parts.items()}


def _bytes(network: nn.Module) -> int:
    return 4 * num_parameters(network)


def _autocast(precision: str) -> AbstractContextManager[Any]:
    """What Lightning puts around a step."""
    if re.match(r"(bf)?16-mixed", str(precision)):
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return nullcontext()


def _detach_from_trainer(module: LitGenerator) -> None:
    """Let the stage take a step without a trainer: nothing is logged, noise has no contents."""
    own = module.__dict__
    own["_trainer"] = SimpleNamespace(
        world_size=1, global_rank=0, global_step=0, log_every_n_steps=1, datamodule=None
    )
    own["log"] = own["_log_accuracy"] = own["_log_rounds"] = lambda *args, **kwargs: None
    own["_uniform"] = lambda index, stream, shape: torch.rand(len(index), *shape)
    own["_drop"] = lambda values, dropped: values
