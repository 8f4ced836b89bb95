"""What an operator may set in `kv_connector_extra_config`, each with its default.

Owns names, defaults and refusals. Invariant: an unknown or senseless value is refused when the engine starts, with its name and what to give.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from kvd import HandOff, InvalidError

LOADS = ("auto", "async", "layerwise")
STORES = ("all", "prompt", "none")
ROLES = ("both", "prefill", "decode")
WORKER_KEYS = (
    "address",
    "node",
    "role",
    "name",
    "model",
    "profile",
    "requests_max",
    "kv_tokens_max",
    "batched_tokens_max",
)
"""`address`: where it serves OpenAI's API; `node`: its node's gRPC socket or address; these two must be there. The others have defaults: both,
the address, the model as it is served, what the engine measures at itself, what it has room for."""


@dataclass(frozen=True)
class Settings:
    """Times in milliseconds unless a name says otherwise."""

    socket: str = "/var/lib/kvd/kvd.sock"
    """The node's session socket."""
    tenant: str = "default"
    """Whose blocks they are."""
    model: str = ""
    """The model's name in kvd; empty: as the engine serves it."""
    revision: str = ""
    """The operator's word for the weights, in place of a digest of the model's folder."""
    block_tokens: int = 0
    """Tokens of a kvd block; 0: 64 where the engine's page fits that, otherwise the page. Engines that share blocks have the same."""
    load: str = "auto"
    """"async": a request waits outside of the batch while its blocks come; "layerwise": in the batch, layer by layer; "auto": the latter
    where all is predicted to be there within `layerwise_us`."""
    layerwise_us: int = 2000
    lookup_wait_ms: float = 1.0
    """How long the scheduler waits for a lookup before it goes on with other requests."""
    lookup_timeout_ms: int = 300
    """After this a lookup is a miss."""
    load_timeout_ms: int = 5000
    """After this a load is given up."""
    store: str = "all"
    """"all": prompts and what is generated; "prompt": prompts only; "none"."""
    store_wait_ms: int = 200
    """How long a store waits for space at the node."""
    hand_off_ttl_ms: int = 30_000
    """Disaggregated serving: how long a prefilled prompt waits to be claimed."""
    claim_wait_ms: int = 5000
    """Disaggregated serving: how long a decode waits for what is still being filled."""
    worker: dict[str, Any] = field(default_factory=dict)
    """Registers the engine with its node, for the router: `WORKER_KEYS`."""

    @classmethod
    def of(cls, extra: dict[str, Any]) -> Settings:
        """Reads and checks an extra config."""
        known = {known.name: known for known in fields(cls)}
        for name, value in extra.items():
            if name not in known:
                raise _refused(name, f"{value!r}", f"it is none of {', '.join(known)}")
            default = known[name].default if name != "worker" else {}
            wanted = (int, float) if isinstance(default, (int, float)) else type(default)
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise _refused(name, f"{value!r}", f"give {_article(default)}")
            if isinstance(value, (int, float)) and value < 0:
                raise _refused(name, f"{value!r}", "give 0 or more")
        settings = cls(**extra)
        for name, values in (("load", LOADS), ("store", STORES)):
            if getattr(settings, name) not in values:
                raise _refused(name, f"{getattr(settings, name)!r}", f"give one of {', '.join(values)}")
        _check_worker(settings.worker)
        return settings

    def hand_off(self, wanted: tuple[bytes, int] | None) -> HandOff | None:
        """A store's hand-off, (key, blocks of the prompt), as the node is told."""
        if wanted is None:
            return None
        key, blocks = wanted
        return HandOff(key, blocks=blocks, ttl_s=self.hand_off_ttl_ms / 1000)

    def store_wait_s(self, handed_off: bool) -> float:
        """What is handed off waits for space as long as its claimer waits for it: with one block missing all would be computed again."""
        return max(self.store_wait_ms, self.claim_wait_ms if handed_off else 0) / 1000


def _check_worker(worker: dict[str, Any]) -> None:
    for name, value in worker.items():
        if name not in WORKER_KEYS:
            raise _refused(f"worker.{name}", f"{value!r}", f"it is none of {', '.join(WORKER_KEYS)}")
    for name in ("address", "node") if worker else ():
        if not isinstance(worker.get(name), str) or not worker[name]:
            raise _refused(f"worker.{name}", f"{worker.get(name)!r}", "give address and node, or leave worker out")
    if "//" not in worker.get("address", "//"):
        raise _refused("worker.address", worker["address"], "write it as http://host:port")
    if worker.get("role", "both") not in ROLES:
        raise _refused("worker.role", f"{worker['role']!r}", f"give one of {', '.join(ROLES)}")


def _article(default: Any) -> str:
    names: dict[type, str] = {str: "a string", dict: "an object"}
    return names.get(type(default), "a number")


def _refused(name: str, value: str, fix: str) -> InvalidError:
    return InvalidError("invalid", f"kv_connector_extra_config.{name}", value, fix)
