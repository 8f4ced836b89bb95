"""What the router says of a request, in `kv_transfer_params.kvd`: its name among engines, and which half of a split request this is.

Owns reading it. Invariant: whatever a client writes there is a word or none, never an error: at worst a request is computed as if nobody had
said anything. Leaves to others: what follows (`scheduler`), whose promise it is (`standing`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

KEY_BYTES_MAX = 64
"""As nodes take them. What is longer is no key."""
NODE_BYTES_MAX = 256
"""As above."""


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

    @classmethod
    def of(cls, params: dict[str, Any] | None) -> Told:
        """Out of a request's `kv_transfer_params`."""
        word = (params or {}).get("kvd")
        if not isinstance(word, dict):
            return cls()
        reservation = word.get("reservation")
        number = reservation if isinstance(reservation, int) and 0 <= reservation < 1 << 64 else None
        key, node = _text(word.get("request_key"), KEY_BYTES_MAX), _text(word.get("prefill_node"), NODE_BYTES_MAX)
        if key and word.get("do") == "prefill":
            return cls(number, hands_off=key)
        if key and node:
            return cls(number, claims=key, node=node)
        return cls(number)


def _text(value: object, bytes_max: int) -> str:
    return value if isinstance(value, str) and len(value.encode(errors="replace")) <= bytes_max else ""
