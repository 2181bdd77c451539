"""Checks before the first step: what would otherwise be found out after days of training.

A generator can learn perfectly and still draw noise: because its codes went through a cache with
the bits in another order, because its tokenizer is not the one at hand, because the sampler asks
another question than training did. Every check here runs the real path on a few samples and costs
a fraction of a second on small models. `grn check` shows the table; `Preflight` runs it in `fit`.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from torch import Tensor, nn

from grn_lightning.datasets.codes import CodeFacts, check_hash, decode_codes, encode_codes
from grn_lightning.datasets.documents import PackedBatch, first_document, is_pack
from grn_lightning.functional import codes_to_elements, elements_to_codes, visual_rotary
from grn_lightning.functional.rope import NUM_TEXT_POSITIONS
from grn_lightning.lit.code_stage import CodeStage
from grn_lightning.lit.generator import LitGenerator
from grn_lightning.lit.tokenizer import LitTokenizer
from grn_lightning.models.grn_class import GRNClassConfig
from grn_lightning.models.grn_text import GRNTextConfig
from grn_lightning.nn.mlp import full_precision
from grn_lightning.samplers import RefineConfig

LOG = logging.getLogger("lightning.pytorch.grn_lightning")

CHECKED_STAGES = (LitTokenizer, CodeStage)
MIN_PSNR = 15.0
"""Reconstructions below look like nothing; a trained tokenizer is far above."""
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-5}
"""Share of the scale by which two orders of summation may differ; other types 0.05."""


class Status(StrEnum):
    """How a check went, from good to bad."""

    OK = "ok"
    SKIPPED = "skipped"
    NOTE = "note"
    WRONG = "WRONG"


_SEVERITY = list(Status)


class Finding(NamedTuple):
    """What one check has found."""

    name: str
    status: Status
    text: str
    """What was seen; if wrong, also what to do."""


@dataclass(frozen=True)
class CheckReport:
    """All findings."""

    findings: tuple[Finding, ...]
    seconds: float

    @property
    def is_fine(self) -> bool:
        """Whether nothing is wrong; notes are."""
        return all(finding.status is not Status.WRONG for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """What the command ends with."""
        return 0 if self.is_fine else 1

    def __str__(self) -> str:
        """Return the table and a last line."""
        width = max(len(finding.name) for finding in self.findings)
        rows = [f"{f.name:<{width}}  {f.status:<7}  {f.text}" for f in self.findings]
        num_wrong = sum(finding.status is Status.WRONG for finding in self.findings)
        verdict = "nothing is wrong" if self.is_fine else f"{num_wrong} wrong"
        return "\n".join([*rows, f"{len(rows)} checks in {self.seconds:.1f} s: {verdict}"])


@dataclass(frozen=True)
class Subject:
    """What is checked: a module with its networks, and a few samples of a batch."""

    module: LitTokenizer | CodeStage
    batch: Mapping[str, Any]
    can_forward: bool = True
    """Whether the networks can be called here; not while a strategy has cut them into pieces."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of any family, on the device of the module."""
        return self.module.tokenizer.to(self.module.device)

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width in pixels."""
        if "clips" in self.batch:
            frames, height, width = self.batch["clips"].shape[2:]
            return frames, height, width
        frames, height, width = self.batch["clip_size"]
        return frames, height, width


class Outcome(NamedTuple):
    """What a check returns if nothing is wrong; what is wrong it raises as a `ValueError`."""

    status: Status
    text: str


Check = Callable[[Subject], Outcome]


def _ok(text: str) -> Outcome:
    return Outcome(Status.OK, text)


def _skip(text: str) -> Outcome:
    return Outcome(Status.SKIPPED, text)


# --- the data -------------------------------------------------------------------------------------


def check_pixels(subject: Subject) -> Outcome:
    """Clips are float in [-1, 1]."""
    if "clips" not in subject.batch:
        return _skip("the batch has cached codes")
    clips = subject.batch["clips"]
    if not clips.is_floating_point():
        raise ValueError(f"clips must be float in [-1, 1], got {clips.dtype}; scale them.")
    low, high = clips.min().item(), clips.max().item()
    if not -1.001 <= low <= high <= 1.001:
        raise ValueError(f"pixels must be in [-1, 1], got [{low:.2f}, {high:.2f}]; scale them.")
    text = f"{len(clips)} clips, pixels in [{low:.2f}, {high:.2f}]"
    if low >= 0:
        return Outcome(Status.NOTE, f"{text}: none is darker than grey; are they in [0, 1]?")
    return _ok(text)


def check_size(subject: Subject) -> Outcome:
    """Frames, height and width fit the tokenizer's strides and the generator's grid."""
    grid = subject.tokenizer.config.latent_shape(*subject.size)[1:]
    text = f"{' x '.join(map(str, subject.size))} pixels, {' x '.join(map(str, grid))} positions"
    config = getattr(subject.module, "generator_config", None)
    if isinstance(config, GRNClassConfig) and (1, *config.grid_size) != grid:
        raise ValueError(
            f"`generator.grid_size` must be the {grid[1]} x {grid[2]} positions of one frame of "
            f"the data, got {config.grid_size} for {text}; change it, or `data.image_size`."
        )
    if isinstance(config, GRNTextConfig):
        template = config.aspect_template
        visual_rotary(*grid, head_dim=config.head_dim, aspect_template=template)
    return _ok(text)


def check_condition(subject: Subject) -> Outcome:
    """Every sample has the class or caption that the generator learns from."""
    module, batch = subject.module, subject.batch
    if not isinstance(module, CodeStage):
        return _skip("a tokenizer needs none")
    if module.is_text:
        module.condition(batch)
        return _ok("captions" if "captions" in batch else "text features")
    if "class_labels" in batch:
        labels, number = batch["class_labels"], module.null_class
        if not 0 <= labels.min() <= labels.max() < number:
            raise ValueError(
                f"`class_labels` must be in [0, {number}), got {labels.min()}..{labels.max()}; "
                "set `num_classes` of the model to the number of classes of the data."
            )
    module.condition(batch)
    return _ok(f"classes below {module.null_class}")


def check_text_length(subject: Subject) -> Outcome:
    """The encoder's tokens fit the generator's positions, and captions are not cut."""
    module = subject.module
    if not isinstance(module, CodeStage) or not module.is_text:
        return _skip("no captions")
    length = module.text_encoder.context_length
    if length > NUM_TEXT_POSITIONS:
        raise ValueError(
            f"`text_encoder.context_length` must be at most {NUM_TEXT_POSITIONS}, the positions "
            f"before the time token, got {length}."
        )
    if not {"captions", "text_mask"} & set(subject.batch):
        return _skip("no captions")
    if "captions" not in subject.batch:
        return _ok(f"at most {subject.batch['text_mask'].shape[1]} tokens")
    captions = list(subject.batch["captions"])
    mask = module.condition({"captions": captions}).mask
    num_full = int(mask.all(dim=1).sum())
    if num_full:
        return Outcome(
            Status.NOTE,
            f"{num_full} of {len(captions)} captions fill all {length} tokens: longer ones are "
            "cut; raise `text_encoder.context_length` if it matters",
        )
    return _ok(f"up to {int(mask.sum(dim=1).max())} of {length} tokens")


# --- codes ----------------------------------------------------------------------------------------


def _codes(subject: Subject) -> Tensor:
    """Codes `(b, d, f', h', w')` of the batch, made now or read from the cache."""
    if "codes" in subject.batch:
        return subject.batch["codes"]
    return subject.tokenizer.tokenize(subject.batch["clips"])


def check_tokenizer_hash(subject: Subject) -> Outcome:
    """Cached codes were made by the tokenizer at hand."""
    module = subject.module
    if not isinstance(module, CodeStage):
        return _skip("it is the one that is trained")
    if "tokenizer_hash" in subject.batch:
        check_hash(subject.batch["tokenizer_hash"], module.tokenizer_hash)
        return _ok(f"{module.tokenizer_hash}, which has made the cached codes")
    return _ok(module.tokenizer_hash)


def check_code_format(subject: Subject) -> Outcome:
    """Codes survive the packed format of code shards; reconstructions resemble the clips."""
    tokenizer = subject.tokenizer
    config = tokenizer.config
    if not config.has_codes:
        return _skip(f"quantizer {config.quantizer.name!r} has no codes")
    codes, text = _codes(subject), "not packed"
    if config.has_rounds:
        text = "packed and unpacked"
        facts = CodeFacts(
            tokenizer_hash=getattr(subject.module, "tokenizer_hash", ""),
            num_rounds=config.num_rounds,
            latent_channels=codes.shape[1],
            grid=tuple(codes.shape[2:]),  # type: ignore[arg-type]
            size=subject.size,
        )
        for row in codes.cpu():
            if not decode_codes(*encode_codes(row, facts))[0].equal(row):
                raise ValueError(
                    "codes that were packed and unpacked are others: codes cached in shards would "
                    "be worthless; report it with the configuration of the tokenizer."
                )
    if "clips" not in subject.batch:
        return _ok(f"{text}; no clips to compare with")
    clips = subject.batch["clips"]
    error = (tokenizer.detokenize(codes).float().clamp(-1, 1) - clips).square().mean()
    psnr = (10 * (4 / error.clamp_min(1e-10)).log10()).item()
    text = f"{text}; PSNR of the reconstruction {psnr:.1f} dB"
    if isinstance(subject.module, CodeStage) and psnr < MIN_PSNR:
        return Outcome(Status.NOTE, f"{text}: is the tokenizer trained, and on such data?")
    return _ok(text)


def check_bit_order(subject: Subject) -> Outcome:
    """The generator's elements are the codes: bits round by round, most significant first."""
    module, config = subject.module, subject.tokenizer.config
    if config.quantizer.name != "hbq":
        return _skip(f"quantizer {config.quantizer.name!r} has no bits")
    codes, rounds = _codes(subject), config.num_rounds
    target, elements = "bit", codes_to_elements(codes, num_rounds=rounds, target="bit")
    if isinstance(module, LitGenerator):
        target, elements = module.target, module._elements(subject.batch)  # type: ignore[arg-type]
        elements = elements if module.is_text else elements.unsqueeze(2)
    advice = (
        "the generator would learn another meaning than `dequantize` decodes; codes, elements and "
        "weights must agree on bits [round, channel], most significant first."
    )
    if not elements_to_codes(elements, num_rounds=rounds, target=target).equal(codes):
        raise ValueError(f"the generator's elements are not the codes of the tokenizer: {advice}")
    if target == "index":
        values = (2 * elements + 1) / 2**rounds - 1
    else:
        bits = elements.unflatten(1, (rounds, -1)) * 2 - 1  # (b, m, d, f', h', w')
        halves = 0.5 ** torch.arange(1, rounds + 1, device=bits.device)
        values = (bits * halves[:, None, None, None, None]).sum(1)
    z_hat = subject.tokenizer.dequantize(codes).float()
    if not torch.allclose(
        values.float(), z_hat, atol=1e-6 if z_hat.dtype == torch.float32 else 1e-2
    ):
        raise ValueError(f"bits do not add up to the latents that the decoder reads: {advice}")
    if "clips" in subject.batch:
        with full_precision(codes.device):
            z = subject.tokenizer.encode(subject.batch["clips"].to(z_hat))
        distance = (z.float() - z_hat).abs().max().item()
        if distance > 2.0**-rounds * 1.01:
            raise ValueError(
                f"codes are {distance:.3f} away from the latents, more than half a bin: {advice}"
            )
    return _ok(f"{elements.shape[1]} elements of {target} per position")


def check_streaming(subject: Subject) -> Outcome:
    """A clip encoded and decoded chunk by chunk is the clip encoded and decoded at once."""
    if "clips" not in subject.batch or subject.size[0] == 1:
        return _skip("one frame" if "clips" in subject.batch else "the batch has cached codes")
    tokenizer, clips = subject.tokenizer, subject.batch["clips"][:1]
    clips = clips.to(next(tokenizer.parameters()))
    z = tokenizer.encode(clips)
    pairs = [
        ("encoded", tokenizer.encode_streaming(clips), z),
        ("decoded", tokenizer.decode_streaming(z), tokenizer.decode(z)),
    ]
    for what, streamed, whole in pairs:
        if (difference := _difference(streamed, whole)) > _tolerance(whole.dtype):
            raise ValueError(
                f"a clip {what} chunk by chunk differs by {difference:.1e} of its scale from the "
                "whole: a layer does not remember what it should; report it."
            )
    return _ok(f"{subject.size[0]} frames")


# --- sampling -------------------------------------------------------------------------------------


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the scale."""
    scale = expected.abs().max().clamp_min(1e-12)
    return ((found - expected).abs().max() / scale).item()


def _tolerance(dtype: torch.dtype) -> float:
    return ROUNDING.get(dtype, 0.05)


class _Call(NamedTuple):
    codes: Tensor
    t: Tensor
    logits: Tensor


@contextmanager
def _recorded(generator: nn.Module) -> Iterator[list[_Call]]:
    """Note what a generator is asked and what it answers."""
    calls: list[_Call] = []
    hook = generator.register_forward_hook(
        lambda _, arguments, logits: calls.append(_Call(arguments[0], arguments[1], logits))
    )
    try:
        yield calls
    finally:
        hook.remove()


def check_sampler(subject: Subject) -> Outcome:
    """The sampler gets the logits that training gives, for the same codes, times and conditions.

    Two steps of the real sampler with guidance, text cache included; each of its calls is repeated
    with the condition that training makes of the same samples, dropped in the second half.
    """
    module, batch = subject.module, subject.batch
    if not isinstance(module, LitGenerator):
        return _skip("not a refining generator")
    field = "captions" if module.is_text else "class_labels"
    pipeline = module.pipeline
    condition = pipeline.condition(batch) if field in batch else module.condition(batch)
    number = len(batch["sample_index"])
    with _recorded(module.generator) as calls:
        pipeline.sample(
            condition,
            batch["sample_index"],
            grid=pipeline.latent_grid(*subject.size),
            config=RefineConfig(num_steps=2, guidance_scale=2.0),
            seed=module.seed,
        )
    dropped = torch.arange(2 * number, device=module.device) >= number
    trained = module.condition(_twice(batch, number), dropped)
    worst = 0.0
    for call in calls:
        if len(call.codes) != 2 * number:
            raise ValueError(
                f"the sampler asked for {len(call.codes)} rows where {2 * number}, both branches "
                "of every sample, are due; report it."
            )
        expected = module.generator(call.codes, call.t, trained)
        worst = max(worst, _difference(call.logits, expected))
    if not worst <= _tolerance(next(module.generator.parameters()).dtype):
        raise ValueError(
            f"the sampler's logits differ from those of training by {worst:.1e} of their scale: "
            "samples would not show what was learned. The condition, the null condition or the "
            "text cache is another one; cached text features must come from this text encoder."
        )
    return _ok(f"{len(calls)} steps, logits within {worst:.0e} of their scale")


def _twice(batch: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Repeat the rows of a batch once."""

    def repeat(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.cat([value, value])
        return value + value if isinstance(value, list) and len(value) == number else value

    return {name: repeat(value) for name, value in batch.items()}


# --- all of it ------------------------------------------------------------------------------------

CHECKS: dict[str, Check] = {
    "pixels": check_pixels,
    "size": check_size,
    "condition": check_condition,
    "text length": check_text_length,
    "tokenizer": check_tokenizer_hash,
    "code format": check_code_format,
    "bit order": check_bit_order,
    "streaming": check_streaming,
    "sampler": check_sampler,
}


WITHOUT_NETWORKS = ("pixels", "size", "tokenizer")
"""What can be checked while a strategy has cut the networks into pieces."""


FIRST = ("size", "condition")
"""What the networks cannot be called without."""


def first_samples(batch: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return the first samples of a batch; what belongs to the whole batch stays as it is."""
    size = len(batch["sample_index"])

    def cut(value: Any) -> Any:
        has_rows = isinstance(value, (Tensor, list)) and len(value) == size
        return value[:number] if has_rows else value

    return {name: cut(value) for name, value in batch.items()}


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random numbers are as before afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        for part, is_training in modes:
            part.training = is_training


def check_module(
    module: L.LightningModule,
    batch: Mapping[str, Any],
    *,
    num_samples: int = 2,
    can_forward: bool = True,
) -> CheckReport:
    """Run every check on the first samples of a batch.

    Args:
        module: A stage with its networks built.
        batch: Of its data module, on its device.
        num_samples: How many samples.
        can_forward: Whether its networks can be called as they are.

    Returns:
        The findings; nothing is raised for what is wrong with the user's data or settings.

    Raises:
        ValueError: If the module is of another kind.
    """
    if not isinstance(module, CHECKED_STAGES):
        raise ValueError(
            f"only tokenizers and generators can be checked, got {type(module).__name__}."
        )
    start = time.perf_counter()
    if is_pack(batch) and isinstance(module, LitGenerator):
        batch = cast(Mapping[str, Any], first_document(cast(PackedBatch, batch), module.strides))
    subject = Subject(module, first_samples(batch, num_samples), can_forward)
    with _undisturbed(module), full_precision(module.device):
        findings: list[Finding] = []
        for name, check in CHECKS.items():
            findings.append(_run(name, check, subject, findings))
    return CheckReport(tuple(findings), time.perf_counter() - start)


def _run(name: str, check: Check, subject: Subject, before: list[Finding]) -> Finding:
    wrong = [f.name for f in before if f.name in FIRST and f.status is Status.WRONG]
    if wrong and name not in (*FIRST, *WITHOUT_NETWORKS):
        return Finding(name, *_skip(f"until the {wrong[0]} is right"))
    if not subject.can_forward and name not in WITHOUT_NETWORKS:
        return Finding(name, *_skip("the strategy has cut the networks into pieces"))
    try:
        return Finding(name, *check(subject))
    except ValueError as error:
        return Finding(name, Status.WRONG, str(error))


def merge_reports(reports: Sequence[CheckReport]) -> CheckReport:
    """Join the reports of several batches: of every check the worst finding."""
    by_name: dict[str, Finding] = {}
    for finding in (finding for report in reports for finding in report.findings):
        known = by_name.get(finding.name)
        if known is None or _SEVERITY.index(finding.status) > _SEVERITY.index(known.status):
            by_name[finding.name] = finding
    return CheckReport(tuple(by_name.values()), sum(report.seconds for report in reports))
