"""Drawing where weights are divided: every process has to ask a network equally often.

A forward of a divided network gathers its weights from all processes. How many forwards a drawing
takes may depend on its samples (adaptive steps, samples that leave a batch early), and whoever
stopped asking would leave the others waiting for ever. So before each forward the processes tell
one another whether they still draw; one that is done goes on asking with them and forgets the
answer. The samples do not change.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule


def has_divided_weights(network: nn.Module) -> bool:
    """Whether a forward of a network needs other processes."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return False
    if any(isinstance(module, FSDPModule) for module in network.modules()):
        return True
    return any(hasattr(parameter, "ds_id") for parameter in network.parameters())


@contextmanager
def in_step(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Let the processes ask a divided network equally often; others are asked as ever.

    All processes have to enter and to ask at least once.

    Args:
        network: Asked as a module; not by its other methods.
        device: Where the processes exchange numbers.
    """
    if not has_divided_weights(network):
        yield
        return
    question: list[tuple[Any, ...]] = []

    def before_forward(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        _num_drawing(1, device)
        question[:] = [arguments]

    handle = network.register_forward_pre_hook(before_forward, prepend=True)
    try:
        yield
    finally:
        handle.remove()
    while _num_drawing(0, device):
        with torch.no_grad():
            network(*question[0])


def _num_drawing(own: int, device: torch.device) -> int:
    """Tell whether this process draws, and hear how many do."""
    number = torch.tensor(own, device=device)
    distributed.all_reduce(number)
    return int(number)
