"""What a network weighs, as a short text: two networks with equal hashes have equal weights."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the first 16 hex digits of a SHA-256 over names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def weights_hash(module: nn.Module) -> str:
    """Return the `tensors_hash` of all tensors of a module."""
    return tensors_hash(module.state_dict())
