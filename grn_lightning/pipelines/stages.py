"""Exported stages of coarse-to-fine prediction, joined to what can draw."""

from dataclasses import dataclass
from pathlib import Path

from grn_lightning.models.coarse_split import CoarseSplit
from grn_lightning.models.code_transformer import CodeTransformer
from grn_lightning.models.hashes import weights_hash
from grn_lightning.models.pretrained import Pretrained, read_pretrained, select
from grn_lightning.models.stored_split import SplitTensors, read_split, split_as_plain
from grn_lightning.models.text_encoder import TextEncoder
from grn_lightning.models.tokenizers import Tokenizer
from grn_lightning.pipelines.coarse_to_fine import CoarseToFinePipeline, FineMask
from grn_lightning.samplers.coarse_to_fine import CoarseToFineConfig


@dataclass(frozen=True)
class TrainedStage:
    """A network of one stage, and what belongs to it."""

    network: CodeTransformer
    """Causal in stage 1 and in the plain baseline, bidirectional in stage 2."""
    split: CoarseSplit | None
    """What is coarse; None for the baseline."""
    tokenizer: Tokenizer | None
    """Whose codes it knows; None where nobody knows."""
    text_encoder: TextEncoder | None
    """Reads captions; None for classes."""
    fine_mask: FineMask = "train+sample"
    """Of stage 2."""
    name: str = ""
    """Where it lies, for messages."""


def as_stage(pretrained: Pretrained, tokenizer: Tokenizer | None) -> TrainedStage:
    """Return the stage of an export.

    Args:
        pretrained: Export of a `CodeTransformer`.
        tokenizer: Whose codes it knows; None looks for it in the folder of the export.

    Raises:
        ValueError: If the export is another network, or the tokenizer another one than in training.
    """
    network = pretrained.network()
    if not isinstance(network, CodeTransformer):
        raise ValueError(f"'{pretrained.file}' is a {pretrained.architecture}, not a stage.")
    plain = pretrained.info["config"].get("split")
    return TrainedStage(
        network=network,
        split=None if plain is None else read_split(plain, select(pretrained.tensors, "split")),
        tokenizer=_tokenizer_of(pretrained, tokenizer),
        text_encoder=pretrained.text_encoder(),
        fine_mask=pretrained.info.get("fine_mask", "train+sample"),
        name=str(pretrained.file),
    )


def _tokenizer_of(pretrained: Pretrained, given: Tokenizer | None) -> Tokenizer | None:
    expected = pretrained.tokenizer_hash
    if given is not None:
        found = weights_hash(given)
        if expected not in (None, found):
            raise ValueError(
                f"'{pretrained.file}' was trained on codes of tokenizer {expected}, but the given "
                f"one is tokenizer {found}. Give the former."
            )
        return given
    beside = pretrained.tokenizer_beside()
    return None if beside is None else read_pretrained(beside).tokenizer()


def join_stages(
    first: TrainedStage,
    second: TrainedStage | None = None,
    *,
    sampling: CoarseToFineConfig | None = None,
) -> CoarseToFinePipeline:
    """Join stage 1 and stage 2, or take the plain baseline alone.

    Args:
        first: Stage 1, or the baseline.
        second: Stage 2, of the same split.
        sampling: How labels are drawn where nothing else is asked for.

    Raises:
        ValueError: If they are no such stages, do not belong together, or lack the tokenizer.
    """
    if not first.network.config.is_causal or (second and second.network.config.is_causal):
        raise ValueError(
            f"stage 1 must be causal and stage 2 not, got '{first.name}'"
            f"{f' and {second.name!r}' if second else ' alone'}; swap them, or give stage 1."
        )
    if (first.split is None) != (second is None):
        what = (
            "is stage 1, which draws together with a stage 2; name that by `--fine` (`fine=`)"
            if second is None
            else "is a plain baseline, which has no stage 2; leave `fine` out"
        )
        raise ValueError(f"'{first.name}' {what}.")
    tokenizer = first.tokenizer or (second.tokenizer if second else None)
    if tokenizer is None:
        raise ValueError(
            f"'{first.name}' is here without its tokenizer, which nothing can replace; give it as "
            "`tokenizer`."
        )
    if second is not None:
        _check_same_split(first, second)
    return CoarseToFinePipeline(
        first.network,
        tokenizer,
        fine=None if second is None else second.network,
        split=None if second is None else second.split,
        text_encoder=first.text_encoder,
        sampling=sampling or CoarseToFineConfig(),
        fine_mask="train+sample" if second is None else second.fine_mask,
    )


def _check_same_split(first: TrainedStage, second: TrainedStage) -> None:
    """Refuse two stages that mean different things by a coarse label."""
    assert first.split is not None
    assert second.split is not None
    parts = [(split_as_plain(s), SplitTensors(s).state_dict()) for s in (first.split, second.split)]
    (plain, tensors), (others_plain, others) = parts
    is_same = plain == others_plain and tensors.keys() == others.keys()
    if not is_same or not all(tensors[name].equal(others[name]) for name in tensors):
        raise ValueError(
            f"both stages must have one split, got {plain} of '{first.name}' and {others_plain} of "
            f"'{second.name}'."
        )


def load_stage_export(
    path: str | Path, tokenizer: Tokenizer | None = None, fine: str | Path | None = None
) -> CodeTransformer | CoarseToFinePipeline:
    """Return what an exported stage can do.

    Args:
        path: Export of stage 1, of the baseline, or of stage 2.
        tokenizer: Whose codes it knows; None looks for it in the folder of the export.
        fine: Export of stage 2, for stage 1.

    Returns:
        A pipeline that draws; of a stage without its other half, or without a tokenizer, the
        network, which gives logits.

    Raises:
        ValueError: If the parts do not belong together.
    """
    first = as_stage(read_pretrained(path), tokenizer)
    second = None if fine is None else as_stage(read_pretrained(fine), tokenizer)
    has_all = first.network.config.is_causal and first.split is None and first.tokenizer is not None
    if second is None and not has_all:
        return first.network
    return join_stages(first, second)
