"""What of every weight a process holds under the strategy at hand, and where.

A plain parameter is held whole. FSDP makes it a `DTensor` whose local part is this process's. ZeRO
stage 3 leaves an empty parameter whose `ds_tensor` is this process's stretch of it, flat, the last
one padded; below stage 3 weights are whole.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from grn_lightning.lit.optim import own_part


@dataclass(frozen=True)
class OwnPart:
    """What this process holds of one parameter."""

    parameter: Any

    def weights(self) -> Tensor:
        """Return what the network computes with, in place: writing to it changes the network."""
        parameter = self.parameter
        if hasattr(parameter, "ds_id"):
            if parameter.ds_status.name == "AVAILABLE":  # gathered, which would outlive the change
                parameter.partition()
            return parameter.ds_tensor.data
        whole = parameter.detach()
        return whole.to_local() if isinstance(whole, DTensor) else whole

    def master(self) -> Tensor:
        """Return what the optimizer moves; ZeRO's stage 3 has a copy of its own."""
        parameter = self.parameter
        if hasattr(parameter, "ds_id") and hasattr(parameter, "_z3_optimizer"):
            from deepspeed.utils import safe_get_local_fp32_param

            return safe_get_local_fp32_param(parameter).detach()
        return self.weights().detach()

    def cut(self, tensor: Tensor) -> Tensor:
        """Return this process's part of a whole tensor; one that is a part stays as it is."""
        parameter = self.parameter
        if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
            part = own_part(tensor.to(parameter.device), parameter)
            return part.to_local()  # type: ignore[attr-defined]
        if hasattr(parameter, "ds_id") and tensor.shape == parameter.ds_shape:
            return _stretch(tensor, parameter.ds_tensor.numel())
        return tensor


def _stretch(whole: Tensor, length: int) -> Tensor:
    """Return this process's stretch of a tensor, as ZeRO's stage 3 cuts it."""
    start = length * distributed.get_rank()
    part = whole.flatten()[start : start + length]
    return nn.functional.pad(part, (0, length - len(part)))


def own_parts(network: nn.Module, prefixes: tuple[str, ...]) -> dict[str, OwnPart]:
    """Return the parts of the trainable parameters whose names begin so, by name."""
    for module in network.modules():
        if isinstance(module, FSDPModule):  # leaves its outermost weights whole after a forward
            module.reshard()
    return {
        name: OwnPart(parameter)
        for name, parameter in network.named_parameters()
        if name.startswith(prefixes) and parameter.requires_grad
    }


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a transformer, the units of sharding and of checkpointing.

    They are the elements of its lists that hold no list themselves.
    """
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    blocks = [
        block for blocks in lists for block in blocks if any(True for _ in block.parameters())
    ]
    return [
        block
        for block in blocks
        if not any(isinstance(part, nn.ModuleList) for part in block.modules())
    ]


def checkpoint_blocks(network: nn.Module) -> None:
    """Make every block compute its activations once more on the way back, dropout included.

    Names of parameters stay as they are, and gradients are those without, to the last bit.
    """
    for block in blocks_of(network):
        again = partial(checkpoint, block.forward, use_reentrant=False)
        object.__setattr__(block, "forward", again)
