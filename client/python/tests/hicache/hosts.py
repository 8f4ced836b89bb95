"""Host memory pools for tests, shaped like SGLang's: numpy memory, pages named by address or copied flat.

Owns the memory. Leaves to others: what is stored of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

PAGE_TOKENS = 16


class Host:
    """`pieces` of a page lie in buffers of their own; `page_first`: each buffer holds page after page."""

    layout = "page_first"
    dtype = "bfloat16"

    def __init__(self, pages: int, sizes: tuple[int, ...] = (65_536, 65_536), page_size: int = PAGE_TOKENS) -> None:
        self.page_size = page_size
        self.size = pages * page_size
        self.buffers = [np.zeros((pages, size), np.uint8) for size in sizes]
        self.kv_buffer: Any = self.buffers

    def fill(self, seed: int) -> None:
        """With noise that a seed gives again."""
        for at, buffer in enumerate(self.buffers):
            noise = np.random.default_rng([seed, at])
            buffer.reshape(-1)[:] = noise.integers(0, 256, buffer.size, np.uint8)

    def wipe(self) -> None:
        for buffer in self.buffers:
            buffer[:] = 0

    def copy(self) -> list[np.ndarray]:
        return [buffer.copy() for buffer in self.buffers]

    def pages(self, indices: Any) -> list[int]:
        return [int(index) // self.page_size for index in list(indices)[:: self.page_size]]

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        assert len(indices) % self.page_size == 0
        places = [
            (buffer[page].ctypes.data, buffer[page].nbytes) for page in self.pages(indices) for buffer in self.buffers
        ]
        return [ptr for ptr, _ in places], [size for _, size in places]

    def get_data_page(self, index: Any, flat: bool = True) -> np.ndarray:
        return np.concatenate([buffer[int(index) // self.page_size] for buffer in self.buffers])

    def get_dummy_flat_data_page(self) -> np.ndarray:
        return np.zeros(sum(buffer.shape[1] for buffer in self.buffers), np.uint8)

    def set_from_flat_data_page(self, index: Any, data_page: np.ndarray) -> None:
        at = 0
        for buffer in self.buffers:
            size = buffer.shape[1]
            buffer[int(index) // self.page_size] = data_page[at : at + size]
            at += size


class LayerFirst(Host):
    """Its pages cannot be named by address."""

    layout = "layer_first"

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        raise ValueError(f"Unsupported layout: {self.layout}")


def slots(pages: list[int], page_size: int = PAGE_TOKENS) -> np.ndarray:
    """Indices of whole pages."""
    return np.concatenate([np.arange(page * page_size, (page + 1) * page_size) for page in pages])


def hashes(count: int, first: int = 0) -> list[str]:
    """Keys like SGLang's."""
    return [f"{number:064x}" for number in range(first, first + count)]
