"""What a network weighs, as a short text: two networks with equal hashes have equal weights."""

import hashlib

import torch
from torch import nn


def weights_hash(module: nn.Module) -> str:
    """Return the first 16 hex digits of a SHA-256 over names, shapes and bytes of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
