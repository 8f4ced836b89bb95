"""Mooncake Store's Python API over kvd, for connectors that are written against it.

Owns the names such connectors import. `from kvd.mooncake import MooncakeDistributedStore, ReplicateConfig` in
place of `from mooncake.store import ...` is the whole change; `install()` makes it for code that cannot be
edited, and the folder that `python -m kvd.mooncake` prints, put on PYTHONPATH, makes it for every process.
Interfaces only: none of Mooncake's code.

Left to others: objects and their sizes (`store`, `objects`), memory (`buffers`).
"""

from __future__ import annotations

import sys
import types

from kvd.mooncake.allocator import MooncakeHostMemAllocator
from kvd.mooncake.codes import ReplicateConfig
from kvd.mooncake.handle import BufferHandle
from kvd.mooncake.store import MooncakeDistributedStore

__all__ = [
    "BufferHandle",
    "MooncakeDistributedStore",
    "MooncakeHostMemAllocator",
    "ReplicateConfig",
    "install",
]


def install() -> None:
    """From now on, `import mooncake.store` in this process means this module."""
    package = types.ModuleType("mooncake")
    package.__path__ = []
    store = types.ModuleType("mooncake.store")
    for name in __all__[:-1]:
        setattr(store, name, globals()[name])
    package.store = store  # type: ignore[attr-defined]
    sys.modules["mooncake"], sys.modules["mooncake.store"] = package, store
