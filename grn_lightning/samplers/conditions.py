"""What a sample is asked to be, as tensors that a sampler can cut and join along the batch.

A sampler does not know what a condition means. It is a tensor (class labels) or a named tuple of
tensors (text features and their mask, cached keys and values), nested as deep as a model likes.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Condition: TypeAlias = Tensor | tuple["Condition", ...]
"""A tensor or a (named) tuple of conditions; axis 0 of every tensor is the batch."""


def _map_condition(function: Callable[..., Tensor], *conditions: Condition) -> Condition:
    first = conditions[0]
    if isinstance(first, Tensor):
        return function(*conditions)
    parts = [_map_condition(function, *fields) for fields in zip(*conditions, strict=True)]
    return first._make(parts) if hasattr(first, "_make") else tuple(parts)


def _row_shapes(condition: Condition) -> tuple:
    if isinstance(condition, Tensor):
        return tuple(condition.shape[1:])
    return tuple(map(_row_shapes, condition))


def num_rows(condition: Condition) -> int:
    """Return the batch size of a condition."""
    return len(condition) if isinstance(condition, Tensor) else num_rows(condition[0])


def select_rows(condition: Condition, rows: slice | Tensor) -> Condition:
    """Take some samples of a condition.

    Args:
        condition: Tensor or (named) tuple of tensors, the batch on axis 0.
        rows: Slice, `(n,)` long indices or `(b,)` bool mask.

    Returns:
        A condition of the same type with the selected rows.
    """
    return _map_condition(lambda part: part[rows], condition)


def concatenate_conditions(first: Condition, second: Condition) -> Condition:
    """Join two conditions of the same make along the batch.

    Args:
        first: Tensor or (named) tuple of tensors, `(b, ...)`.
        second: The same with other rows.

    Returns:
        A condition of the same type with the rows of both, those of `first` before.

    Raises:
        ValueError: If they differ in more than the number of rows.
    """
    if _row_shapes(first) != _row_shapes(second):
        raise ValueError(
            "the condition and the null condition must have the same fields and may differ in the "
            f"number of rows only; one row of the first has the shapes {_row_shapes(first)}, of "
            f"the second {_row_shapes(second)}."
        )
    return _map_condition(lambda a, b: torch.cat([a, b]), first, second)


def expand_rows(condition: Condition, count: int) -> Condition:
    """Let a condition of one row serve `count` samples.

    Args:
        condition: One row, or `count` rows.
        count: Number of samples.

    Returns:
        A condition of `count` rows, without a copy.

    Raises:
        ValueError: If there is any other number of rows.
    """
    if num_rows(condition) == count:
        return condition
    if num_rows(condition) == 1:
        return _map_condition(lambda part: part.expand(count, *part.shape[1:]), condition)
    raise ValueError(
        f"a condition must have 1 row or one for each of the {count} samples of sample_index, "
        f"got {num_rows(condition)} rows."
    )


def replace_rows(condition: Condition, slots: Tensor, new: Condition) -> Condition:
    """Return a copy of a condition with other samples in some places.

    Args:
        condition: Tensor or (named) tuple of tensors, `(b, ...)`.
        slots: `(n,)` long: which rows.
        new: `n` rows of the same make.
    """
    return _map_condition(lambda part, fresh: part.index_copy(0, slots, fresh), condition, new)


def put_rows(condition: Condition, slots: Tensor, new: Condition) -> None:
    """Overwrite some samples of a condition in place.

    Args:
        condition: Tensors that own their memory.
        slots: `(n,)` long: which rows.
        new: `n` rows of the same make.

    Raises:
        ValueError: If they differ in more than the number of rows.
    """
    if _row_shapes(condition) != _row_shapes(new):
        raise ValueError(
            "all conditions of a queue must have the same fields and sizes; one row has the shapes "
            f"{_row_shapes(condition)}, a new one {_row_shapes(new)}. Pad captions to one length."
        )
    _map_condition(lambda part, fresh: part.index_copy_(0, slots, fresh), condition, new)


def own_rows(condition: Condition) -> Condition:
    """Return a copy whose rows lie one behind the other and can be overwritten."""
    return _map_condition(lambda part: part.contiguous().clone(), condition)
