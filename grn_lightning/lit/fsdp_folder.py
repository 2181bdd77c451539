"""The parts of an FSDP folder: what lies where, and tensors read from there.

torch reads the index and everything that is no tensor by pickle, and where the index fails it looks
for another one. Here the index may name plain data only, there is one, and nothing else is
unpickled but tensors and plain data.
"""

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

FSDP_INDEX = ".metadata"

_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath", "Path"},
}
"""What the index may name: plain data, and nothing that a module has imported."""


class _IndexUnpickler(pickle.Unpickler):
    """Reads the index, a pickle, and no other one."""

    def find_class(self, module: str, name: str) -> Any:
        known = _NAMES.get(module, set())
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name not in known and not is_dtype:
            raise ValueError(f"it names '{module}.{name}', which is no plain data")
        return super().find_class(module, name)


def read_index(path: Path) -> Metadata:
    """Read what lies where in an FSDP folder.

    Raises:
        ValueError: If it is damaged, holds more than plain data, or names files elsewhere.
    """
    file = path / FSDP_INDEX
    try:
        with file.open("rb") as stream:
            index = _IndexUnpickler(stream).load()
        for name in files_of(index):
            if Path(name).name != name:
                raise ValueError(f"it names the file '{name}', which is not in the folder")
    except Exception as error:
        raise ValueError(f"'{file}' cannot be read: {error}. Take another checkpoint.") from error
    return index


def files_of(index: Metadata) -> list[str]:
    """Return the names of the files that an index speaks of."""
    return sorted({info.relative_path for info in index.storage_data.values()})


class _Reader(FileSystemReader):
    """Takes the index as `read_index` does, and no other one."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return the index of the folder; an index of a single process is never looked for."""
        return read_index(Path(self.path))


class _Planner(DefaultLoadPlanner):
    """Lets through what is no tensor only if it is plain data."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Hand on the same data in a pickle of this process.

        Raises:
            ValueError: If it is more than plain data.
        """
        ours, name = io.BytesIO(), read_item.dest_index.fqn
        try:
            torch.save(torch.load(value, map_location="cpu", weights_only=True), ours)
        except Exception as error:
            raise ValueError(f"'{name}' is damaged or more than plain data") from error
        ours.seek(0)
        super().load_bytes(read_item, ours)


def load_parts(state: dict[str, Any], path: Path, *, is_alone: bool = False) -> None:
    """Fill tensors from an FSDP folder, of divided ones this process's parts.

    Args:
        state: Tensors by name, filled in place; what is no tensor is replaced.
        path: The folder.
        is_alone: Whether this process reads without the others, tensors that are whole.

    Raises:
        ValueError: If the folder lacks something, is damaged, or holds more than tensors and plain
            data.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*load in a single process")  # it is asked
            load(state, storage_reader=_Reader(path), planner=_Planner(), no_dist=is_alone)
    except CheckpointException as error:  # no Exception: one process could end without the others
        reasons = [failure for failure, _ in error.failures.values()]
        told = [str(reason) for reason in reasons if not isinstance(reason, pickle.UnpicklingError)]
        reason = told[0].splitlines()[0].rstrip(".") if told and told[0] else "a part is damaged"
        raise ValueError(
            f"'{path}' cannot be read as a checkpoint: {reason}. Take another checkpoint."
        ) from error
