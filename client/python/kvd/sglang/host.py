"""SGLang's host memory pools as this backend sees them: where the bytes of a page lie.

Owns the two forms of a page: in place, the pieces that the pool names by address (`get_page_buffer_meta`), or
flat, a copy that the pool makes and takes back. Invariants: all pages of a pool have the same sizes of pieces
in the same order; a form is chosen once, when the pool is registered.

Left to others: what is stored (`kvd._objects`), who asks (`storage`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import kvd
from kvd._objects import Piece, Shape

#: Pieces, page by page.
Places = list[list[Piece]]
#: Called with a page's number once its bytes are there.
Landed = Callable[[int], None]


class PageForm(Protocol):
    """How one pool's pages are read and written."""

    name: str
    shape: Shape

    def sources(self, indices: Any, pages: int) -> AbstractContextManager[Places]:
        """Where the bytes of `pages` pages lie, whose slots are `indices`."""

    def targets(self, indices: Any, pages: int) -> AbstractContextManager[tuple[Places, Landed]]:
        """Where to put them, and what to call when a page has come."""


def page_tokens(pool: Any) -> int:
    """Slots of one page, as indices count them."""
    return int(getattr(pool, "logical_page_size", None) or getattr(pool, "page_size", 1) or 1)


def tensor_piece(tensor: Any) -> Piece:
    """Where a contiguous tensor's (or array's) bytes lie."""
    if hasattr(tensor, "data_ptr"):
        if not tensor.is_contiguous():
            raise kvd.InvalidError("invalid", "page", "a tensor that is not contiguous", "give flat pages")
        return int(tensor.data_ptr()), int(tensor.nbytes)
    return int(tensor.ctypes.data), int(tensor.nbytes)


class InPlace:
    """Pages read and written where they are."""

    name = "pieces"

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._tokens = page_tokens(pool)
        sizes = pool.get_page_buffer_meta(array("q", range(self._tokens)))[1]
        self.shape = Shape(tuple(int(size) for size in sizes if size), self._tokens)
        if not self.shape.sizes:
            raise ValueError("a pool without bytes")

    def _places(self, indices: Any, pages: int) -> Places:
        """Grouped by page, as the pool lists them; empty pieces (models without some state) left out."""
        ptrs, sizes = self._pool.get_page_buffer_meta(indices)
        pieces = [(int(ptr), int(size)) for ptr, size in zip(ptrs, sizes, strict=True) if size]
        each = len(self.shape.sizes)
        grouped = [pieces[at : at + each] for at in range(0, len(pieces), each)]
        if len(grouped) != pages or any(tuple(size for _, size in page) != self.shape.sizes for page in grouped):
            raise ValueError(f"the pool names other pieces than it did: {pages} pages, {len(pieces)} pieces")
        return grouped

    @contextmanager
    def sources(self, indices: Any, pages: int) -> Iterator[Places]:
        """The pool's memory."""
        yield self._places(indices, pages)

    @contextmanager
    def targets(self, indices: Any, pages: int) -> Iterator[tuple[Places, Landed]]:
        """The same memory."""
        yield self._places(indices, pages), lambda page: None


class Flat:
    """Pages as the pool copies them out and takes them back, for layouts whose pages it cannot name by
    address."""

    name = "flat"

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._tokens = page_tokens(pool)
        self.shape = Shape((tensor_piece(pool.get_dummy_flat_data_page())[1],), self._tokens)

    def _slots(self, indices: Any, pages: int) -> list[int]:
        return [int(indices[page * self._tokens]) for page in range(pages)]

    @contextmanager
    def sources(self, indices: Any, pages: int) -> Iterator[Places]:
        """Copies, alive until the end of the block."""
        copies = [self._pool.get_data_page(slot, flat=True) for slot in self._slots(indices, pages)]
        yield [[tensor_piece(copy)] for copy in copies]

    @contextmanager
    def targets(self, indices: Any, pages: int) -> Iterator[tuple[Places, Landed]]:
        """Copies, given to the pool page by page as they come."""
        slots = self._slots(indices, pages)
        copies = [self._pool.get_dummy_flat_data_page() for _ in slots]
        yield (
            [[tensor_piece(copy)] for copy in copies],
            lambda page: self._pool.set_from_flat_data_page(slots[page], copies[page]),
        )


def form_of(pool: Any) -> PageForm:
    """In place where the pool can, else flat."""
    try:
        return InPlace(pool)
    except (AttributeError, AssertionError, NotImplementedError, ValueError):
        return Flat(pool)


def indices_of(indices: Any, keys: Sequence[str], pool: Any) -> Any | None:
    """The slots of whole pages, one a key; `None`: there are more or fewer."""
    if indices is None or len(indices) != len(keys) * page_tokens(pool):
        return None
    return indices
