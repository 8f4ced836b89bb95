"""Types of the compiled half of `kvd`, with what each call promises.

Invariant: `mypy.stubtest kvd._kvd` agrees with the compiled module. A call that waits has a twin `..._soon`
that returns a `Pending`; `timeout_s` is 2 seconds unless given, and `None` waits for ever; at the end of
patience `TimedOutError` is raised and the work is given up. Chains, layouts and everything that can never be
right raise `InvalidError` at once; a node that is away raises `UnavailableError` only where no miss can be
answered.
"""

from collections.abc import Callable, Generator, Sequence
from os import PathLike
from types import TracebackType
from typing import Final, Generic, Literal, Protocol, Self, TypeAlias, TypeVar, final, type_check_only

from typing_extensions import Buffer

__all__ = [
    "AUDIO",
    "EMBEDDING",
    "IMAGE",
    "Chain",
    "Claim",
    "Client",
    "Fill",
    "Group",
    "HandOff",
    "Hints",
    "LayerMemory",
    "Layout",
    "Loaded",
    "Loading",
    "Match",
    "Memory",
    "Miss",
    "Pages",
    "Pending",
    "Space",
    "Stored",
    "Storing",
    "Worker",
    "revision_of_adapter",
    "revision_of_model",
    "revision_of_words",
]

_T_co = TypeVar("_T_co", covariant=True)

@type_check_only
class _Tensor(Protocol):
    """What is asked of a tensor that has no buffer: torch's, on the processor or on a device."""

    @property
    def nbytes(self) -> int: ...
    def data_ptr(self) -> int: ...
    def is_contiguous(self) -> bool: ...

_Path: TypeAlias = str | PathLike[str]
_Key: TypeAlias = str | bytes
_Block: TypeAlias = Buffer | Memory | _Tensor
_Dtype: TypeAlias = Literal["bf16", "f16", "f32", "f8_e4m3", "f8_e5m2", "i8", "f4_e2m1"]
_Kind: TypeAlias = Literal["full", "window", "state", "latent", "draft"]
_Scale: TypeAlias = Literal["none", "per_tensor", "per_head", "per_token"]
_Reason: TypeAlias = Literal[
    "not_ready", "failed", "lease_ended", "other_block", "checksum", "in_device", "absent", "away"
]
_Tier: TypeAlias = Literal["hbm", "dram", "nvme", "s3", "none"]
_Source: TypeAlias = Literal["hbm", "dram", "nvme", "s3", "none", "remote"]
_Reserved: TypeAlias = Literal["granted", "present", "busy", "no_space"]
_HandOffState: TypeAlias = Literal["none", "ready", "not_yet", "gone"]
_Expects: TypeAlias = Literal["tool_call", "session_end"]
_Span: TypeAlias = tuple[int, int, int, bytes]

IMAGE: Final[int]
AUDIO: Final[int]
EMBEDDING: Final[int]

def revision_of_model(folder: _Path, *, words: Sequence[_Key] = ...) -> bytes:
    """32 bytes: the digest of the model in a folder, configuration and weights (sampled above 64 MiB).
    `words`: what else belongs to the identity, in order. Raises `InvalidError` for a folder that is no
    model's, `LimitError` for one without bounds."""

def revision_of_words(words: Sequence[str | bytes]) -> bytes:
    """A revision of words alone."""

def revision_of_adapter(folder: _Path) -> bytes:
    """32 bytes: the digest of the adapter in a folder, for `Space.chain(adapter=...)`."""

@final
class Miss:
    """A block that cannot be had: falsy. Equal misses have the same reason."""

    @property
    def reason(self) -> _Reason: ...
    def __bool__(self) -> Literal[False]: ...
    def __hash__(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...

@final
class Pending(Generic[_T_co]):
    """A result to come; `await` it, wait for it, or be called. What nobody takes gives back what it holds."""

    def done(self) -> bool: ...
    def result(self, timeout_s: float | None = None) -> _T_co:
        """Raises what went wrong; `TimedOutError` leaves the work under way."""

    def cancel(self) -> None:
        """The result is an error with code "cancelled" from now on, unless there is one already."""

    def add_done_callback(self, callback: Callable[[Pending[_T_co]], object]) -> None:
        """Called once, on some thread, at once if it is done; what it raises is reported and nothing else."""

    def __await__(self) -> Generator[object, None, _T_co]: ...

@final
class Client:
    """A session of this process with its node, which comes back by itself. Not to be used after a fork: make
    one in the child."""

    def __new__(
        cls,
        socket: _Path,
        *,
        tenant: str = "default",
        engine: str = "python",
        member: str = "main",
        join: bytes = ...,
        numa_node: int | None = None,
        wait_s: float = 10.0,
    ) -> Self:
        """`wait_s=0` returns at once, and the session is there when the node is; else `UnavailableError` if
        it is not there by then."""

    @property
    def connected(self) -> bool: ...
    @property
    def token(self) -> bytes:
        """What other members pass as `join`; empty until the node was there once."""

    @property
    def node_epoch(self) -> int:
        """Another value: the daemon was restarted. 0: none was there yet."""

    @property
    def trouble(self) -> str | None: ...
    @property
    def tenant(self) -> str: ...
    def wait_connected(self, timeout_s: float) -> bool: ...
    def join(self, token: bytes) -> None: ...
    def space(
        self,
        model: str,
        revision: _Key,
        layout: Layout,
        *,
        epoch: int = 0,
        id_scheme: Literal["tokens", "named"] = "tokens",
    ) -> Space:
        """Never waits; the node is told with the first question."""

    def close(self) -> None:
        """Ends the session once its last lease is gone; spaces made with it stay usable until then."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_exception: type[BaseException] | BaseException | TracebackType | None) -> None: ...

@final
class Worker:
    """An engine's standing with its node, for routers and the planner: registered as long as this lives,
    again and again while the node is away. Nothing here waits."""

    def __new__(
        cls,
        node: _Path,
        *,
        name: str,
        model: str,
        address: str,
        requests_max: int,
        kv_tokens_max: int,
        profile: dict[str, float],
        role: Literal["prefill", "decode", "both"] = "both",
        space: Space | None = None,
        batched_tokens_max: int = 0,
    ) -> Self:
        """`node`: path of the node's gRPC socket, or "http://host:port"; `address`: where the engine serves OpenAI's API;
        `profile`: microseconds by the names of `WorkerProfile` (workers.proto), 0 where one is left out."""

    @property
    def trouble(self) -> str | None:
        """Why the node does not list it; `None`: it does, or has not answered yet."""

    def report(
        self,
        running: int,
        waiting: int,
        waiting_tokens: int,
        kv_tokens: int,
        claimed: Sequence[int] = ...,
        draining: bool = False,
    ) -> None:
        """The load from now on; each reservation in `claimed` is told once."""

    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_exception: type[BaseException] | BaseException | TracebackType | None) -> None: ...

@final
class Claim:
    """Takes what another engine has computed for a request, once, by its key."""

    def __new__(cls, key: _Key, *, node: str = "", wait_s: float = 0.0) -> Self: ...

@final
class HandOff:
    """Keeps what is stored for whoever claims it; `blocks`: of the prompt, in all, tail included."""

    def __new__(cls, key: _Key, *, blocks: int, ttl_s: float = 30.0) -> Self: ...

@final
class Hints:
    """What follows a request, as far as its engine knows: it steers which copies are kept, and changes no answer. `priority`: percent of what
    the time saved is worth, 1 to 1000; `ttl_s`: how long its blocks should stay, up to a day and a share of the node;
    `return_s`: when the tool is expected to have answered."""

    def __new__(
        cls, *, priority: int = 100, ttl_s: float = 0.0, expects: _Expects | None = None, return_s: float = 0.0
    ) -> Self: ...
    @property
    def priority(self) -> int: ...
    @property
    def ttl_s(self) -> float: ...
    @property
    def expects(self) -> _Expects | None: ...
    @property
    def return_s(self) -> float: ...

@final
class Group:
    """Layers that keep KV alike. Ranges that are 0 are chosen by `Layout`, the same wherever they are."""

    def __new__(
        cls,
        kind: _Kind | str,
        layers: int,
        heads: int,
        head_size: int,
        dtype: _Dtype | str = "bf16",
        *,
        vectors: int = 2,
        window_tokens: int = 0,
        state_bytes: int = 0,
        layer_ranges: int = 0,
        head_ranges: int = 0,
        scale: _Scale | str = "none",
        scale_digest: bytes = ...,
    ) -> Self: ...
    @property
    def kind(self) -> _Kind: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def vectors(self) -> int: ...
    @property
    def window_tokens(self) -> int: ...
    @property
    def dtype(self) -> _Dtype: ...
    @property
    def layer_ranges(self) -> int: ...
    @property
    def head_ranges(self) -> int: ...

@final
class Layout:
    """What a block's bytes mean: groups, cut into parts. Within a part: head, layer, K/V, token, dim."""

    def __new__(cls, groups: Sequence[Group], block_tokens: int) -> Self: ...
    @staticmethod
    def full(layers: int, heads: int, head_size: int, dtype: _Dtype | str, block_tokens: int) -> Layout: ...
    @staticmethod
    def opaque(bytes: int, block_tokens: int = 1) -> Layout:
        """Bytes without further meaning; a multiple of 4096."""

    @property
    def block_tokens(self) -> int: ...
    @property
    def groups(self) -> list[Group]: ...
    def slot_bytes(self, group: int = 0) -> int: ...
    def parts(self, group: int = 0) -> list[tuple[int, int, int]]:
        """(index, offset, bytes) of each."""

@final
class Chain:
    """Block ids in order: of a prompt that grows, of a piece of one, or of an engine's own keys."""

    def extend(self, tokens: Sequence[int], spans: Sequence[_Span] = ...) -> int:
        """Whole blocks so far; what is over is remembered. A span is (kind, position in the prompt, tokens,
        digest) and begins in `tokens`."""

    def __len__(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def tail_tokens(self) -> int: ...
    @property
    def ids(self) -> bytes:
        """16 bytes a block."""

    @property
    def root(self) -> bytes: ...
    def id(self, block: int) -> bytes: ...
    def prefix(self, blocks: int) -> Chain: ...
    def with_tail(self) -> Chain:
        """With what is over as its last block; only for hand-offs."""

@final
class Memory:
    """Raw memory, for engines that hand out pointers; `keep` lives as long as this."""

    def __new__(cls, ptr: int, bytes: int, keep: object = None) -> Self: ...
    @property
    def ptr(self) -> int: ...
    @property
    def bytes(self) -> int: ...

@final
class Stored:
    """What became of blocks that were to be stored."""

    @property
    def stored(self) -> int: ...
    @property
    def present(self) -> int: ...
    @property
    def busy(self) -> int: ...
    @property
    def no_space(self) -> int: ...
    @property
    def handed_off(self) -> bool: ...
    @property
    def bytes(self) -> int: ...

@final
class Loaded:
    """The prefix that could be read, and why not more."""

    @property
    def blocks(self) -> int: ...
    @property
    def miss(self) -> Miss | None: ...

@final
class Match:
    """A leased prefix. Using it after its release raises `KvdError` with code "lease_ended"."""

    @property
    def blocks(self) -> int: ...
    @property
    def lease(self) -> int: ...
    @property
    def predicted_us(self) -> int: ...
    @property
    def hand_off(self) -> tuple[_HandOffState, int, int]:
        """(state, blocks ready, blocks in all)."""

    def source(self, block: int) -> _Source: ...
    def wait(self, block: int, timeout_s: float | None = None) -> bool: ...
    def read(self, block: int, into: _Block, group: int = 0) -> Miss | Literal[True]: ...
    def load_into(
        self,
        pages: Sequence[Pages],
        tables: Sequence[Sequence[int]],
        *,
        first: int,
        end: int,
        patience_s: float = 2.0,
        fence: tuple[int, int, int] | None = None,
    ) -> Loading:
        """`tables[g][i]`: the page of the prompt's tokens from `i * page_tokens` on; negative: not wanted. `fence`:
        (range, offset, value) of a word of device pages, one more with each layer range that is there."""

    def release(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_exception: type[BaseException] | BaseException | TracebackType | None) -> None: ...

@final
class Fill:
    """Reserved slots until committed. Blocks are numbered in the chain."""

    @property
    def states(self) -> list[_Reserved]: ...
    @property
    def granted(self) -> list[int]: ...
    @property
    def handed_off(self) -> bool: ...
    def write(self, block: int, source: _Block, group: int = 0) -> None: ...
    def commit(self, timeout_s: float | None = 2.0) -> int: ...
    def commit_parts(
        self, parts: Sequence[int], blocks: Sequence[int] | None = None, timeout_s: float | None = 2.0
    ) -> int:
        """Blocks that became visible by it; the lease goes on."""

    def release(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_exception: type[BaseException] | BaseException | TracebackType | None) -> None: ...

@final
class LayerMemory:
    """One layer's KV in an engine's memory; strides in bytes, a vector's numbers contiguous."""

    def __new__(
        cls,
        ptr: int,
        *,
        page_stride: int,
        head_stride: int,
        token_stride: int,
        vector_stride: int = 0,
        keep: object = None,
        device: bool = False,
    ) -> Self: ...
    @staticmethod
    def of_vectors(
        vectors: Sequence[tuple[int, int, int | None]],
        *,
        page_stride: int,
        head_stride: int,
        keep: object = None,
    ) -> LayerMemory:
        """K and V each with (ptr, token_stride, element_stride) of its own; `None`: contiguous."""

@final
class Pages:
    """The memory in which one rank keeps its slice of a group; `heads=0`: all of them."""

    def __new__(
        cls,
        layout: Layout,
        layers: Sequence[LayerMemory],
        *,
        page_tokens: int,
        pages: int,
        group: int = 0,
        first_layer: int = 0,
        first_head: int = 0,
        heads: int = 0,
    ) -> Self: ...
    @staticmethod
    def on_device(
        space: Space,
        layers: Sequence[LayerMemory],
        *,
        device: bytes,
        ranges: Sequence[tuple[int, int, bytes | Sequence[tuple[int, int]]]],
        page_tokens: int,
        pages: int,
        group: int = 0,
        first_layer: int = 0,
        first_head: int = 0,
        heads: int = 0,
    ) -> Pages:
        """Pages in the memory of a device (its UUID), in allocations: (address, bytes, CUipcMemHandle), or, of memory that has none,
        (address, bytes, chunks), each chunk (file descriptor, bytes); descriptors may be closed afterwards."""
    def open(self) -> None:
        """Has the node open device pages now; raises what stands against it."""
    def close(self, timeout_s: float | None = None) -> bool:
        """Returns when nothing of the node touches device pages any more; `False`: not in that time."""
    @property
    def parts(self) -> list[int]: ...
    @property
    def page_tokens(self) -> int: ...
    @property
    def group(self) -> int: ...

@final
class Loading:
    """Blocks on their way into pages. Dropped or stopped: nobody touches the pages any more."""

    def done(self) -> bool: ...
    def wait_layer(self, layer: int, *, group: int = 0, timeout_s: float | None = None) -> bool: ...
    def wait(self, timeout_s: float | None = None) -> bool: ...
    def give_up(self) -> None:
        """Waits for nothing: pages on a device may be touched until it is `done`."""

    def stop(self) -> None: ...
    def outcome(self) -> tuple[int | None, Miss | None, int] | None:
        """(first block that is not there, why, bytes copied); `None`: it goes on."""

@final
class Storing:
    """Blocks on their way out of pages. Dropped or stopped: nobody reads the pages any more."""

    def done(self) -> bool: ...
    def wait(self, timeout_s: float | None = None) -> bool: ...
    def computed(self, layers: int, *, group: int = 0) -> None:
        """The first so many layers of a group are in the pages: of a store `by_layers`, which reads none before."""

    def give_up(self) -> None:
        """Waits for nothing: pages on a device may be read until it is `done`."""

    def stop(self) -> None: ...
    def outcome(self) -> Stored | None: ...

@final
class Space:
    """What a model's blocks mean, and the questions about them. A key names a request: asked again, the same
    lease."""

    @property
    def fingerprint(self) -> bytes: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def block_tokens(self) -> int: ...
    def chain(self, tokens: Sequence[int] = ..., *, adapter: bytes = ..., salt: bytes = ...) -> Chain: ...
    def named(self, keys: Sequence[_Key]) -> Chain: ...
    def chain_of(self, root: bytes, ids: bytes, tail_tokens: int = 0) -> Chain:
        """A chain out of ids that another process hashed."""

    def match(
        self,
        key: _Key,
        chain: Chain,
        *,
        skip: int = 0,
        claim: Claim | None = None,
        hints: Hints | None = None,
        into: Sequence[Pages] = ...,
        timeout_s: float | None = ...,
    ) -> Match: ...
    def match_soon(
        self,
        key: _Key,
        chain: Chain,
        *,
        skip: int = 0,
        claim: Claim | None = None,
        hints: Hints | None = None,
        into: Sequence[Pages] = ...,
    ) -> Pending[Match]: ...
    def reserve(
        self,
        key: _Key,
        chain: Chain,
        *,
        first: int = 0,
        wait_s: float = 0.0,
        hand_off: HandOff | None = None,
        timeout_s: float | None = ...,
    ) -> Fill: ...
    def reserve_soon(
        self,
        key: _Key,
        chain: Chain,
        *,
        first: int = 0,
        wait_s: float = 0.0,
        hand_off: HandOff | None = None,
    ) -> Pending[Fill]: ...
    def exists(self, chain: Chain, timeout_s: float | None = ...) -> list[_Tier]: ...
    def exists_soon(self, chain: Chain) -> Pending[list[_Tier]]: ...
    def pin(self, chain: Chain, ttl_s: float, timeout_s: float | None = ...) -> int: ...
    def prefetch(self, chain: Chain, timeout_s: float | None = ...) -> int: ...
    def store(
        self,
        chain: Chain,
        blocks: Sequence[_Block],
        *,
        key: _Key = ...,
        first: int = 0,
        wait_s: float = 0.0,
        timeout_s: float | None = ...,
    ) -> Stored:
        """One buffer a block, each exactly a slot; raises `UnavailableError` while the node is away."""

    def store_soon(
        self,
        chain: Chain,
        blocks: Sequence[_Block],
        *,
        key: _Key = ...,
        first: int = 0,
        wait_s: float = 0.0,
    ) -> Pending[Stored]: ...
    def load(
        self,
        chain: Chain,
        into: Sequence[_Block],
        *,
        key: _Key = ...,
        first: int = 0,
        timeout_s: float | None = ...,
    ) -> Loaded:
        """Verified, as far as it can be had; a node that is away is a miss."""

    def load_soon(
        self, chain: Chain, into: Sequence[_Block], *, key: _Key = ..., first: int = 0
    ) -> Pending[Loaded]: ...
    def store_from(
        self,
        key: _Key,
        chain: Chain,
        pages: Sequence[Pages],
        tables: Sequence[Sequence[int]],
        *,
        first: int = 0,
        wait_s: float = 0.0,
        hand_off: HandOff | None = None,
        by_layers: bool = False,
    ) -> Storing:
        """`tables[g][i]`: the i-th page of tokens, counted from block `first` on."""

    def exists_each(self, chain: Chain, timeout_s: float | None = ...) -> list[bool]: ...
    def exists_each_soon(self, chain: Chain) -> Pending[list[bool]]: ...
    def load_each(
        self, chain: Chain, into: Sequence[_Block], timeout_s: float | None = ...
    ) -> list[Miss | Literal[True]]: ...
    def load_each_soon(self, chain: Chain, into: Sequence[_Block]) -> Pending[list[Miss | Literal[True]]]: ...
    def store_each(
        self,
        chain: Chain,
        blocks: Sequence[_Block],
        *,
        wait_s: float = 0.0,
        timeout_s: float | None = ...,
    ) -> list[bool]: ...
    def store_each_soon(
        self, chain: Chain, blocks: Sequence[_Block], *, wait_s: float = 0.0
    ) -> Pending[list[bool]]: ...
