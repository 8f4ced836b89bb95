"""KvdConnector for a vLLM on the CPU whose KV caches are in the stand-in's memory: as on a GPU, without one.

Owns where such an engine's caches are. Invariant: engines with any other connector are left alone. Named by `kv_connector_module_path`; the engine's own
code runs as it is, but for the one allocation of its caches.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from on_device import StandIn
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.v1.worker import gpu_model_runner, utils

import kvd.vllm
from kvd.vllm.device import Device

DEVICE = StandIn(asks=3)
"""Work is not done when it is asked for the first time."""


class KvdConnector(kvd.vllm.KvdConnector):
    """As it is, on a device that is none."""

    def _device(self) -> Device:
        return DEVICE


class _Torch:
    """torch, whose zeros are in the device's memory."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, size: int, *, dtype: Any, device: Any) -> Any:
        """As vLLM asks for it."""
        return DEVICE.allocate(size * dtype.itemsize).view(dtype)


_allocate = gpu_model_runner.allocate_kv_cache


def _allocated(*given: Any, **named: Any) -> dict[str, torch.Tensor]:
    if not has_kv_transfer_group() or not isinstance(get_kv_transfer_group(), KvdConnector):
        return _allocate(*given, **named)
    utils.torch = _Torch()
    try:
        return _allocate(*given, **named)
    finally:
        utils.torch = torch


gpu_model_runner.allocate_kv_cache = _allocated
