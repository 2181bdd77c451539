"""Text conditions made ready for many steps: padding cut off, and run once where that is allowed.

An encoder pads every caption to its context length, 512 tokens for the published weights; captions
have a few dozen. Rows of one call are cut to what the longest of them needs, negative prompts
included, so that mixed lengths go through the generator in one forward with little waste. What
remains of the padding is masked and has no influence.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from grn_lightning.models.grn_text import FirstFrameCondition, GRNText, TextCache, TextCondition
from grn_lightning.samplers import expand_rows, num_rows
from grn_lightning.samplers.conditions import concatenate_conditions, select_rows

Condition = Tensor | TextCondition | TextCache | FirstFrameCondition
"""Classes, text features, cached text, or text and a first frame."""

_LENGTH_STEP = 16
"""Text lengths are rounded up to multiples of it: few different shapes, and aligned ones."""


def _needed_length(mask: Tensor) -> int:
    """Return the position behind the last token of any row; at least 1."""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return max(1, int((mask * places).amax()))


def trim_text(
    conditions: Sequence[TextCondition], length: int | None = None
) -> list[TextCondition]:
    """Cut or fill text conditions to the one length that the longest caption of all needs.

    Args:
        conditions: Features `(b, l, text_channels)` with masks; `b` and `l` may differ.
        length: Cut or fill them to this one instead.

    Returns:
        The conditions, all with the same `l`: the needed one, rounded up to a multiple of 16 where
        the features reach that far.
    """
    if length is None:
        longest = max(one.mask.shape[1] for one in conditions)
        needed = max(_needed_length(one.mask) for one in conditions)
        length = min(longest, -(-needed // _LENGTH_STEP) * _LENGTH_STEP)

    def fit(one: TextCondition) -> TextCondition:
        missing = max(0, length - one.mask.shape[1])
        return TextCondition(
            F.pad(one.embeds[:, :length], (0, 0, 0, missing)),
            F.pad(one.mask[:, :length], (0, missing)),
        )

    return [fit(one) for one in conditions]


def _text_of(condition: Condition) -> TextCondition | None:
    """Return the features that a condition still holds."""
    text = condition.text if isinstance(condition, FirstFrameCondition) else condition
    return text if isinstance(text, TextCondition) else None


def _with_text(condition: Condition, text: TextCondition | TextCache) -> Condition:
    if isinstance(condition, FirstFrameCondition):
        return FirstFrameCondition(text, condition.first_frame)
    return text


def _encode_text(generator: GRNText, text: TextCondition, rows_per_call: int | None) -> TextCache:
    """Run text through the generator at once, or in calls of so many rows, the last filled up."""
    count = len(text.mask)
    if rows_per_call in (None, count):
        return generator.encode_text(text)
    assert rows_per_call is not None
    parts = []
    for start in range(0, count, rows_per_call):
        rows = torch.arange(start, start + rows_per_call, device=text.mask.device)
        some = select_rows(text, rows.clamp(max=count - 1))
        cache = generator.encode_text(some)  # type: ignore[arg-type]
        parts.append(select_rows(cache, slice(0, count - start)))
    whole = parts[0]
    for part in parts[1:]:
        whole = concatenate_conditions(whole, part)
    return whole  # type: ignore[return-value]


@torch.no_grad()
def prepare_text(
    generator: GRNText,
    conditions: Sequence[Condition],
    *,
    length: int | None = None,
    rows_per_call: int | None = None,
) -> list[Condition]:
    """Make the text of conditions ready for the steps of a sampler.

    Args:
        generator: Who will be asked. With "prefix" attention the text goes through its blocks here
            and never again; with "full" attention it cannot, because it attends to the picture.
        conditions: Of both branches; cached text stays as it is.
        length: As in `trim_text`.
        rows_per_call: As in `RefineConfig`, for the calls that are made here.

    Returns:
        The conditions in order, with text of one common length.
    """
    texts = {n: text for n, one in enumerate(conditions) if (text := _text_of(one)) is not None}
    if not texts:
        return list(conditions)
    ready: dict[int, TextCondition | TextCache] = dict(
        zip(texts, trim_text(list(texts.values()), length), strict=True)
    )
    if generator.config.attention == "prefix":
        ready = {n: _encode_text(generator, text, rows_per_call) for n, text in ready.items()}  # type: ignore[arg-type]
    return [_with_text(one, ready[n]) if n in ready else one for n, one in enumerate(conditions)]


def with_first_frame(condition: Condition, first_frame: Tensor) -> FirstFrameCondition:
    """Let clips start from a picture.

    Args:
        condition: Text features or cached text; one row serves all pictures. A first frame that it
            already has stays.
        first_frame: Clean elements `(b, c, 1, h, w)` of the picture; one row serves all captions.

    Raises:
        ValueError: If the condition is no text, or the rows do not match.
    """
    if isinstance(condition, FirstFrameCondition):
        return condition
    if not isinstance(condition, TextCondition | TextCache):
        kind = type(condition).__name__
        raise ValueError(f"a first frame goes with a text condition, got one of type {kind}.")
    counts = num_rows(condition), len(first_frame)
    if min(counts) != max(counts) and min(counts) != 1:
        raise ValueError(
            f"captions and first frames must be as many, or one for all, got {counts[0]} captions "
            f"and {counts[1]} first frames."
        )
    count = max(counts)
    text = expand_rows(condition, count)
    return FirstFrameCondition(text, first_frame.expand(count, *first_frame.shape[1:]))  # type: ignore[arg-type]
