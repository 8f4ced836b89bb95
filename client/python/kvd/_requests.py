"""What an engine's requests want from kvd: which blocks to load, which to store, and in which pages.

Owns the bookkeeping of every request that a scheduler has: its chain, its pages, the blocks known to be
stored and the blocks promised to the engine. Decides only; the connector asks kvd, moves bytes and tells what
came of it.

Invariants: no I/O, no clock, no torch, no engine. The prompt's last token is never promised: an engine has
to compute something. A promise ends on a boundary of blocks and of pages. A block is stored only when the
engine has computed all its tokens and each of its tokens has a page. What is doubtful is left out: a miss.

Left to others: block ids (`Space.chain`), leases and bytes (the connectors), which requests may share at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvd import Chain

#: Requests kept at a time. Those beyond neither load nor store: an engine that never says that requests
#: are finished must not fill this process.
REQUESTS_MAX = 65_536
#: A page of tokens that nobody wants moved.
NO_PAGE = -1


@dataclass(frozen=True)
class Ask:
    """How much of `chain` does kvd have? Blocks before `first` are of no use: the engine has them."""

    request_id: int
    chain: Chain
    first: int


@dataclass(frozen=True)
class Span:
    """Blocks `first..end` of a request. `table[i]` is the page of the prompt's i-th page of tokens, or -1."""

    request_id: int
    first: int
    end: int
    table: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """What one forward pass of one request needs: before it, a load; after it, a store."""

    load: Span | None
    store: Span | None


@dataclass
class _Request:
    chain: Chain
    computed_tokens: int
    tokens: int
    known_blocks: int = 0
    promised_tokens: int = 0
    pages: list[int] = field(default_factory=list)


class Requests:
    """The requests of one engine instance. One thread at a time."""

    def __init__(self, block_tokens: int, page_tokens: int, new_chain: Callable[[bytes], Chain]) -> None:
        large, small = max(block_tokens, page_tokens), min(block_tokens, page_tokens)
        if small < 1 or large % small != 0:
            raise ValueError(
                f"block_tokens: {block_tokens} and pages of {page_tokens} tokens do not divide each other; "
                f"set block_tokens to {page_tokens}, or to a multiple or divisor of it"
            )
        self._block_tokens = block_tokens
        self._page_tokens = page_tokens
        self._unit_tokens = large
        self._new_chain = new_chain
        self._requests: dict[int, _Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._requests

    def begin(self, request_id: int, tokens: Sequence[int], computed_tokens: int, salt: bytes = b"") -> Ask | None:
        """A prompt arrives, or comes back from its beginning. What to ask kvd, if that can be of use."""
        self._requests.pop(request_id, None)
        if len(self._requests) >= REQUESTS_MAX:
            return None
        chain = self._new_chain(salt)
        chain.extend(tokens)
        self._requests[request_id] = _Request(chain, computed_tokens, len(tokens))
        end = self._floor(len(tokens) - 1)
        if computed_tokens % self._page_tokens != 0 or end <= computed_tokens:
            return None
        return Ask(request_id, chain.prefix(end // self._block_tokens), computed_tokens // self._block_tokens)

    def promise(self, request_id: int, blocks: int) -> int:
        """The prompt's first `blocks` blocks are in hand: how many tokens more than the engine's own that is.

        Engines differ in what they do about a promise that is not kept; see the connectors.
        """
        request = self._requests[request_id]
        request.known_blocks = blocks
        end = min(self._floor(blocks * self._block_tokens), self._floor(request.tokens - 1))
        request.promised_tokens = max(0, end - request.computed_tokens)
        return request.promised_tokens

    def cancel(self, request_id: int, start: int) -> int:
        """The engine will not take what was promised from token `start` on. How many tokens it will take."""
        request = self._requests.get(request_id)
        if request is None:
            return 0
        kept = self._floor(max(start, 0)) - request.computed_tokens
        request.promised_tokens = max(0, min(request.promised_tokens, kept))
        return request.promised_tokens

    def step(
        self,
        request_id: int,
        new_tokens: Sequence[int],
        new_pages: Sequence[int],
        computed_tokens: int,
        scheduled_tokens: int,
    ) -> Step:
        """The next forward pass computes `scheduled_tokens` of the request, behind `computed_tokens`.

        Tokens and pages follow those that `begin` and earlier steps were given. An engine may or may not
        count what it was promised as computed, in the request's first step.
        """
        request = self._requests.get(request_id)
        if request is None:
            return Step(None, None)
        request.pages.extend(new_pages)
        request.chain.extend(new_tokens)
        request.tokens += len(new_tokens)
        promised = request.promised_tokens if computed_tokens == request.computed_tokens else 0
        valid = computed_tokens + promised + scheduled_tokens
        return Step(self._take_promise(request_id, request), self._to_store(request_id, request, valid))

    def tokens(self, request_id: int) -> int:
        """How many of the request's tokens are known here."""
        request = self._requests.get(request_id)
        return 0 if request is None else request.tokens

    def chain(self, request_id: int, blocks: int) -> Chain:
        """The chain of the request's first `blocks` blocks."""
        return self._requests[request_id].chain.prefix(blocks)

    def end(self, request_id: int) -> None:
        """The request is over, or its pages are gone: nothing of it is remembered."""
        self._requests.pop(request_id, None)

    def _take_promise(self, request_id: int, request: _Request) -> Span | None:
        start, end = request.computed_tokens, request.computed_tokens + request.promised_tokens
        request.promised_tokens = 0
        if start == end:
            return None
        assert end // self._page_tokens <= len(request.pages), "the engine gave no pages for what it was promised"
        table = [NO_PAGE] * (start // self._page_tokens)
        table += request.pages[start // self._page_tokens : end // self._page_tokens]
        return Span(request_id, start // self._block_tokens, end // self._block_tokens, tuple(table))

    def _to_store(self, request_id: int, request: _Request, valid_tokens: int) -> Span | None:
        paged = len(request.pages) * self._page_tokens
        end = min(valid_tokens, request.tokens, paged) // self._block_tokens
        first = request.known_blocks
        if first >= end:
            return None
        # Pages are read whole: a store begins with the first block in its page.
        first -= first % max(1, self._page_tokens // self._block_tokens)
        pages = request.pages[: -(-end * self._block_tokens // self._page_tokens)]
        holed = [i for i, page in enumerate(pages) if page < 0]
        if holed and (holed[-1] + 1) * self._page_tokens > first * self._block_tokens:
            return None
        request.known_blocks = end
        return Span(request_id, first, end, tuple(pages))

    def _floor(self, tokens: int) -> int:
        return tokens // self._unit_tokens * self._unit_tokens
