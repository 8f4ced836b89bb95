"""The engine's standing with its node, so that the router finds it and knows how loaded it is.

Owns counting. Invariant: the engine never waits for it; without `worker` in the settings there is none. Leaves to others: telling the
node (compiled), placing requests (the router).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.request import Request

    import kvd
    from kvd.vllm.identity import Identity
    from kvd.vllm.settings import Settings


class Standing:
    """Requests that the engine has, as its node is told of them."""

    def __init__(self, client: kvd.Client, space: kvd.Space, settings: Settings, engine: Identity) -> None:
        self._waiting: dict[str, int] = {}
        self._running: dict[str, int] = {}
        self._claimed: list[int] = []
        self._worker: kvd.Worker | None = None
        given: dict[str, Any] = dict(settings.worker)
        if given:
            self._worker = client.worker(
                given.pop("node"),
                name=given.pop("name", engine.model),
                model=given.pop("model", engine.model),
                address=given.pop("address"),
                role=given.pop("role", "both"),
                requests_max=given.pop("requests_max", 256),
                kv_tokens_max=given.pop("kv_tokens_max", 1 << 20),
                batched_tokens_max=given.pop("batched_tokens_max", 0),
                space=space,
                **given,
            )

    def began(self, request: Request, told: dict[str, Any]) -> None:
        """A request has come; the router's reservation for it is used."""
        if self._worker is None:
            return
        self._waiting[request.request_id] = request.num_prompt_tokens
        if isinstance(told.get("reservation"), int):
            self._claimed.append(told["reservation"])
        self._tell()

    def runs(self, names: set[str]) -> None:
        """These are in the batch by now."""
        if self._worker is None:
            return
        moved = self._waiting.keys() & names
        for name in moved:
            self._running[name] = self._waiting.pop(name)
        if moved:
            self._tell()

    def ended(self, request: Request) -> None:
        """A request is over, one way or another."""
        if self._worker is None:
            return
        self._waiting.pop(request.request_id, None)
        self._running.pop(request.request_id, None)
        self._tell()

    def _tell(self) -> None:
        assert self._worker is not None
        claimed, self._claimed = self._claimed, []
        self._worker.report(
            running=len(self._running),
            waiting=len(self._waiting),
            waiting_tokens=sum(self._waiting.values()),
            kv_tokens=sum(self._running.values()),
            claimed=claimed,
        )

    def close(self) -> None:
        """No longer listed."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
