"""Stands in for the package `mooncake` where this folder is on PYTHONPATH. See `kvd.mooncake`."""
