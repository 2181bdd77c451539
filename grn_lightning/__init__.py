"""Generative Refinement Networks and coarse-to-fine token prediction, on Lightning."""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Union

if TYPE_CHECKING:
    from grn_lightning.models.code_transformer import CodeTransformer
    from grn_lightning.models.text_encoder import TextEncoder, TextEncoderConfig
    from grn_lightning.models.tokenizers import Tokenizer
    from grn_lightning.pipelines import GeneratorPipeline
    from grn_lightning.pipelines.coarse_to_fine import CoarseToFinePipeline

__version__ = version("grn-lightning")


def load(
    path: str | Path,
    tokenizer: Union[str, Path, "Tokenizer", None] = None,
    *,
    text_encoder: Union["TextEncoder", "TextEncoderConfig", None] = None,
    fine: str | Path | None = None,
) -> Union["Tokenizer", "GeneratorPipeline", "CoarseToFinePipeline", "CodeTransformer"]:
    """Return a trained tokenizer or generator, frozen, with averaged weights, on the CPU.

    Args:
        path: An export (its name, or either of its files), a run's folder, or a checkpoint.
        tokenizer: Tokenizer of a generator: the network, or where it lies. None looks beside an
            export, and where it lay in training of a run. An export that nobody told which
            tokenizer it belongs to, and is given none, still gives logits.
        text_encoder: Text encoder of an export that neither has nor names one.
        fine: Stage 2 of coarse-to-fine prediction, if `path` is its stage 1. A stage without its
            other half is a network that gives logits.

    Raises:
        ValueError: If nothing lies there, it is damaged, or parts do not belong together.
    """
    from grn_lightning.models.pretrained import is_export

    if all(not isinstance(x, str | Path) or is_export(x) for x in (path, tokenizer, fine)):
        from grn_lightning.pipelines.loading import load_export

        return load_export(path, tokenizer, text_encoder=text_encoder, fine=fine)
    from grn_lightning.lit.loading import load_trained  # brings Lightning along

    return load_trained(path, tokenizer, text_encoder=text_encoder, fine=fine)
