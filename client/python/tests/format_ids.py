"""FORMAT.md sections 1 and 2 read a second time: what ids must be, in plain Python.

Owns nothing of the product, which hashes in one place (`proto`). Golden vectors say whether this reading is
right (`test_ids.py`); then any prompt the package has hashed can be held against it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from blake3 import blake3


class Extra(NamedTuple):
    """What a block depends on besides its tokens."""

    offset: int
    kind: int
    content: bytes


class Span(NamedTuple):
    """What takes several tokens of a prompt; ordered as the format has it."""

    position: int
    kind: int
    digest: bytes
    tokens: int


def _u32(number: int) -> bytes:
    return struct.pack("<I", number)


def _counted(data: bytes) -> bytes:
    return _u32(len(data)) + data


def _id(space: bytes, message: bytes) -> bytes:
    return blake3(message, key=space).digest()[:16]


def root(space: bytes, adapter: bytes = b"", salt: bytes = b"") -> bytes:
    """The parent of a prompt's first block."""
    return _id(space, b"\x01" + _counted(adapter) + _counted(salt))


def block(
    space: bytes, parent: bytes, tokens: Sequence[int], extras: Iterable[Extra] = (), *, tail: bool = False
) -> bytes:
    """A block, or what is left at a prompt's end."""
    extras = list(extras)
    packed = b"".join(_u32(extra.kind)[:1] + _u32(extra.offset) + _counted(extra.content) for extra in extras)
    body = _u32(len(tokens)) + b"".join(map(_u32, tokens)) + _u32(len(extras)) + packed
    return _id(space, (b"\x03" if tail else b"\x02") + parent + body)


def named(space: bytes, key: bytes) -> bytes:
    """A block by an engine's own key."""
    return _id(space, b"\x04" + _counted(key))


def _touching(spans: Iterable[Span], first: int, tokens: int) -> list[Extra]:
    """Every span that takes tokens of a block, and how many it has before it."""
    extras = []
    for span in sorted(spans):
        begins, ends = max(span.position, first), min(span.position + span.tokens, first + tokens)
        if begins < ends:
            before = begins - span.position
            extras.append(Extra(begins - first, span.kind, span.digest + _u32(before)))
    return sorted(extras, key=lambda extra: (extra.offset, extra.kind))


def chain(
    space: bytes,
    parent: bytes,
    tokens: Sequence[int],
    block_tokens: int,
    spans: Iterable[Span] = (),
    *,
    with_tail: bool = False,
) -> list[bytes]:
    """The ids of a prompt's whole blocks, and of its tail if that is asked for."""
    ids, spans = [], list(spans)
    for first in range(0, len(tokens), block_tokens):
        here = tokens[first : first + block_tokens]
        tail = len(here) < block_tokens
        if tail and not with_tail:
            break
        parent = block(space, parent, here, _touching(spans, first, len(here)), tail=tail)
        ids.append(parent)
    return ids
