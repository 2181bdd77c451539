"""`grn evaluate vbench`: draw what VBench scores, in the folder that it reads."""

from pathlib import Path

from grn_lightning.scripts.draw_plan import DrawOptions
from grn_lightning.scripts.drawn_layout import LayoutReport, draw_layout
from grn_lightning.scripts.layouts import Layout, read_vbench, rewritten
from grn_lightning.scripts.records import command_line

_OPTIONS = DrawOptions()


def evaluate_vbench(
    checkpoint: Path | None = None,
    *,
    prompts: Path,
    out: Path,
    rewritten_prompts: Path | None = None,
    per_prompt: int = 5,
    config: DrawOptions = _OPTIONS,
) -> LayoutReport | None:
    """Draw clips for the prompts of VBench, in the folder that it reads.

    Writes `OUT/videos/PROMPT-0.mp4`, `PROMPT-1.mp4`, ... and nothing else there; how all was made
    stands in `OUT/samples.json`. The same command goes on where it was interrupted; torchrun, SLURM
    or `--devices` share the work, and change no clip. The scorer is no part of this package.

    Args:
        checkpoint: Checkpoint of a text-conditional generator, the folder of its run, or an export.
        prompts: VBench's `VBench_full_info.json`, or a text file with one prompt a line.
        out: Folder to write to: new, empty, or that of the same command.
        rewritten_prompts: Text file of what the generator reads instead, a line for each prompt;
            files keep the names of the benchmark's prompts.
        per_prompt: Clips of each prompt; VBench asks for 5, for temporal flickering 25.
        config: How they are drawn.

    Raises:
        ValueError: If generator, prompts and folder do not fit together.
    """
    given = dict(locals())
    asked = rewritten(read_vbench(prompts), rewritten_prompts)
    return draw_layout(
        checkpoint,
        Layout("vbench", tuple(asked), per_prompt),
        out,
        config,
        command=command_line(evaluate_vbench, given),
    )
