"""The device that an engine computes on: which tensors are in its memory, what a node opens them by, and when work is done.

Owns the one place where CUDA is asked. Invariant: a mark that is done says that everything enqueued before it was made is: on the host that
is so at once. Leaves to others: what must wait for which mark (`worker`), drivers (`kvd._cuda`). Tests have a stand-in in place of `Cuda`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from kvd._cuda import Allocation


class Mark(Protocol):
    """A point in the engine's work."""

    def done(self) -> bool:
        """Whether all work before it is done; asking waits for nothing."""

    def wait(self) -> None:
        """Until it is. The engine's own work always ends, or the engine does."""


class Device(Protocol):
    """Where an engine may keep its pages beside the host."""

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether its memory is the device's."""

    def allocations(self, spans: Iterable[tuple[int, int]]) -> list[Allocation]:
        """What spans of addresses (first, bytes) lie in; whoever asks closes them."""

    def mark(self) -> Mark:
        """After everything that the engine has enqueued so far."""


class _Done:
    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


DONE: Mark = _Done()
"""Of work on the host: who returns has computed."""


class _Event:
    """Of CUDA; `wait` sleeps rather than spins, as the engine's threads need the processor."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(blocking=True)
        self._event.record(torch.cuda.current_stream())

    def done(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._event.synchronize()


class Cuda:
    """The rank's own CUDA device, which is the current one of its process."""

    def holds(self, tensor: torch.Tensor) -> bool:
        return bool(tensor.is_cuda)

    def allocations(self, spans: Iterable[tuple[int, int]]) -> list[Allocation]:
        from kvd import _cuda

        return _cuda.allocations(spans)

    def mark(self) -> Mark:
        return _Event()
