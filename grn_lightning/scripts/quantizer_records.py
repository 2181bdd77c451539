"""What `grn bench quantizers` trains and keeps: shared settings, arms, and a record of each."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

from grn_lightning.lit.optim import OptimConfig
from grn_lightning.lit.tokenizer import ReconstructionLossConfig
from grn_lightning.models.tokenizer import TokenizerConfig
from grn_lightning.nn.quantizers import QuantizerConfig, QuantizerName
from grn_lightning.scripts.bench_parts import RESULT_FILE, as_json, read_record

_SMALL = TokenizerConfig(
    latent_channels=12,
    num_rounds=4,
    encoder_width=16,
    decoder_width=16,
    width_multipliers=(1, 2, 2),
    num_res_blocks=1,
    temporal_downsample=(True, True),
    patch_size=4,
)
_OPTIM = OptimConfig(
    name="muon", lr=3e-3, warmup_samples=500, schedule="linear", decay_fraction=0.8
)


class Arm(NamedTuple):
    """One training of the bench."""

    name: str
    """Name of the arm."""
    num_rounds: int
    """Rounds that set the budget of bits, `num_rounds * latent_channels`."""
    seed: int
    """Seed of the weights and of the order of the data."""

    def folder(self, output: Path) -> Path:
        """Return where its files lie."""
        return output / self.name / f"m{self.num_rounds}" / f"seed{self.seed}"

    def __str__(self) -> str:
        """Return it as a person writes it."""
        return f"{self.name} M={self.num_rounds} seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class QuantizerBenchConfig:
    """What all arms share."""

    tokenizer: TokenizerConfig = _SMALL
    """Sizes; `latent_channels` is the budget of bits, with the rounds. `quantizer` is the arm's."""
    settings: dict[str, QuantizerConfig] = field(default_factory=dict)
    """Arms with settings of their own by name, such as `{fsq16: {name: fsq, num_levels: 16}}`."""
    loss: ReconstructionLossConfig = ReconstructionLossConfig(l1=0.0, l2=1.0)
    """Terms of the loss, but for those that a quantizer asks for."""
    optim: OptimConfig = _OPTIM
    """Optimizer and schedule."""
    max_steps: int = 400
    """Updates of each arm."""
    batch_size: int = 32
    """Samples per update."""
    image_size: int = 32
    """Height and width in pixels."""
    num_frames: int = 1
    """Frames of a clip; 1 for images, and for single frames of videos."""
    num_judged: int = 400
    """Held-out samples on which arms are judged, at most."""
    ema_decay: float = 0.98
    """Decay of the averaged weights, which are judged."""
    judge: Path | None = None
    """Judge of the embedded set for the Frechet distance; by default the one beside the data."""
    device: str = "auto"
    """ "auto", "cpu" or "cuda"."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        made = {
            name: QuantizerConfig(**value) if isinstance(value, dict) else value
            for name, value in self.settings.items()
        }
        object.__setattr__(self, "settings", made)
        for name in ("max_steps", "batch_size", "image_size", "num_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.num_judged < 2:
            raise ValueError(f"`num_judged` must be at least 2, got {self.num_judged}.")

    def quantizer(self, arm: str) -> QuantizerConfig:
        """Return the settings of an arm: those of its name, or the defaults of the quantizer.

        Raises:
            ValueError: If there is no such arm.
        """
        if arm in self.settings:
            return self.settings[arm]
        names: tuple[QuantizerName, ...] = get_args(QuantizerName)
        for name in names:
            if name == arm:
                return QuantizerConfig(name=name)
        raise ValueError(
            f"there is no arm {arm!r}; known are {', '.join(map(repr, [*names, *self.settings]))}. "
            "Others are described in `settings` of a configuration file."
        )

    def tokenizer_of(self, arm: Arm) -> TokenizerConfig:
        """Return the tokenizer of an arm with its budget of bits."""
        quantizer = self.quantizer(arm.name)
        return replace(self.tokenizer, num_rounds=arm.num_rounds, quantizer=quantizer)


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """What one training of one arm gave."""

    arm: str
    """Name of the arm."""
    num_rounds: int
    """Rounds that set the budget."""
    seed: int
    """Seed of the weights and of the order of the data."""
    latent_width: int
    """Channels of the latents."""
    code_channels: int
    """Codes per position; 0 without a quantizer."""
    alphabet_size: int
    """Values of a code."""
    bits_per_pixel: float | None
    """Bits of the codes over pixels; null without a quantizer."""
    psnr: float
    """In dB, mean over held-out frames."""
    ssim: float
    """Mean over held-out frames."""
    fid: float | None
    """Frechet distance of reconstructions to originals, features of the digits' judge."""
    psnr_by_rounds: dict[str, float]
    """PSNR of decoding 1, 2, ... rounds of the same latents, and "unquantized"."""
    usage: float | None
    """Share of the values that a code takes, mean over channels."""
    entropy: float | None
    """Entropy of a code over the largest possible, mean over channels."""
    alarms: list[str]
    """Signs of collapse."""
    step_milliseconds: float
    """Median time of an update, data included."""
    num_parameters: int
    """Of the network, codebooks included."""
    num_judged: int
    """Held-out frames or clips that were judged."""
    quantizer: dict[str, Any]
    """Settings of the quantizer."""
    shared: dict[str, Any]
    """Data, sizes and settings, which must be the same to be compared."""


def shared_facts(config: QuantizerBenchConfig, data: Path) -> dict[str, Any]:
    """Return what arms must have in common to be compared, as plain data."""
    plain = asdict(config)
    for name in ("settings", "judge", "device"):
        del plain[name]
    for name in ("quantizer", "num_rounds"):
        del plain["tokenizer"][name]
    return as_json(plain) | {"data": str(data)}


def read_result(folder: Path, arm: Arm) -> ArmResult | None:
    """Return the record of an arm, if it was finished.

    Raises:
        ValueError: If the file is none that this version has written.
    """
    return read_record(arm.folder(folder) / RESULT_FILE, ArmResult)
