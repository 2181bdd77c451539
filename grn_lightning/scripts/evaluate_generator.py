"""How good samples are, beside real clips and what the tokenizer alone leaves of them."""

from typing import Any

import torch
from torch import Tensor

from grn_lightning.lit.generator import LitGenerator
from grn_lightning.media.images import to_uint8
from grn_lightning.samplers import RefineConfig
from grn_lightning.scripts.drawing import draw_parts, step_bar
from grn_lightning.scripts.heldout import HeldOut
from grn_lightning.scripts.judging import KINDS, Judging, Reading
from grn_lightning.scripts.pictures import Gallery, shrink
from grn_lightning.scripts.records import Figure, Findings, Picture
from grn_lightning.scripts.runs import ClipSize

_NUM_SHOWN = 24  # samples on the sheet
_NUM_STRIPS = 6  # clips whose frames are laid out
_SHORT_SIDE = 96  # pixels of what is shown


class _Costs:
    """What the samples cost."""

    def __init__(self) -> None:
        self.count, self.rows, self.seconds = 0, 0, 0.0

    def figures(self, config: RefineConfig, device: torch.device, batch_size: int) -> list[Figure]:
        """Forwards and seconds of one sample."""
        walk = (f"{config.num_steps} steps", f"scale {config.guidance_scale:g}")
        count = torch.get_num_threads()
        threads = f"{count} thread{'s' * (count > 1)}" if device.type == "cpu" else "1 device"
        return [
            Figure(
                "forwards/sample",
                walk,
                self.rows / self.count,
                meaning="mean number of rows that the generator is asked for",
            ),
            Figure(
                "seconds/sample",
                (*walk, device.type, threads, f"batch {batch_size}"),
                self.seconds / self.count,
                "s",
                "condition, refinement and decoding, judges left out",
            ),
        ]


class _Shown:
    """The first samples, with what was asked for and what the judge reads."""

    def __init__(self) -> None:
        self.clips: list[Tensor] = []
        self.labels: list[str] = []
        self.readings: list[Reading] = []

    def add(self, clips: Tensor, labels: list[str], readings: list[Reading]) -> None:
        """Keep what there is still room for."""
        room = _NUM_SHOWN - len(self.clips)
        if room > 0:
            frames = to_uint8(clips[:room].cpu()).transpose(1, 2)  # (b, f, 3, h, w)
            self.clips += shrink(frames, short_side=_SHORT_SIDE)
            self.labels += labels[:room]
            self.readings += readings[:room]

    def write(self, gallery: Gallery) -> list[Picture]:
        """Write one file per sample, a sheet, and for clips a strip."""
        gallery.add_samples(self.clips, self.labels, self.readings)
        gallery.add_sheet("samples", self.clips, self.labels, columns=6)
        gallery.add_strip("samples", self.clips[:_NUM_STRIPS], self.labels[:_NUM_STRIPS])
        return gallery.pictures


def _wanted(module: LitGenerator, batch: Any) -> dict[str, list[Any]]:
    """Return what a batch asks for, under the name that the generator understands.

    Raises:
        ValueError: If the shards do not have it.
    """
    field = "captions" if module.is_text else "class_labels"
    if field not in batch:
        missing = "captions (txt)" if module.is_text else "classes (cls)"
        raise ValueError(f"the generator needs {missing}, and these shards have none.")
    values = batch[field]
    return {field: values if module.is_text else values.tolist()}


@torch.no_grad()
def evaluate_generator(
    module: LitGenerator,
    held_out: HeldOut,
    judging: Judging,
    *,
    size: ClipSize,
    config: RefineConfig,
    seed: int,
    gallery: Gallery,
) -> Findings:
    """Draw a sample for the caption or class of every held-out sample and judge the set.

    Args:
        module: The generator, on its device.
        held_out: The samples; the position of each in the split names the noise.
        judging: Adds up what the judges say.
        size: Size of the samples.
        config: Steps, guidance, temperature.
        seed: Seed of all noise.
        gallery: Takes the pictures.
    """
    costs, shown = _Costs(), _Shown()
    with step_bar(held_out.num_samples, config, "evaluate") as observer:
        for batch in held_out:
            clips, wanted = batch["clips"].to(module.device), _wanted(module, batch)
            [part] = draw_parts(
                module,
                wanted,
                batch["sample_index"],
                size=size,
                config=config,
                seed=seed,
                batch_size=len(clips),
                observer=observer,
            )
            assert part.clips is not None, "parts are decoded unless asked not to be"
            judging.add("real", clips, batch)
            judging.add("reconstructions", module.detokenize(module.tokenize(clips)), batch)
            readings = judging.add("samples", part.clips, batch)
            [values] = wanted.values()
            labels = values if module.is_text else [f"class {value}" for value in values]
            shown.add(part.clips, labels, readings)
            costs.count += len(clips)
            costs.rows += part.num_forwards
            costs.seconds += part.seconds
    return Findings(
        figures=[
            *(f for kind in KINDS for f in judging.figures(kind, split=held_out.split)),
            *costs.figures(config, module.device, held_out.batch_size),
        ],
        pictures=shown.write(gallery),
    )
