"""What `grn bench generators` trains and keeps: shared settings, arms, and a record of each."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from grn_lightning.lit.generator import CorruptionConfig
from grn_lightning.lit.optim import OptimConfig
from grn_lightning.models.code_transformer import BackboneConfig
from grn_lightning.models.grn_class import GRNClassConfig
from grn_lightning.models.variants import GRN_CLASS
from grn_lightning.scripts.bench_parts import RESULT_FILE, as_json, read_record

TokenizerName = Literal["hbq", "vq"]


class Arm(NamedTuple):
    """One training of the bench."""

    name: str
    """Name of the arm."""
    seed: int
    """Seed of the weights, of the order of the data, and of what is drawn."""

    def folder(self, output: Path) -> Path:
        """Return where its files lie."""
        return output / self.name / f"seed{self.seed}"

    def __str__(self) -> str:
        """Return it as a person writes it."""
        return f"{self.name} seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class ArmPlan:
    """The networks of an arm: one causal, one causal and one parallel, or one that refines."""

    tokenizer: TokenizerName
    """Whose codes are learned."""
    raster: BackboneConfig | None = None
    """Causal network: the plain baseline, or stage 1."""
    fine: BackboneConfig | None = None
    """Bidirectional network, stage 2; None is the plain baseline."""
    coarse_rounds: int | None = None
    """Bits per channel that are coarse; None with a stage 2 means clusters of the codebook."""
    generator: GRNClassConfig | None = None
    """A GRN, in place of the other networks."""

    def __post_init__(self) -> None:
        """Build what a configuration file holds, and refuse what is no arm."""
        for name, kind in (
            ("raster", BackboneConfig),
            ("fine", BackboneConfig),
            ("generator", GRNClassConfig),
        ):
            value = getattr(self, name)
            if isinstance(value, dict):
                object.__setattr__(self, name, kind(**value))
        if (self.raster is None) == (self.generator is None):
            raise ValueError("ArmPlan: one of `raster` and `generator` must be given.")
        if self.fine is None and self.coarse_rounds is not None:
            raise ValueError("ArmPlan: `coarse_rounds` needs a stage 2, `fine`.")
        if self.fine is not None and self.raster is None:
            raise ValueError("ArmPlan: a stage 2, `fine`, needs a stage 1, `raster`.")
        if self.fine is not None and (self.coarse_rounds is None) != (self.tokenizer == "vq"):
            raise ValueError(
                "ArmPlan: a stage 2 has `coarse_rounds` with tokenizer 'hbq', and clusters of "
                f"codewords with 'vq'; got {self.coarse_rounds} and {self.tokenizer!r}."
            )

    @property
    def is_clustered(self) -> bool:
        """Whether clusters of codewords are coarse."""
        return self.fine is not None and self.coarse_rounds is None


def _backbone(depth: int, channel_depth: int = 0) -> BackboneConfig:
    return BackboneConfig(
        depth=depth, width=128, num_heads=4, channel_depth=channel_depth, dropout=0.0
    )


# Depths make the parameters of all arms about equal, tables of codewords included.
ARMS: dict[str, ArmPlan] = {
    "ar-vq": ArmPlan(tokenizer="vq", raster=_backbone(5)),
    "ctf-vq": ArmPlan(tokenizer="vq", raster=_backbone(3), fine=_backbone(4)),
    "ar-hbq": ArmPlan(tokenizer="hbq", raster=_backbone(7, channel_depth=2)),
    "ctf-hbq-m1": ArmPlan(
        tokenizer="hbq", raster=_backbone(4, channel_depth=2), fine=_backbone(3), coarse_rounds=1
    ),
    "ctf-hbq-m2": ArmPlan(
        tokenizer="hbq", raster=_backbone(4, channel_depth=2), fine=_backbone(3), coarse_rounds=2
    ),
    "grn": ArmPlan(tokenizer="hbq", generator=replace(GRN_CLASS["digits-c2i"], depth=7)),
}

_OPTIM = OptimConfig(
    name="muon",
    lr=3e-3,
    muon_lr=0.02,
    warmup_samples=3000,
    schedule="linear",
    decay_fraction=0.5,
)


@dataclass(frozen=True, kw_only=True)
class GeneratorBenchConfig:
    """What all arms share."""

    plans: dict[str, ArmPlan] = field(default_factory=dict)
    """Arms with networks of their own by name; they take the place of the ones of that name."""
    max_steps: int = 600
    """Updates of each arm, all its networks together."""
    batch_size: int = 64
    """Samples per update."""
    coarse_share: float = 0.5
    """Share of the updates that go to stage 1; the others go to stage 2."""
    num_clusters: int = 128
    """Clusters of codewords, for arms that have them."""
    optim: OptimConfig = _OPTIM
    """Optimizer and schedule of each network."""
    ema_decay: float = 0.98
    """Decay of the averaged weights, which are judged."""
    condition_dropout: float = 0.1
    """Share of samples that train the unconditional branch."""
    corruption: CorruptionConfig = CorruptionConfig(time_mean=-0.8, time_std=1.0)
    """Times of the GRN's training; its `condition_dropout` is the one above."""
    num_steps: int = 16
    """Refinement steps of the GRN."""
    guidance_scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0)
    """Scales of which each arm takes the one with the smallest distance on pictures of another
    seed; CTF guides stage 1 only."""
    num_tried: int = 400
    """Pictures that are drawn at each scale to choose it."""
    num_drawn: int = 1000
    """Pictures that are drawn and judged at the chosen scale."""
    num_held_out: int = 400
    """Held-out pictures: for likelihoods, and the other side of the Frechet distance."""
    image_size: int = 32
    """Height and width in pixels."""
    num_classes: int = 10
    """Classes of the data."""
    judge: Path | None = None
    """Judge of the embedded set; by default the one beside the data."""
    device: str = "auto"
    """ "auto", "cpu" or "cuda"."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        made = {
            name: ArmPlan(**value) if isinstance(value, dict) else value
            for name, value in self.plans.items()
        }
        object.__setattr__(self, "plans", made)
        object.__setattr__(self, "guidance_scales", tuple(self.guidance_scales))
        for name in ("batch_size", "num_clusters", "num_steps", "image_size", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("max_steps", "num_tried", "num_drawn", "num_held_out"):
            if getattr(self, name) < 2:
                raise ValueError(f"`{name}` must be at least 2, got {getattr(self, name)}.")
        if not 0 < self.coarse_share < 1:
            raise ValueError(f"`coarse_share` must be in (0, 1), got {self.coarse_share}.")
        if not self.guidance_scales or min(self.guidance_scales) < 0:
            raise ValueError(
                f"`guidance_scales` must hold scales of at least 0, got {self.guidance_scales}."
            )

    def plan(self, arm: str) -> ArmPlan:
        """Return the networks of an arm.

        Raises:
            ValueError: If there is no such arm.
        """
        plans = ARMS | self.plans
        if arm not in plans:
            raise ValueError(
                f"there is no arm {arm!r}; known are {', '.join(map(repr, plans))}. "
                "Others are described in `plans` of a configuration file."
            )
        return plans[arm]

    def steps_of(self, arm: str) -> tuple[int, ...]:
        """Return the updates of each network of an arm; their sum is `max_steps`."""
        if self.plan(arm).fine is None:
            return (self.max_steps,)
        coarse = min(max(1, round(self.max_steps * self.coarse_share)), self.max_steps - 1)
        return coarse, self.max_steps - coarse


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What the judge says of a set of pictures."""

    fid: float
    """Frechet distance to the held-out pictures, features of the digits' judge."""
    accuracy: float
    """Share in which the judge reads the digit of the class."""
    num_pictures: int
    """How many were judged."""
    guidance_scale: float | None = None
    """Scale at which they were drawn; null of pictures that were not."""


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """What one training of one arm gave."""

    arm: str
    """Name of the arm."""
    seed: int
    """Seed of the weights, of the order of the data, and of what is drawn."""
    num_samples: list[int]
    """Samples that each of its networks was trained on."""
    num_parameters: list[int]
    """Trained parameters of each of its networks."""
    train_seconds: list[float]
    """Time of each training, data included; on a CPU that of the process."""
    bits: float | None
    """Held-out bits of the codes of a picture, without guidance; null where not defined."""
    coarse_bits: float | None
    """Those of stage 1; null without a stage 2."""
    code_bits: float
    """Bits of the codes of a picture as they are stored."""
    judged: Judged
    """Pictures at the chosen scale."""
    tried: list[Judged]
    """Pictures of another seed at every scale, from which it was chosen."""
    reconstructed: Judged
    """Held-out pictures after the tokenizer, the bound of all arms on it."""
    real: Judged
    """As many training pictures as were drawn: the distance of a perfect arm."""
    draw_seconds: float
    """Time of a picture, decoding included, batches of `batch_size`, at the chosen scale."""
    decode_seconds: float
    """Share of decoding in it."""
    num_forwards: int
    """Sequential forwards of a transformer to a picture."""
    num_head_calls: int
    """Sequential calls of the head over channels besides; 0 without one."""
    tokenizer_hash: str
    """Hash of the tokenizer's weights."""
    plan: dict[str, Any]
    """Its networks."""
    shared: dict[str, Any]
    """Data and settings, which must be the same to be compared."""

    def __post_init__(self) -> None:
        """Build what JSON holds."""
        for name in ("judged", "reconstructed", "real"):
            value = getattr(self, name)
            if isinstance(value, dict):
                object.__setattr__(self, name, Judged(**value))
        tried = [Judged(**v) if isinstance(v, dict) else v for v in self.tried]
        object.__setattr__(self, "tried", tried)

    @property
    def codes_seconds(self) -> float:
        """Time of drawing the codes of a picture, without decoding."""
        return self.draw_seconds - self.decode_seconds


def shared_facts(config: GeneratorBenchConfig, data: Path) -> dict[str, Any]:
    """Return what arms must have in common to be compared, as plain data."""
    plain = asdict(config)
    for name in ("plans", "judge", "device"):
        del plain[name]
    return as_json(plain) | {"data": str(data)}


def complete(facts: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Add settings that a record lacks: they came later, and had their defaults until then."""
    found = dict(usual) | dict(facts)
    for name, value in usual.items():
        if isinstance(value, dict) and isinstance(found[name], dict):
            found[name] = complete(found[name], value)
    return found


def plan_facts(plan: ArmPlan) -> dict[str, Any]:
    """Return the networks of an arm as plain data."""
    return as_json(asdict(plan))


def read_result(folder: Path, arm: Arm) -> ArmResult | None:
    """Return the record of an arm, if it was finished.

    Raises:
        ValueError: If the file is none that this version has written.
    """
    return read_record(arm.folder(folder) / RESULT_FILE, ArmResult)
