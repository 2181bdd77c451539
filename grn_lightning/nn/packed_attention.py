"""Attention within the documents of one packed sequence, by three interchangeable kernels.

"flex"       FlexAttention with a block mask: blocks between two documents are not computed.
             Compiled on CUDA; elsewhere it runs uncompiled, without gradients, for tests.
"documents"  One call of scaled dot-product attention per document: its cost is that of the
             documents alone, but many small documents are many small calls.
"dense"      One call with a boolean mask of all pairs: quadratic in the whole sequence, the
             plainest, and the oracle of the other two.

`n` heads, `l` tokens of the sequence, `d` documents, `e` head width.
"""

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from grn_lightning.functional.packing import document_index, document_mask
from grn_lightning.nn.attention import attend

Backend = Literal["auto", "flex", "documents", "dense"]
BACKENDS = ("auto", "flex", "documents", "dense")
_NARROWEST = 16
"""Head width from which FlexAttention has a kernel on CUDA."""


def choose_backend(backend: Backend, *, head_width: int, device_type: str) -> Backend:
    """Return the kernel that a backend means.

    Args:
        backend: See the module's docstring; "auto" is "flex" on CUDA where heads are wide enough,
            and "documents" elsewhere.
        head_width: Channels of a head.
        device_type: Such as "cuda".

    Raises:
        ValueError: If the backend is unknown, or cannot train with such heads on the device.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"the backend of packed attention must be one of {', '.join(BACKENDS)}, got "
            f"{backend!r}."
        )
    is_narrow = head_width < _NARROWEST
    if backend == "auto":
        return "flex" if device_type == "cuda" and not is_narrow else "documents"
    if backend == "flex" and device_type == "cuda" and is_narrow:
        raise ValueError(
            f"packed attention by 'flex' needs heads of at least {_NARROWEST} channels on CUDA, "
            f"got {head_width}; take 'documents', or 'auto', which does."
        )
    if backend == "flex" and device_type != "cuda" and torch.is_grad_enabled():
        raise ValueError(
            f"packed attention by 'flex' has gradients on CUDA only, got {device_type}; take "
            "'documents', or 'auto', which does."
        )
    return backend


class DocumentLengths(NamedTuple):
    """What a packed sequence is made of: of every document first the prefix, then the rest.

    Attributes:
        prefix: Tokens of each document that may be kept from seeing the rest.
        rest: Its other tokens.
    """

    prefix: tuple[int, ...]
    rest: tuple[int, ...]

    @property
    def total(self) -> int:
        """Tokens of the sequence."""
        return sum(self.prefix) + sum(self.rest)


class DocumentAttention:
    """Who attends to whom in one packed sequence; made once per pass, used by every block.

    Args:
        lengths: Tokens of the documents.
        has_closed_prefix: Whether a prefix attends to itself only; else every token of a document
            attends to all of it.
        backend: What computes it, see `choose_backend`.
        head_width: Channels of a head.
        device: Where queries and keys are.

    Raises:
        ValueError: If the backend is unknown, or cannot train with such heads on the device.
    """

    def __init__(
        self,
        lengths: DocumentLengths,
        *,
        has_closed_prefix: bool,
        backend: Backend,
        head_width: int,
        device: torch.device,
    ) -> None:
        backend = choose_backend(backend, head_width=head_width, device_type=device.type)
        self.lengths, self.has_closed_prefix = lengths, has_closed_prefix
        self.backend, self.device = backend, device
        self._mask: Any = None
        if backend == "dense":
            self._mask = document_mask(*self._marks())
        elif backend == "flex":
            self._mask = self._block_mask()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend.

        Args:
            q: Queries `(1, n, l, e)`.
            k: Keys `(1, m, l, e)` where `m` divides `n`.
            v: Values, shaped like `k`.

        Returns:
            `(1, n, l, e)`.
        """
        if self.backend == "dense":
            return attend(q, k, v, self._mask)
        if self.backend == "flex":
            return _flex(self.device.type)(
                q.to(v.dtype),
                k.to(v.dtype),
                v,
                block_mask=self._mask,
                enable_gqa=k.shape[1] != q.shape[1],
            )
        return self._attend_by_document(q, k, v)

    def _attend_by_document(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces, start = [], 0
        for prefix, rest in zip(*self.lengths, strict=True):
            middle, end = start + prefix, start + prefix + rest
            first = start  # of the queries that see the whole document
            if self.has_closed_prefix and prefix:
                inside = slice(start, middle)
                pieces.append(attend(q[:, :, inside], k[:, :, inside], v[:, :, inside]))
                first = middle
            if end > first:
                pieces.append(attend(q[:, :, first:end], k[:, :, start:end], v[:, :, start:end]))
            start = end
        return torch.cat(pieces, dim=2)

    def _marks(self) -> tuple[Tensor, Tensor | None]:
        """Number of each token's document, and whether it is of a prefix that sees only itself."""
        parts = torch.tensor(self.lengths).T.flatten()  # prefix, rest, prefix, rest, ...
        part = document_index(parts, self.lengths.total).to(self.device)
        return part // 2, part % 2 == 0 if self.has_closed_prefix else None

    def _block_mask(self) -> Any:
        """The same as a block mask, made without the table of all pairs where it is compiled."""
        document, is_prefix = self._marks()

        def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = document[query] == document[key]
            return same if is_prefix is None else same & (is_prefix[key] | ~is_prefix[query])

        length = self.lengths.total
        make = _compiled(create_block_mask) if self.device.type == "cuda" else create_block_mask
        return make(sees, None, None, length, length, device=self.device)


_compiled = lru_cache(maxsize=2)(torch.compile)


def _flex(device_type: str) -> Callable[..., Tensor]:
    """FlexAttention, compiled where that is possible with gradients."""
    kernel: Callable[..., Any] = flex_attention
    if device_type == "cuda":
        return _compiled(kernel)

    def uncompiled(*tensors: Tensor, **options: Any) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            return kernel(*tensors, **options)

    return uncompiled
