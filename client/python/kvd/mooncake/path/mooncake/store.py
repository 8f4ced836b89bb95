"""Stands in for `mooncake.store`: the same names, over kvd. See `kvd.mooncake`."""

from kvd.mooncake import BufferHandle, MooncakeDistributedStore, MooncakeHostMemAllocator, ReplicateConfig

__all__ = ["BufferHandle", "MooncakeDistributedStore", "MooncakeHostMemAllocator", "ReplicateConfig"]
