"""A rank's pages: the engine's own memory, as kvd is told where it lies, on the host or on the rank's device.

Owns what `register_kv_caches` gave, and the node's opening of a device's pages. Invariants: what can never be served is refused when the engine starts,
though no node is there yet; nothing here waits for the node longer than it is told to. Leaves to others: when pages may be touched (`worker`), how
one layer lies (`memory`).
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

import torch

import kvd
from kvd._errors import of
from kvd._tensors import extent
from kvd.vllm.memory import Layer, layer_of

if TYPE_CHECKING:
    from kvd._cuda import Allocation
    from kvd.vllm.device import Device
    from kvd.vllm.identity import GroupPages, Identity

_unavailable = functools.partial(of, "unavailable")

logger = logging.getLogger("vllm.kvd")

OPEN_AGAIN_S = 1.0
"""From a node's refusal to open pages, or its absence, to the next time it is asked: meanwhile nothing is loaded or stored."""
_ALLOCATOR_FLAGS = "--enable-sleep-mode and --enable-cumem-allocator"
"""Of vLLM: with them its memory is not cudaMalloc's, and has no handle that another process could open."""


class RankPages:
    """One rank's."""

    def __init__(self, engine: Identity, layers: dict[str, Any], device: Device) -> None:
        self._engine, self._layers, self._device = engine, layers, device
        self.on_device = False
        self._described: list[tuple[list[Layer], dict[str, int]]] = []
        self._host: list[kvd.Pages] = []
        self._found: list[Allocation] = []
        self._ranges: list[tuple[int, int, bytes | list[tuple[int, int]]]] = []
        self._uuid = b""
        self._ratios: list[int] = []
        self._places: dict[str, tuple[int, int]] = {}
        self._opening: _Opening | None = None

    def register(self, caches: dict[str, torch.Tensor], num_blocks: int) -> None:
        """As `register_kv_caches`: reads how the tensors lie, refuses what it cannot."""
        self._described, self._host, self._ratios, self._opening = [], [], [], None
        self._lose()
        tensors = [caches[name] for group in self._engine.groups for name in group.layer_names]
        on_device = [self._device.holds(tensor) for tensor in tensors]
        self.on_device = any(on_device)
        if self.on_device != all(on_device):
            raise _refused(f"{sum(on_device)} of {len(tensors)} on a device", "keep all of them there")
        for at, group in enumerate(self._engine.groups):
            with torch.device("cpu"):  # what is worked out here; what a backend is given is on its tensors' device
                described = [
                    layer_of(caches[name], group, self._layers[name], self.on_device) for name in group.layer_names
                ]
            self._add(at, group, described, num_blocks)
        if self.on_device:
            self._find(tensors)

    def _add(self, at: int, group: GroupPages, described: list[Layer], num_blocks: int) -> None:
        tokens, pages = {one.tokens for one in described}, {one.pages for one in described}
        if len(tokens) != 1 or len(pages) != 1:
            raise _refused(f"pages of {tokens} tokens", "all layers of a group have the same")
        page_tokens, count = tokens.pop(), pages.pop()
        self._ratios.append(group.page_tokens // page_tokens)
        if group.page_tokens % page_tokens or count < num_blocks * self._ratios[-1]:
            raise _refused(
                f"{count} pages of {page_tokens} tokens for {num_blocks} of {group.page_tokens}",
                "kvd expected the engine's pages, or an equal cut of them",
            )
        shape = {
            "page_tokens": page_tokens,
            "pages": count,
            "group": at,
            "first_layer": group.first_layer,
            "first_head": group.first_head,
            "heads": group.heads,
        }
        # a device's are checked in the same way, and nobody copies through these
        checked = kvd.Pages(self._engine.layout, [one.of_host() for one in described], **shape)
        self._described.append((described, shape))
        self._host += [] if self.on_device else [checked]
        self._places |= {name: (at, group.first_layer + layer) for layer, name in enumerate(group.layer_names)}
        where = "the device's" if self.on_device else "the host's"
        logger.info(
            "kvd: group %d: %d layers in %s memory, pages of %d tokens, parts %s",
            at,
            len(described),
            where,
            page_tokens,
            checked.parts,
        )

    def _find(self, tensors: list[torch.Tensor]) -> None:
        """The allocations that they are in: an engine may have one for all of its layers."""
        try:
            self._found = self._device.allocations((tensor.data_ptr(), extent(tensor)) for tensor in tensors)
        except kvd.InvalidError as error:
            raise _refused(error.message, f"{error.fix}; for vLLM: without {_ALLOCATOR_FLAGS}") from error
        devices = {one.device for one in self._found}
        if len(devices) != 1:
            raise _refused(f"on {len(devices)} devices", "give each rank one device")
        self._uuid = devices.pop()
        self._ranges = [(one.address, one.size, one.share) for one in self._found]

    def _lose(self) -> None:
        """Descriptors of memory that nobody will be given any more."""
        found, self._found, self._ranges = self._found, [], []
        for one in found:
            one.close()

    def kernel_tables(self, tables: list[list[int]]) -> list[list[int]]:
        """Page tables in the kernels' pages, which may be cuts of the engine's."""
        cut = []
        for table, ratio in zip(tables, self._ratios, strict=True):
            cut.append([page * ratio + part if page >= 0 else -1 for page in table for part in range(ratio)])
        return cut

    def place(self, layer_name: str) -> tuple[int, int]:
        """A layer's group, and its number there."""
        return self._places[layer_name]

    def open(self, space: kvd.Space) -> None:
        """Has the node open them for copies in a space, if it did not; waits for nothing."""
        opening = self._opening
        if self.on_device and (opening is None or opening.space is not space or opening.is_stale()):
            said = "" if opening is None else opening.said
            self._opening = _Opening(space, [self._in(space, *one) for one in self._described], said)

    def of(self, space: kvd.Space, wait_s: float = 0.0) -> list[kvd.Pages] | None:
        """For copies in a space; `None`: the node is still opening them; raises `UnavailableError` if it did not. `wait_s`: once for each opening."""
        self.open(space)
        return self._host if self._opening is None else self._opening.pages(wait_s)

    def _in(self, space: kvd.Space, described: list[Layer], shape: dict[str, int]) -> kvd.Pages:
        layers = [one.of_device() for one in described]
        return kvd.Pages.on_device(space, layers, device=self._uuid, ranges=self._ranges, **shape)

    def forget(self) -> None:
        """Another daemon is there: it may open what the one before refused."""
        self._opening = None

    def close(self, timeout_s: float) -> bool:
        """Whether the node touches them no more; who has not got that word leaves their memory alone."""
        opening, self._opening = self._opening, None
        self._lose()
        return opening is None or opening.close(timeout_s)


class _Opening:
    """A node is told of a device's pages, which may take it as long as it wants: on a thread of its own. Copies would have it open them as well, but
    none of those could tell a refusal that stays from a node that is away."""

    def __init__(self, space: kvd.Space, pages: list[kvd.Pages], said: str) -> None:
        self.space, self._pages, self.said = space, pages, said
        self._failed = False
        self._ended_s = 0.0
        self._waited = False
        self._thread = threading.Thread(target=self._open, name="kvd-open", daemon=True)
        self._thread.start()

    def _open(self) -> None:
        try:
            for one in self._pages:
                one.open()
        except kvd.KvdError as error:
            if str(error) != self.said:
                logger.warning(
                    "kvd: the node does not open this engine's pages; nothing is loaded or stored: %s", error
                )
            self._failed, self.said = True, str(error)
        self._ended_s = time.monotonic()

    def is_stale(self) -> bool:
        """It is time to ask again."""
        failed = self._failed and not self._thread.is_alive()
        return failed and time.monotonic() - self._ended_s >= OPEN_AGAIN_S

    def pages(self, wait_s: float) -> list[kvd.Pages] | None:
        if not self._waited:
            self._waited = wait_s > 0.0
            self._thread.join(wait_s)
        if self._thread.is_alive():
            return None
        if self._failed:
            raise _unavailable("pages", "the node does not open them", "see the log, once, for what stands against it")
        return self._pages

    def close(self, timeout_s: float) -> bool:
        """Else a thread goes on with it, and keeps what the memory needs."""
        closing = threading.Thread(target=self._close, name="kvd-close", daemon=True)
        closing.start()
        closing.join(timeout_s)
        return not closing.is_alive()

    def _close(self) -> None:
        self._thread.join()
        for one in self._pages:
            one.close()


def _refused(value: str, fix: str) -> kvd.InvalidError:
    return kvd.InvalidError("invalid", "kv_caches", value, fix)
