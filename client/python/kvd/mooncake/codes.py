"""Return codes and write options of Mooncake Store's API.

Owns their names here. The numbers are the API's: callers compare them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum


class Code(IntEnum):
    """What a call returns instead of raising."""

    OK = 0
    INTERNAL_ERROR = -1
    NO_AVAILABLE_HANDLE = -200
    INVALID_PARAMS = -600
    OBJECT_NOT_FOUND = -704
    RPC_FAIL = -900
    UNAVAILABLE_IN_CURRENT_STATUS = -1010
    UNAVAILABLE_IN_CURRENT_MODE = -1011


@dataclass
class ReplicateConfig:
    """Accepted with every write. kvd decides copies, placement and eviction by what they are worth, so all of
    it is a wish that is not followed; nothing here changes what is read."""

    replica_num: int = 1
    with_soft_pin: bool = False
    with_hard_pin: bool = False
    soft_pin_action: int = 0
    soft_pin_ttl_ms: int | None = None
    preferred_segment: str = ""
    preferred_segments: list[str] = field(default_factory=list)
    prefer_alloc_in_same_node: bool = False
    data_type: int = 0
    group_ids: list[str] | None = None
    nof_replica_num: int = 0
    preferred_nof_segments: list[str] = field(default_factory=list)
    dfs_replica_num: int = 0
