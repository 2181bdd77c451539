"""What the inspector has logged last, as a part of a report: maps, curves, what a network knows."""

import io

from PIL import Image

from grn_lightning.scripts.report_curves import History
from grn_lightning.scripts.report_page import Page, Panel

_COLOURS = 128  # of a panel: drawings have few, and a page should be light
_WIDE = "inspect/strip"
_MEANINGS = {
    "inspect/maps": "Every step of the first of them. Above the complete sample, decoded; below it "
    "what the step did to each element of its code map.",
    "inspect/elements": "What becomes of elements: drawn for the first time, drawn again, taken "
    "back, still random.",
    "inspect/entropy": "How uncertain the prediction is at each step, sample by sample.",
    "inspect/flips": "How much of the complete sample a step changes.",
    "inspect/accuracy": "Bits that the network gets right of held-out maps, corrupted as in "
    "training. The dashed line is what it was shown.",
    "inspect/bit_balance": "Ones among the bits of drawn samples and of held-out ones with the "
    "same conditions.",
    "inspect/complexity_by_sample": "How uncertain samples are where adaptive sampling decides.",
    "inspect/steps_by_sample": "Steps that samples get of an adaptive rule, or would get of one "
    "that takes half of the steps.",
}
"""Panels of a report, and what a reader sees in them; a tag that is not here is left to
TensorBoard."""
_ALARMS = "inspect/alarms/text_summary"


def has_panels(history: History | None) -> bool:
    """Whether a run has logged any."""
    return history is not None and any(tag in history.pictures for tag in _MEANINGS)


def lightened(data: bytes) -> bytes:
    """Encode a still picture with few colours; a film stays as it is."""
    with Image.open(io.BytesIO(data)) as picture:
        if picture.format != "PNG":
            return data
        buffer = io.BytesIO()
        few = picture.convert("RGB").quantize(
            _COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
        )
        few.save(buffer, format="PNG", optimize=True)
    return min(buffer.getvalue(), data, key=len)


def add_panels(page: Page, name: str, history: History) -> None:
    """Append the last panels of a run, and the alarms.

    Args:
        page: Where to.
        name: Of the run.
        history: What it has logged.
    """
    page.heading(name, level=3)
    alarms = history.texts.get(_ALARMS, "none")
    if alarms == "none":
        page.paragraph("No alarm at the last validation.", kind="muted")
    else:
        for line in alarms.splitlines():
            page.paragraph(line.removeprefix("- "), kind="missing")
    if _WIDE in history.pictures:
        page.wide_picture(lightened(history.pictures[_WIDE]), f"Steps of a sample of {name}")
    page.panels(
        Panel(lightened(history.pictures[tag]), meaning)
        for tag, meaning in _MEANINGS.items()
        if tag in history.pictures
    )
