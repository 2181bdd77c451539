"""What a number was measured with: numbers of different protocols are not comparable.

The same samples give FIDs that are several points apart, depending on how floats became bytes, how
pictures were scaled to the size of the network, which weights read them, on how many samples. So a
`Protocol` says all that, two of them tell how they differ, and a `Measurement`, which is what
judges return, has no other text than one with its protocol in front.

Three names have settled, all of the Inception of 2015-12-05:

    torch_fidelity  the evaluator of GRN, JiT, MAR: samples are rounded to bytes, scaled bilinearly
                    without antialiasing as TensorFlow 1 did; Inception score over 10 shuffled parts
    adm             the evaluator of ADM, used by DiT, VAR, LlamaGen: the same scaling; Inception
                    score over shuffled parts of 5000. It takes bytes, so every publication has
                    its own way to them: ADM and VAR truncate, as here; DiT and LlamaGen round
    clean           clean-fid: samples are rounded, scaled by the antialiased bicubic filter of PIL

Weights and scaling are the same for the first two, so one may be compared with reference statistics
of the other; `clean` stands alone.

ADM's evaluator takes the parts of an Inception score as samples lie in the file, and ADM draws its
classes at random. Of samples that are sorted by class, as here, such a part would hold a tenth of
the classes and score far lower; so they are shuffled first, as VAR does it too.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal, Self, get_args

Rounding = Literal["round", "truncate", "none"]
"""How samples become bytes: to the nearest level, to the one below, or not at all."""

Resize = Literal["tensorflow", "pil-bicubic", "bilinear", "open_clip", "none"]
"""How pictures reach the size of the network: bilinearly without antialiasing from the top left
corner as TensorFlow 1 did; by PIL's antialiased bicubic filter, without rounding after it;
bilinearly without antialiasing from the centres of pixels; by the transforms of open_clip; or not
at all."""

ScoreOrder = Literal["shuffled", "in order"]
"""How samples are spread over the parts of an Inception score."""

METRICS: Mapping[str, str] = MappingProxyType(
    {
        "fid": "FID",
        "sfid": "sFID",
        "is": "IS",
        "kid": "KID",
        "precision": "precision",
        "recall": "recall",
        "clip_score": "CLIP score",
        "fvd": "FVD",
        "rfid": "rFID",
        "rfvd": "rFVD",
        "psnr": "PSNR",
        "ssim": "SSIM",
        "lpips": "LPIPS",
    }
)
"""Metrics and how they are written; an "r" in front means reconstructions instead of samples."""


def metric_name(metric: str) -> str:
    """Return how a metric is written.

    Raises:
        ValueError: If there is no such metric.

    Example:
        >>> metric_name("sfid")
        'sFID'
    """
    if metric not in METRICS:
        raise ValueError(f"there is no metric {metric!r}; known are {', '.join(METRICS)}.")
    return METRICS[metric]


def short_count(count: int) -> str:
    """Return a number of samples as it is written in a tag.

    Example:
        >>> short_count(50_000), short_count(1234), short_count(200)
        ('50k', '1234', '200')
    """
    return f"{count // 1000}k" if count and count % 1000 == 0 else str(count)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """With what, on how many samples, and against what a number was measured."""

    features: str
    """Name of the features: `torch_fidelity`, `adm`, `clean`, `digits-cnn`, or of a file."""
    num_samples: int
    """Samples that were judged."""
    reference: str = ""
    """What they were compared with: name and hash of statistics; empty for real samples without a
    name, and if nothing."""
    rounding: Rounding = "none"
    """How samples became bytes."""
    resize: Resize = "none"
    """How they reached the size of the network."""
    network: str = ""
    """Network and hash of its weights."""

    def __post_init__(self) -> None:
        """Refuse what nobody can measure with."""
        issues = []
        if not self.features:
            issues.append("features must have a name")
        if self.num_samples < 0:
            issues.append(f"num_samples must be at least 0, got {self.num_samples}")
        for key, kind in (("rounding", Rounding), ("resize", Resize)):
            if getattr(self, key) not in get_args(kind):
                known = ", ".join(get_args(kind))
                issues.append(f"{key} must be one of {known}, got {getattr(self, key)!r}")
        if issues:
            raise ValueError("Protocol: " + "; ".join(issues) + ".")

    def tag(self, metric: str, *more: str) -> str:
        """Return the name of a number.

        The rounding is left out where samples do not become bytes.

        Args:
            metric: One of `METRICS`.
            *more: What else belongs to the name, such as the split.

        Example:
            >>> Protocol(features="adm", num_samples=50_000, rounding="truncate").tag("fid")
            'FID[adm,50k,truncate]'
            >>> Protocol(features="digits-cnn", num_samples=200).tag("fid", "val")
            'FID[digits-cnn,200,val]'
        """
        return f"{metric_name(metric)}[{','.join([*self.parts, *more])}]"

    @property
    def parts(self) -> tuple[str, ...]:
        """What stands in the brackets of a tag."""
        rounding = () if self.rounding == "none" else (str(self.rounding),)
        return (self.features, short_count(self.num_samples), *rounding)

    def with_samples(self, num_samples: int, *, reference: str | None = None) -> Self:
        """Return the same protocol for another number of samples, or another reference."""
        kept = self.reference if reference is None else reference
        return replace(self, num_samples=num_samples, reference=kept)

    def mismatch(self, other: "Protocol") -> list[str]:
        """Return why features of the two are not of one kind, a phrase each; empty if they are.

        Names, samples and rounding may differ: reference pictures are bytes from the start. What
        is not known (an empty `network`) does not differ.
        """
        found = []
        if self.resize != other.resize:
            found.append(f"resize {self.resize!r} and {other.resize!r}")
        if self.network and other.network and self.network != other.network:
            found.append(f"network {self.network!r} and {other.network!r}")
        if not (self.network and other.network) and self.features != other.features:
            found.append(f"features {self.features!r} and {other.features!r}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for a file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `as_dict` has written.

        Raises:
            ValueError: If fields are missing, unknown or impossible.
        """
        known = {one.name for one in fields(cls)}
        unknown = sorted(set(data) - known)
        missing = sorted({"features", "num_samples"} - set(data))
        if unknown or missing:
            raise ValueError(f"a protocol lacks {missing} and has unknown fields {unknown}.")
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class Convention:
    """What a published name stands for, besides the network."""

    rounding: Rounding
    """How samples become bytes."""
    resize: Resize
    """How pictures reach the network."""
    score_order: ScoreOrder
    """How samples are spread over the parts of an Inception score."""
    score_parts: int | None
    """Number of parts; None makes parts of `score_part_size` samples."""
    score_part_size: int | None
    """Samples in a part; None divides them evenly."""


CONVENTIONS: Mapping[str, Convention] = MappingProxyType(
    {
        "torch_fidelity": Convention(
            rounding="round",
            resize="tensorflow",
            score_order="shuffled",
            score_parts=10,
            score_part_size=None,
        ),
        "adm": Convention(
            rounding="truncate",
            resize="tensorflow",
            score_order="shuffled",
            score_parts=None,
            score_part_size=5000,
        ),
        "clean": Convention(
            rounding="round",
            resize="pil-bicubic",
            score_order="shuffled",
            score_parts=10,
            score_part_size=None,
        ),
    }
)
"""The names that publications use."""


def find_convention(name: str) -> Convention:
    """Return what a published name stands for.

    Raises:
        ValueError: If there is no such name.
    """
    if name not in CONVENTIONS:
        raise ValueError(f"there is no protocol {name!r}; known are {', '.join(CONVENTIONS)}.")
    return CONVENTIONS[name]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A number with its protocol. Its text is never the number alone.

    Example:
        >>> protocol = Protocol(features="torch_fidelity", num_samples=50_000, rounding="round")
        >>> print(Measurement(metric="fid", value=3.561, protocol=protocol))
        FID[torch_fidelity,50k,round]=3.561
    """

    metric: str
    """One of `METRICS`."""
    value: float
    """The number."""
    protocol: Protocol
    """How it came about."""
    spread: float | None = None
    """Standard deviation over parts or subsets, where there are any."""
    caveats: tuple[str, ...] = field(default=())
    """What a reader should know before comparing it, a sentence each."""

    def __post_init__(self) -> None:
        """Refuse a metric without a name."""
        metric_name(self.metric)

    @property
    def tag(self) -> str:
        """Name and protocol."""
        return self.protocol.tag(self.metric)

    def __str__(self) -> str:
        """Return tag and number, four digits of it."""
        text = "not defined" if math.isnan(self.value) else f"{self.value:.4g}"
        spread = "" if self.spread is None else f" +- {self.spread:.2g}"
        return f"{self.tag}={text}{spread}"

    __format__ = object.__format__  # a format such as ".2f" would print the number alone

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for a file, with everything that is needed to repeat the number."""
        return {
            "metric": self.metric,
            "tag": self.tag,
            "value": None if math.isnan(self.value) else self.value,
            "spread": self.spread,
            "protocol": self.protocol.as_dict(),
            "caveats": list(self.caveats),
        }
