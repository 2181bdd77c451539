"""Call `grn` several times in one process: `python in_turn.py CALLS.json`.

Started once per rank with the variables of torchrun; a call that fails ends the sequence.
"""

import json
import sys
from pathlib import Path

import torch


def main() -> None:
    torch.set_num_threads(1)
    from grn_lightning.cli import main as grn

    for call in json.loads(Path(sys.argv[1]).read_text()):
        sys.argv = ["grn", *call]
        grn()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
