"""Drawing where weights are divided: every process has to ask a network equally often.

A forward of a divided network gathers its weights from all processes. How many forwards a drawing
takes may depend on its samples (adaptive steps, samples that leave a batch early), and whoever
stopped asking would leave the others waiting for ever. So before each forward the processes tell
one another whether they still draw; one that is done goes on asking with them and forgets the
answer. The samples do not change.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule


class _State(IntEnum):
    """What a process tells the others."""

    DONE = 0
    DRAWS = 1
    HAS_NO_QUESTION = 2
    """It is done and has never asked, so that it has nothing to ask again."""


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

    All processes have to enter, also those that have nothing to draw.

    Args:
        network: Asked as a module; not by its other methods.
        device: Where the processes exchange numbers.
    """
    if not has_divided_weights(network):
        yield
        return
    question: list[tuple[Any, ...]] = []

    def before_forward(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        _exchange(_State.DRAWS, arguments, device)
        question[:] = [arguments]

    handle = network.register_forward_pre_hook(before_forward, prepend=True)
    try:
        yield
    finally:
        handle.remove()
    while True:
        state = _State.DONE if question else _State.HAS_NO_QUESTION
        heard = _exchange(state, None, device)
        if heard is _NOBODY:
            return
        if not question:
            question = [heard]
        with torch.no_grad():
            network(*question[0])


_NOBODY = object()


def _exchange(state: _State, arguments: tuple[Any, ...] | None, device: torch.device) -> Any:
    """Tell one's state and hear the others'; a process without a question is given one.

    Returns:
        `_NOBODY` if no process draws any more, else the question that was given, if any.
    """
    own = torch.tensor([state], device=device)
    states = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(states, own)
    known = [int(one) for one in states]
    if _State.DRAWS not in known:
        return _NOBODY
    if _State.HAS_NO_QUESTION not in known:
        return None
    sent = [move_data_to_device(arguments, torch.device("cpu"))]
    distributed.broadcast_object_list(sent, src=known.index(_State.DRAWS))
    return move_data_to_device(sent[0], device)
