"""What the scheduler's half knows of one request: its chain, its lookup, what of it is being stored.

Owns nothing but these facts. Leaves to others: what follows from them (`scheduler`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import kvd
from kvd.vllm.told import Told

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass
class Lookup:
    """A question to the node, and its answer."""

    skip: int
    pending: kvd.Pending[kvd.Match]
    asked_s: float
    until_s: float
    key: bytes
    chain: kvd.Chain
    found: kvd.Match | None = None
    computed: int = 0
    """Tokens that the engine had of its own when the answer was given."""
    tokens: int = 0
    """Tokens from the beginning that will be there after the load."""
    wait: bool = False
    claims: bool = False
    """What another engine has left for the request is taken with it."""

    def drop(self) -> None:
        """Gives the lease back."""
        if self.found is not None:
            self.found.release()
        else:
            self.pending.cancel()


@dataclass
class Tracked:
    """What is known of a request."""

    request: Request
    chain: kvd.Chain | None = None
    lookup: Lookup | None = None
    loading: bool = False
    failures: int = 0
    stored: int = 0
    """Tokens from the beginning that are stored, or being stored."""
    stores: set[int] = field(default_factory=set)
    over: bool = False
    """Nothing more of it is stored."""
    claimed: bool = False
    """Asked for what another engine has left: nodes give that once."""
    handed_off: bool = False
    """Its whole prompt is stored, or being stored, for whoever claims it."""
    told: Told = field(default_factory=Told)
    """The router's word about it, and its client's."""
    heard: bool = False
    """The node has been told what the client knows."""
    hint_pending: kvd.Pending[kvd.Match] | None = None

    def extend(self, tokens: int) -> None:
        """Its chain, to so many tokens."""
        if self.chain is not None:
            self.chain.extend(list(self.request.all_token_ids[self.chain.tokens : tokens]))

    def drop_lookup(self) -> None:
        """Whoever asks next asks anew."""
        if self.lookup is not None:
            self.heard = True
            self.lookup.drop()
            self.lookup = None

    def hint(self, space: kvd.Space, key: bytes) -> None:
        """What its client knows reaches the node, though the engine has all of the prompt and looks nothing up: once."""
        blocks = 0 if self.chain is None or self.told.hints is None else len(self.chain)
        if self.chain is None or blocks == 0 or self.heard or self.lookup is not None:
            return
        self.heard = True
        self.hint_pending = space.match_soon(key, self.chain.prefix(blocks), skip=blocks, hints=self.told.hints)


@dataclass
class Ending:
    """A store, until every rank has said how it ended."""

    request: str
    begin: int
    """Its first token."""
    ranks: int = 0
    dropped: bool = False
