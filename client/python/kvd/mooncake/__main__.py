"""Prints the folder that, on PYTHONPATH, makes `mooncake.store` mean `kvd.mooncake` in every process."""

from pathlib import Path

print(Path(__file__).parent / "path")
