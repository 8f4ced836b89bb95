"""What the scheduler's half tells the workers' with every step, and what they answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata


@dataclass
class ChainRef:
    """A request's blocks, as another process can ask for them; never hashed anew."""

    epoch: int
    root: bytes
    ids: bytes
    tail_tokens: int = 0


@dataclass
class LoadJob:
    """Blocks `first..end` of a request, into its pages."""

    request: str
    key: bytes
    chain: ChainRef
    skip: int
    first: int
    end: int
    tables: list[list[int]]
    """For each group, the page of every page of the prompt's tokens; negative: not wanted."""
    wait: bool
    """In this very step, layer by layer."""


@dataclass
class StoreJob:
    """Blocks from `first` on of a request, out of its pages."""

    number: int
    request: str
    key: bytes
    chain: ChainRef
    first: int
    tables: list[list[int]]
    """As of a load, from the first block's first page on."""
    hand_off: tuple[bytes, int] | None = None


@dataclass
class KvdMetadata(KVConnectorMetadata):
    """One step's work."""

    token: bytes = b""
    step: int = 0
    heard: int = 0
    """The last step of whose failed loads the scheduler has heard: what it schedules from then on is computed anew."""
    loads: list[LoadJob] = field(default_factory=list)
    stores: list[StoreJob] = field(default_factory=list)
    leave: set[str] = field(default_factory=set)
    """Requests whose pages are about to be used for something else."""
    await_stores: set[str] = field(default_factory=set)
    """Finished requests whose pages stay until their stores are done."""


DROPPED = -1


@dataclass
class KvdWorkerMeta(KVConnectorWorkerMetadata):
    """What became of stores: number to how many ranks have ended it, and how many blocks each of them stored at least; `DROPPED`: one of them
    must not be stored."""

    ended: dict[int, tuple[int, int]] = field(default_factory=dict)
    failed_step: int = 0
    """The last step with a load in the batch that failed."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Of all ranks."""
        assert isinstance(other, KvdWorkerMeta)
        self.failed_step = max(self.failed_step, other.failed_step)
        for number, (ranks, blocks) in other.ended.items():
            mine = self.ended.get(number)
            self.ended[number] = (ranks, blocks) if mine is None else (ranks + mine[0], min(blocks, mine[1]))
        return self
