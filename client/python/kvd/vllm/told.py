"""What the router says of a request, in `kv_transfer_params.kvd`: its name among engines, and which half of a split request this is; and what
a client says there of its future.

Owns reading it. Invariant: whatever a client writes there is a word or none, never an error: at worst a request is computed as if nobody had
said anything. Leaves to others: what follows (`scheduler`), whose promise it is (`standing`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import kvd

KEY_BYTES_MAX = 64
"""As nodes take them. What is longer is no key."""
NODE_BYTES_MAX = 256
"""As above."""
HINT_PRIORITY_MAX = 1000
"""Percent. What is more is no hint."""
HINT_MS_MAX = 86_400_000
"""A day. What is longer is cut to it."""


@dataclass(frozen=True)
class Told:
    """The router's word; nothing is said of a request that came without one."""

    reservation: int | None = None
    """The promise that is used up by it."""
    hands_off: str = ""
    """This is the prefill: under this key somebody will claim the whole prompt."""
    claims: str = ""
    """This is the decode: under this key somebody has been told to leave the whole prompt."""
    node: str = ""
    """Where that is."""
    hints: kvd.Hints | None = None
    """What the client knows of what comes after it."""

    @classmethod
    def of(cls, params: dict[str, Any] | None) -> Told:
        """Out of a request's `kv_transfer_params`."""
        word = (params or {}).get("kvd")
        if not isinstance(word, dict):
            return cls()
        reservation = word.get("reservation")
        number = reservation if isinstance(reservation, int) and 0 <= reservation < 1 << 64 else None
        key, node = _text(word.get("request_key"), KEY_BYTES_MAX), _text(word.get("prefill_node"), NODE_BYTES_MAX)
        hints = _hints(word)
        if key and word.get("do") == "prefill":
            return cls(number, hands_off=key, hints=hints)
        if key and node:
            return cls(number, claims=key, node=node, hints=hints)
        return cls(number, hints=hints)


def _hints(word: dict[str, Any]) -> kvd.Hints | None:
    """As far as they make sense: each of them by itself is taken or not."""
    priority = _number(word.get("priority"))
    priority = priority if 1 <= priority <= HINT_PRIORITY_MAX else 100
    ttl_s = min(_number(word.get("ttl_ms")), HINT_MS_MAX) / 1000
    said = word.get("expects")
    expects: Literal["tool_call", "session_end"] | None = None
    if said in ("tool_call", "session_end"):
        expects = said
    return_s = min(_number(word.get("return_ms")), HINT_MS_MAX) / 1000 if expects == "tool_call" else 0.0
    if priority == 100 and not ttl_s and expects is None:
        return None
    return kvd.Hints(priority=priority, ttl_s=ttl_s, expects=expects, return_s=return_s)


def _number(value: object) -> int:
    """A whole one that is not negative, or 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _text(value: object, bytes_max: int) -> str:
    return value if isinstance(value, str) and len(value.encode(errors="replace")) <= bytes_max else ""
