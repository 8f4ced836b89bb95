"""What a HiCache deployment says of itself: extra config and ranks, checked, and made into the identity of
its pages.

Owns which keys the extra config may have, and what is in a pool's revision. Invariant: whatever changes the
meaning of a page's bytes changes its identity; pages that every rank has alike are stored once. No I/O but a
model folder's digest.

Left to others: spaces and their fingerprints (`kvd._objects`, the node).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kvd

#: Read by SGLang before or beside us.
SGLANG_KEYS = frozenset(
    {
        "backend_name",
        "module_path",
        "class_name",
        "interface_v1",
        "prefetch_threshold",
        "prefetch_timeout_base",
        "prefetch_timeout_per_ki_token",
        "hicache_storage_pass_prefix_keys",
        "tp_lcm_size",
    }
)
#: Pools whose pages differ between tensor-parallel ranks even where the KV itself is the same on all of them.
SHARDED_POOLS = frozenset({"mamba"})
#: The longest an answered lookup is kept for the read that follows, and the shortest.
PROMISE_S_MAX = 60.0


@dataclass(frozen=True)
class Setting:
    """One key of ours in the extra config."""

    types: tuple[type, ...]
    what: str


OUR_KEYS: Mapping[str, Setting] = {
    "socket": Setting((str,), "the daemon's session socket, e.g. /var/lib/kvd/kvd.sock"),
    "tenant": Setting((str,), "a name"),
    "model": Setting((str,), "a name, if it is to differ from SGLang's"),
    "revision": Setting((str,), "what tells these weights from others, e.g. the hub's commit"),
    "epoch": Setting((int,), "a number from 0, raised when the weights change in place"),
    "numa_node": Setting((int,), "a number from 0"),
    "timeout_s": Setting((int, float), "seconds a question to the node may take"),
    "promise_s": Setting((int, float), f"seconds, at most {PROMISE_S_MAX:.0f}"),
}


def invalid(name: str, value: object, fix: str) -> kvd.InvalidError:
    """For a configuration that can never be right."""
    return kvd.InvalidError("invalid", f"hicache_storage_backend_extra_config.{name}", f"{value!r}", fix)


@dataclass(frozen=True)
class Ranks:
    """Where this process stands, as far as it matters for what its pages hold."""

    tp: tuple[int, int]
    pp: tuple[int, int]
    cp: tuple[int, int]
    dcp: tuple[int, int]
    is_mla: bool

    @property
    def writes_replicated(self) -> bool:
        """Of pages that all tensor-parallel ranks have alike, one rank writes."""
        return self.tp[0] == self.dcp[0]

    def name(self) -> str:
        """For logs and `kvctl`."""
        return f"tp{self.tp[0]}-pp{self.pp[0]}-cp{self.cp[0]}"


@dataclass(frozen=True)
class Config:
    """Everything that SGLang told this backend, checked."""

    socket: str
    tenant: str
    model: str
    revision: str
    epoch: int
    numa_node: int | None
    timeout_s: float
    promise_s: float
    interface_v1: bool
    metrics: bool
    ranks: Ranks

    @classmethod
    def of(cls, storage_config: Any) -> Config:
        """From SGLang's `HiCacheStorageConfig`; raises `kvd.InvalidError` naming what is wrong."""
        extra = dict(storage_config.extra_config or {})
        _check(extra)
        model = extra.get("model") or storage_config.model_name or ""
        return cls(
            socket=extra["socket"],
            tenant=extra.get("tenant", "default"),
            model=model,
            revision=extra.get("revision") or _digest(model),
            epoch=extra.get("epoch", 0),
            numa_node=extra.get("numa_node"),
            timeout_s=float(extra.get("timeout_s", 2.0)),
            promise_s=min(float(extra.get("promise_s", 10.0)), PROMISE_S_MAX),
            interface_v1=bool(extra.get("interface_v1", 0)),
            metrics=bool(storage_config.enable_storage_metrics),
            ranks=Ranks(
                tp=(storage_config.tp_rank, storage_config.tp_size),
                pp=(storage_config.pp_rank, storage_config.pp_size),
                cp=(storage_config.attn_cp_rank, storage_config.attn_cp_size),
                dcp=(getattr(storage_config, "dcp_rank", 0), getattr(storage_config, "dcp_size", 1)),
                is_mla=bool(storage_config.is_mla_model),
            ),
        )

    def replicated(self, pool: str) -> bool:
        """Whether every tensor-parallel rank has the same bytes in this pool."""
        return self.ranks.is_mla and pool not in SHARDED_POOLS

    def identity(self, pool: str, *, form: str, layout: str, dtype: str, sizes: Sequence[int], tokens: int) -> bytes:
        """The revision of a pool's space: pages are opaque to the node, so whatever gives them meaning is in
        it."""
        meaning = {
            "revision": self.revision,
            "pool": pool,
            "form": form,
            "layout": layout,
            "dtype": dtype,
            "sizes": list(sizes),
            "page_tokens": tokens,
            "tp": None if self.replicated(pool) else self.ranks.tp,
            "pp": self.ranks.pp,
            "cp": self.ranks.cp,
            "dcp": self.ranks.dcp,
            "is_mla": self.ranks.is_mla,
        }
        return kvd.revision_of_words(["sglang", json.dumps(meaning, sort_keys=True)])


def _check(extra: Mapping[str, Any]) -> None:
    for name, value in extra.items():
        if name in SGLANG_KEYS:
            continue
        setting = OUR_KEYS.get(name)
        if setting is None:
            raise invalid(name, value, f"no such key; give some of {', '.join(sorted(OUR_KEYS))}")
        if not isinstance(value, setting.types) or isinstance(value, bool):
            raise invalid(name, value, f"give {setting.what}")
        if isinstance(value, int | float) and value < 0:
            raise invalid(name, value, f"give {setting.what}")
    if not extra.get("socket"):
        raise invalid("socket", extra.get("socket"), f"give {OUR_KEYS['socket'].what}")


def _digest(model: str) -> str:
    """Of the weights, if `model` is a folder of them; a bare name says nothing about which weights were
    loaded."""
    if model and Path(model).is_dir():
        digest: bytes = kvd.revision_of_model(model)
        return digest.hex()
    raise invalid("revision", "", f"{model!r} is no local folder to take a digest of: give {OUR_KEYS['revision'].what}")
