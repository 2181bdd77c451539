"""Text features that are computed once: in memory for a while, in files for good.

A caption of a data set is met again in every epoch, and the empty one in every batch. An encoder of
billions of parameters that needs not run for them needs not be in memory either.
"""

import hashlib
import os
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

MEMORY_BYTES = 2**28
"""Features kept in memory: 800 captions of 40 tokens with 4096 channels in bfloat16."""
FIELD = "embeds"

Tokens = tuple[int, ...]


class FeatureCache:
    """Features `(l, d)` of captions by their tokens; those used last stay in memory.

    Files are `FOLDER/ENCODER/xx/KEY.safetensors`, where the key is a hash of the tokens: the
    features of one encoder never answer for another, and several processes may share a folder.

    Args:
        encoder: Name of the encoder and its weights, such as a hash.
        folder: Where features are kept for other runs; None keeps them in memory only.
        memory_bytes: Most bytes kept in memory.
    """

    def __init__(
        self, encoder: str, folder: str | Path | None = None, *, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self.encoder = encoder
        self.folder = None if folder is None else Path(folder) / encoder
        self.memory_bytes = memory_bytes
        self._memory: OrderedDict[Tokens, Tensor] = OrderedDict()
        self._num_bytes = 0

    def path(self, tokens: Tokens) -> Path | None:
        """Return the file in which the features of a caption are, or would be."""
        if self.folder is None:
            return None
        key = hashlib.sha256(" ".join(map(str, tokens)).encode()).hexdigest()[:32]
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, tokens: Tokens) -> Tensor | None:
        """Return the features of a caption, None if they are not known.

        Raises:
            ValueError: If a file of the folder is damaged.
        """
        if tokens in self._memory:
            self._memory.move_to_end(tokens)
            return self._memory[tokens]
        path = self.path(tokens)
        if path is None or not path.is_file():
            return None
        try:
            features = load_file(path)[FIELD]
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"'{path}' holds no text features ({error}); delete it, and it is made again."
            ) from error
        self._remember(tokens, features)
        return features

    def put(self, tokens: Tokens, features: Tensor) -> None:
        """Keep the features `(l, d)` of a caption."""
        self._remember(tokens, features)
        path = self.path(tokens)
        if path is None or path.is_file():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        save_file({FIELD: features.contiguous()}, unfinished)
        unfinished.replace(path)  # at once: nobody reads half a file

    def _remember(self, tokens: Tokens, features: Tensor) -> None:
        if tokens in self._memory:
            return
        with torch.inference_mode(False):  # the next user may train
            self._memory[tokens] = features.detach().cpu().clone()
        self._num_bytes += features.nbytes
        while self._num_bytes > self.memory_bytes and len(self._memory) > 1:
            self._num_bytes -= self._memory.popitem(last=False)[1].nbytes
