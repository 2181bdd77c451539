"""Published checkpoints into our modules, strictly.

Our modules carry the published tensor names and shapes, hence there is little to convert: the
wrappers around the weights differ from file to file, and are taken off here.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

NESTED_KEYS = ("ema", "vae", "model_ema1")  # tokenizer (average first), class-conditional network
PREFIXES = ("net.",)  # the class-conditional training wrapper
MAX_ROWS = 20


def load_official(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load a published checkpoint into `module`; every tensor must find its place.

    A checkpoint file is read by the caller with `torch.load(..., weights_only=True,
    map_location="cpu")` or by safetensors. The averaged weights are taken where the file has
    them (`ema`, else `vae`; `model_ema1`), and the prefix `net.` is taken off.

    Args:
        module: A model of ours, built with the sizes of the checkpoint.
        state_dict: Contents of the file: tensors by name, or a dictionary that holds them.

    Raises:
        ValueError: If a tensor is missing, left over or of another shape; the message lists them,
            and nothing has been loaded.
    """
    tensors = official_tensors(state_dict)
    own = module.state_dict()
    rows = [f"missing      {name} {_shape(own[name])}" for name in own if name not in tensors]
    rows += [f"unexpected   {name} {_shape(tensors[name])}" for name in tensors if name not in own]
    rows += [
        f"other shape  {name} {_shape(tensors[name])} in the file, {_shape(own[name])} in the model"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if rows:
        more = [f"... and {len(rows) - MAX_ROWS} more"] if len(rows) > MAX_ROWS else []
        raise ValueError(
            f"the checkpoint does not fit {type(module).__name__} ({len(rows)} of its tensors "
            "differ); build the model with the sizes of the checkpoint.\n  "
            + "\n  ".join(rows[:MAX_ROWS] + more)
        )
    module.load_state_dict(tensors)


def official_tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Find the tensors in the contents of a published file, under the names our modules have."""
    for key in NESTED_KEYS:
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
            break
    tensors = {name: x for name, x in state_dict.items() if isinstance(x, Tensor)}
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    return tensors


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"
