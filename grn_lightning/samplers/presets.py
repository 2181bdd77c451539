"""Published settings of sampling by name: one row, one configuration.

Sources: the launch scripts, tools and README of Generative Refinement Networks (arXiv 2604.13030).
They belong to the published weights of the same name; a model of one's own has its own best ones.
"""

from dataclasses import replace

from grn_lightning.samplers.config import RefineConfig
from grn_lightning.samplers.stopping import AdaptiveSteps

_B = RefineConfig(
    guidance_scale=2.35,
    guidance_schedule="interval",
    guidance_interval=(0.44, 1.0),
    temperature=1.31,
)
_B_RULE = AdaptiveSteps(slope=700.0, offset=-620.0, min_steps=20, temperature_by_steps=True)
_TEXT = RefineConfig(
    schedule="cosine",
    time_cap=0.95,
    realised_time=True,
    guidance_scale=3.0,
)

PRESETS: dict[str, RefineConfig] = {
    # The defaults, whatever comes with the weights.
    "plain": RefineConfig(),
    # Class-conditional: "B-index" and "L-index", 256 x 256 pixels.
    "c2i-b": _B,
    "c2i-b-adaptive": replace(_B, adaptive=_B_RULE),
    "c2i-l": replace(_B, guidance_scale=2.0, guidance_interval=(0.42, 1.0), temperature=1.3),
    # Text-conditional, newest. The README gives a guidance scale of 4 for clips, the tools 3.
    "t2i": replace(_TEXT, temperature=1.1),
    "t2v": _TEXT,
    "i2v": _TEXT,
    # Text-conditional, first release.
    "t2i-first": replace(_TEXT, time_cap=0.999, temperature=1.1),
    "t2v-first": replace(_TEXT, time_cap=0.999, guidance_scale=4.0),
}


def get_preset(name: str) -> RefineConfig:
    """Look up published settings.

    Raises:
        ValueError: If there are none of this name; the message lists the names.
    """
    if name not in PRESETS:
        known = ", ".join(map(repr, PRESETS))
        raise ValueError(f"unknown sampling preset {name!r}; known are {known}.")
    return PRESETS[name]
