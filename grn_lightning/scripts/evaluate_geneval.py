"""`grn evaluate geneval`: draw what GenEval scores, in the folders that it reads."""

from pathlib import Path

from grn_lightning.scripts.draw_plan import DrawOptions
from grn_lightning.scripts.drawn_layout import LayoutReport, draw_layout
from grn_lightning.scripts.layouts import Layout, read_geneval, rewritten
from grn_lightning.scripts.records import command_line

_OPTIONS = DrawOptions()


def evaluate_geneval(
    checkpoint: Path | None = None,
    *,
    prompts: Path,
    out: Path,
    rewritten_prompts: Path | None = None,
    per_prompt: int = 4,
    config: DrawOptions = _OPTIONS,
) -> LayoutReport | None:
    """Draw pictures for the prompts of GenEval, in the folders that its scorer reads.

    Writes `OUT/images/00000/metadata.jsonl`, `samples/0000.png`, ... and `grid.png`, one folder a
    prompt, and how all was made to `OUT/samples.json`. The same command goes on where it was
    interrupted; torchrun, SLURM or `--devices` share the work, and change no picture. The detectors
    of the scorer are no part of this package.

    Args:
        checkpoint: Checkpoint of a text-conditional generator, the folder of its run, or an export.
        prompts: GenEval's `evaluation_metadata.jsonl`.
        out: Folder to write to: new, empty, or that of the same command.
        rewritten_prompts: Text file of what the generator reads instead, a line for each prompt.
        per_prompt: Pictures of each prompt.
        config: How they are drawn.

    Raises:
        ValueError: If generator, prompts and folder do not fit together.
    """
    given = dict(locals())
    asked = rewritten(read_geneval(prompts), rewritten_prompts)
    return draw_layout(
        checkpoint,
        Layout("geneval", tuple(asked), per_prompt),
        out,
        config,
        command=command_line(evaluate_geneval, given),
    )
