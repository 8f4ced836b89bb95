"""Which prefix of a request can be restored, when its pages are spread over several pools.

Owns the meaning of SGLang's hit policies. Decides only: no I/O. Invariants: a restorable prefix is one that
every gating pool can serve; `all_pages` gates with an unbroken prefix, `trailing_pages` with the window that
ends at the prefix's end, `block_groups` never gates.

Left to others: which pages are there (`pool`), SGLang's types (`storage`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALL_PAGES, TRAILING_PAGES, BLOCK_GROUPS = "all_pages", "trailing_pages", "block_groups"


@dataclass(frozen=True)
class Verdict:
    """Of one pool: how far it reaches, and which prefixes it can restore."""

    boundary: int
    restorable: frozenset[int]


def all_pages(prefix: int) -> Verdict:
    """Every page of the prefix is needed."""
    return Verdict(prefix, frozenset(range(1, prefix + 1)))


def trailing_pages(there: Sequence[bool], window: int) -> Verdict:
    """The last `window` pages (fewer at the start) of the prefix are needed."""
    restorable, run = set(), 0
    for length, is_there in enumerate(there, start=1):
        run = run + 1 if is_there else 0
        if run >= min(max(window, 1), length):
            restorable.add(length)
    return Verdict(max(restorable, default=0), frozenset(restorable))


def block_groups(there: Sequence[bool], block_pages: int, group_pages: int) -> int:
    """Pages covered by the leading groups whose keys are all there."""
    if block_pages <= 0 or group_pages <= 0:
        return 0
    groups = 0
    while (groups + 1) * group_pages <= len(there) and all(there[groups * group_pages : (groups + 1) * group_pages]):
        groups += 1
    return groups * block_pages


def common(kv_pages: int, verdicts: Sequence[Verdict]) -> list[int]:
    """The prefixes that the KV and every gating pool can restore, shortest first."""
    return [length for length in range(1, kv_pages + 1) if all(length in verdict.restorable for verdict in verdicts)]
