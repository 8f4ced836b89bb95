"""kvd: a block store for the KV caches of LLM inference.

A `Client` is this process' session with the node's daemon. A `Space` says what a model's blocks mean and
makes chains of block ids out of prompts; blocks are stored and loaded by chain. Errors are exceptions with
fields; a miss is a value.

Connectors for engines are in `kvd.vllm`, `kvd.sglang`, `kvd.trtllm`, `kvd.mooncake` and `kvd.torch`; none is
imported from here.
"""

from kvd._errors import InvalidError, KvdError, LimitError, TimedOutError, UnavailableError
from kvd._kvd import (
    AUDIO,
    EMBEDDING,
    IMAGE,
    Chain,
    Claim,
    Client,
    Fill,
    Group,
    HandOff,
    Hints,
    LayerMemory,
    Layout,
    Loaded,
    Loading,
    Match,
    Memory,
    Miss,
    Pages,
    Pending,
    Space,
    Stored,
    Storing,
    Worker,
    revision_of_adapter,
    revision_of_model,
    revision_of_words,
)

__all__ = [
    "AUDIO",
    "EMBEDDING",
    "IMAGE",
    "Chain",
    "Claim",
    "Client",
    "Fill",
    "Group",
    "HandOff",
    "Hints",
    "InvalidError",
    "KvdError",
    "LayerMemory",
    "Layout",
    "LimitError",
    "Loaded",
    "Loading",
    "Match",
    "Memory",
    "Miss",
    "Pages",
    "Pending",
    "Space",
    "Stored",
    "Storing",
    "TimedOutError",
    "UnavailableError",
    "Worker",
    "revision_of_adapter",
    "revision_of_model",
    "revision_of_words",
]
