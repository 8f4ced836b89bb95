"""Pages in a device's memory that the node may still touch.

Owns: what was given up and has not ended, with everything that keeps its memory alive.

Invariants: nothing of it is let go before the node says that nobody touches it, or is gone; while it is full, nothing
is loaded or stored, so a node that stands still does not take all memory.

Left to others: what pages are, and when the node is gone (the compiled part).
"""

from __future__ import annotations

import kvd

#: Loads and stores, each with its pages.
_ENTRIES_MAX = 8
#: How long one of them is waited for before a next load or store.
_LOOK_S = 0.05
_UnderWay = kvd.Loading | kvd.Storing | None


class Quarantine:
    def __init__(self) -> None:
        self._entries: list[tuple[_UnderWay, list[kvd.Pages], object]] = []

    def is_full(self) -> bool:
        """Lets go of what has ended, first."""
        self._entries = [one for one in self._entries if not _has_ended(one[0], one[1], _LOOK_S)]
        return len(self._entries) >= _ENTRIES_MAX

    def end(self, under_way: _UnderWay, pages: list[kvd.Pages], keep: object, timeout_s: float) -> None:
        """Closes the pages of what has ended; the rest stays here, with what it keeps alive."""
        if not _has_ended(under_way, pages, timeout_s):
            self._entries.append((under_way, pages, keep))


def _has_ended(under_way: _UnderWay, pages: list[kvd.Pages], timeout_s: float) -> bool:
    return (under_way is None or under_way.done()) and all([one.close(timeout_s) for one in pages])
