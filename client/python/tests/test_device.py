"""Pages in a device's memory, which the node copies from and to: the stand-in for a device."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from paged import Rank, Truth
from rig import DEADLINE_S, MIB, Daemon
from standin import CHUNK_BYTES, Chunks, Memory, chunk, device_uuid

import kvd
from kvd._quarantine import Quarantine

LAYOUT = kvd.Layout([kvd.Group("full", 4, 4, 64, "f16", layer_ranges=2, head_ranges=4)], 16)
BLOCKS = 24
_HALVES = [range(2), range(2, 4)]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("device"), device="software", hbm=8 * MIB) as daemon:
        yield daemon


class DeviceRank(Rank):
    """A rank whose layers lie in one allocation of a device's, or in chunks that have no handle."""

    device: Memory | Chunks

    def on(self, space: kvd.Space, chunks: int = 0) -> DeviceRank:
        shape = self.memory[0].shape
        each = int(np.prod(shape))
        size = each * len(self.memory)
        self.device = Chunks(size, chunks) if chunks else Memory(size)
        self.memory = [self.device.bytes[at * each : (at + 1) * each].reshape(shape) for at in range(len(self.memory))]
        for memory in self.memory:
            memory[:] = 0xEE
        self.space = space
        return self

    def described(self) -> kvd.Pages:
        assert self.layers is not None
        assert self.heads is not None
        layers = []
        for at, memory in enumerate(self.memory):
            page, vector, token, head, _ = self._view(at).strides
            strides = {"page_stride": page, "vector_stride": vector, "token_stride": token, "head_stride": head}
            layers.append(kvd.LayerMemory(memory.ctypes.data, **strides, keep=self.device, device=True))
        return kvd.Pages.on_device(
            self.space,
            layers,
            device=device_uuid(),
            ranges=[self.device.range],
            page_tokens=self.page_tokens,
            pages=self.pages,
            first_layer=self.layers.start,
            first_head=self.heads.start,
            heads=len(self.heads),
        )


def _load(space: kvd.Space, chain: kvd.Chain, rank: Rank, table: list[int]) -> tuple[int | None, kvd.Miss | None, int]:
    with space.match("", chain) as match:
        assert match.blocks == BLOCKS
        loading = match.load_into([rank.described()], [table], first=0, end=BLOCKS, patience_s=DEADLINE_S)
        assert loading.wait(DEADLINE_S)
        outcome = loading.outcome()
    assert outcome is not None
    return outcome


def _table(seed: int, pages: int) -> list[int]:
    return [int(page) for page in np.random.default_rng(seed).permutation(pages)]


@pytest.mark.parametrize("style", ["NHD", "HND"])
@pytest.mark.parametrize("page_tokens", [8, 16, 32])
def test_what_one_device_stored_another_loads(node: Daemon, style: str, page_tokens: int) -> None:
    pages = BLOCKS * 16 // page_tokens
    truth = Truth(LAYOUT, BLOCKS, seed=page_tokens)
    with node.client() as session:
        space = session.space(f"device-{style}-{page_tokens}", "r1", LAYOUT)
        chain = space.chain(list(range(BLOCKS * 16)))
        table = _table(1, pages)
        first = DeviceRank(LAYOUT, pages, page_tokens, style=style).on(space)
        first.fill(truth, table)
        stored = first.store(space, "", chain, table, wait_s=DEADLINE_S)
        assert (stored.stored, stored.bytes) == (BLOCKS, BLOCKS * LAYOUT.slot_bytes())
        for again in range(4):  # the last ones out of the device's own memory
            second, table = DeviceRank(LAYOUT, pages, page_tokens, style=style).on(space), _table(2 + again, pages)
            assert _load(space, chain, second, table)[:2] == (None, None)
            assert second.differs(truth, table) == []
        host = Rank(LAYOUT, pages, page_tokens, style="NHD")
        assert _load(space, chain, host, table)[:2] == (None, None)
        assert host.differs(truth, table) == [], "and so does who has no device"


@pytest.mark.parametrize("on_device", [False, True])
def test_a_store_by_layers_reads_none_before_it_is_computed(node: Daemon, on_device: bool) -> None:
    truth, table = Truth(LAYOUT, BLOCKS, seed=21), list(range(BLOCKS))
    with node.client() as session:
        space = session.space(f"by-layers-{on_device}", "r1", LAYOUT)
        chain = space.chain(list(range(BLOCKS * 16)))
        rank = DeviceRank(LAYOUT, BLOCKS).on(space) if on_device else Rank(LAYOUT, BLOCKS)
        pages = rank.described()
        storing = space.store_from("", chain, [pages], [table], wait_s=DEADLINE_S, by_layers=True)
        assert not storing.wait(0.05)
        rank.fill(truth, table)  # nothing was read by now
        for layers in range(1, 5):
            assert not storing.done()
            storing.computed(layers)
        assert storing.wait(DEADLINE_S)
        stored = storing.outcome()
        assert stored is not None
        assert stored.stored == BLOCKS
        host = Rank(LAYOUT, BLOCKS)
        assert _load(space, chain, host, table)[:2] == (None, None)
        assert host.differs(truth, table) == []
        assert pages.close(DEADLINE_S)


def test_ranks_store_their_halves_and_one_rank_loads_both(node: Daemon) -> None:
    truth = Truth(LAYOUT, BLOCKS, seed=5)
    with node.client() as session, node.client(member="rank-1", join=session.token) as other:
        table, spaces = _table(1, BLOCKS), [one.space("halves", "r1", LAYOUT) for one in (session, other)]
        chain = spaces[0].chain(list(range(BLOCKS * 16)))
        ranks = [
            DeviceRank(LAYOUT, BLOCKS, heads=heads).on(space) for space, heads in zip(spaces, _HALVES, strict=True)
        ]
        for rank in ranks:
            rank.fill(truth, table)
        # both ask before one of them is done
        held = [space.reserve("halves", chain, wait_s=DEADLINE_S) for space in spaces]
        for rank in ranks:
            rank.store(rank.space, "halves", chain, table, wait_s=DEADLINE_S)
        del held
        whole = DeviceRank(LAYOUT, BLOCKS).on(spaces[0])
        assert _load(spaces[0], chain, whole, table)[:2] == (None, None)
        assert whole.differs(truth, table) == []


def test_a_word_of_the_device_says_how_far_a_load_is(node: Daemon) -> None:
    truth = Truth(LAYOUT, BLOCKS, seed=6)
    with node.client() as session:
        space = session.space("fence", "r1", LAYOUT)
        chain, table = space.chain(list(range(BLOCKS * 16))), _table(1, BLOCKS + 1)[:BLOCKS]
        rank = DeviceRank(LAYOUT, BLOCKS + 1).on(space)
        rank.fill(truth, table)
        rank.store(space, "", chain, table, wait_s=DEADLINE_S)
        # the page that no token has
        free = next(page for page in range(BLOCKS + 1) if page not in table)
        offset = free * rank.memory[0].strides[0]
        with space.match("", chain) as match:
            fence = (0, offset, 7)
            loading = match.load_into([rank.described()], [table], first=0, end=BLOCKS, fence=fence)
            assert loading.wait(DEADLINE_S)
        assert int(rank.device.bytes[offset : offset + 4].view(np.uint32)[0]) == 8, "two layer ranges"


def test_pages_are_opened_closed_and_refused_with_what_to_do(node: Daemon, tmp_path: Path) -> None:
    with node.client() as session:
        space = session.space("refused", "r1", LAYOUT)
        rank = DeviceRank(LAYOUT, 4).on(space)
        pages = rank.described()
        pages.open()
        pages.close()
        pages.open()
        pages.close()
        rank.device.close()
        with pytest.raises(kvd.InvalidError, match="ranges") as refused:
            rank.described().open()
        assert "cuIpcGetMemHandle" in refused.value.fix
        memory = Memory(4096)
        layer = kvd.LayerMemory(memory.address, page_stride=0, head_stride=0, token_stride=0, device=True)
        with pytest.raises(kvd.InvalidError, match="on_device"):
            kvd.Pages(LAYOUT, [layer] * 4, page_tokens=16, pages=1)
        host = kvd.LayerMemory(memory.address, page_stride=0, head_stride=0, token_stride=0)
        shape = {"page_tokens": 16, "pages": 1}
        with pytest.raises(kvd.InvalidError, match="device=True"):
            kvd.Pages.on_device(space, [host] * 4, device=device_uuid(), ranges=[memory.range], **shape)
        with pytest.raises(kvd.InvalidError, match="ranges"):
            kvd.Pages.on_device(space, [layer] * 4, device=device_uuid(), ranges=[(1, 5, bytes(64))], **shape)
    with Daemon(tmp_path) as without, without.client() as session:
        space = session.space("none", "r1", LAYOUT)
        with pytest.raises(kvd.UnavailableError, match="device") as without_device:
            DeviceRank(LAYOUT, 4).on(space).described().open()
        assert "hbm.device" in without_device.value.fix


def test_a_node_that_stands_still_keeps_nobody_waiting(tmp_path: Path) -> None:
    truth, table = Truth(LAYOUT, BLOCKS, seed=8), list(range(BLOCKS))
    with Daemon(tmp_path, device="software") as node, node.client() as session:
        space = session.space("still", "r1", LAYOUT)
        chain = space.chain(list(range(BLOCKS * 16)))
        rank = DeviceRank(LAYOUT, BLOCKS).on(space)
        rank.fill(truth, table)
        rank.store(space, "", chain, table, wait_s=DEADLINE_S)
        pages = rank.described()
        pages.open()
        with space.match("", chain) as match:
            os.kill(node.pid, signal.SIGSTOP)
            try:
                loading = match.load_into([pages], [table], first=0, end=BLOCKS, patience_s=DEADLINE_S)
                assert not loading.wait(0.2)
                loading.give_up()
                assert not loading.done(), "the node may still write"
                assert not pages.close(0.2)
                quarantine = Quarantine()
                while not quarantine.is_full():
                    quarantine.end(loading, [pages], rank, 0.05)
            finally:
                os.kill(node.pid, signal.SIGCONT)
            assert loading.wait(DEADLINE_S)
            outcome = loading.outcome()
        assert outcome is not None
        assert outcome[0] is not None, "what was given up is not loaded"
        assert pages.close(DEADLINE_S)
        assert pages.close(DEADLINE_S), "and again"
        assert not quarantine.is_full(), "all of it has ended"


def test_what_is_on_nvme_comes_to_the_device_past_dram(tmp_path: Path) -> None:
    table, host = list(range(BLOCKS)), Rank(LAYOUT, BLOCKS)
    tiers = {"dram": 8 * MIB, "nvme": 64 * MIB, "hbm": 32 * MIB}
    with Daemon(tmp_path, device="software", **tiers) as node, node.client() as session:
        space = session.space("lifted", "r1", LAYOUT)
        rank = DeviceRank(LAYOUT, BLOCKS).on(space)
        prompts = [
            (space.chain([seed, *range(1, BLOCKS * 16)]), Truth(LAYOUT, BLOCKS, seed=seed)) for seed in range(16)
        ]
        for chain, truth in prompts:
            rank.fill(truth, table)
            rank.store(space, "", chain, table, wait_s=DEADLINE_S)
        pages, reasons = rank.described(), set()
        # the first ones find no room on the device yet, and little in DRAM
        for number, (chain, truth) in enumerate(prompts * 2):
            with space.match("", chain, into=[pages]) as match:
                blocks = match.blocks
                assert number < len(prompts) or blocks == BLOCKS
                loading = match.load_into([pages], [table], first=0, end=blocks, patience_s=DEADLINE_S)
                assert loading.wait(DEADLINE_S)
                outcome = loading.outcome()
                assert outcome is not None
                assert outcome[0] is None
                assert blocks < BLOCKS or rank.differs(truth, table) == []
                elsewhere = match.load_into([host.described()], [table], first=0, end=blocks, patience_s=DEADLINE_S)
                assert elsewhere.wait(DEADLINE_S)
                outcome = elsewhere.outcome()
            assert outcome is not None
            reasons.add(None if outcome[1] is None else outcome[1].reason)
        assert reasons == {None, "in_device"}, "some in DRAM, and some on the device alone"
        assert pages.close(DEADLINE_S)


def _open_files(pid: int, named: str) -> int:
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            links.append(os.readlink(entry))
    return sum(named in link for link in links)


def test_memory_without_a_handle_is_given_chunk_by_chunk(tmp_path: Path) -> None:
    # more chunks than one frame's descriptors; the pages lie over the first few, and end in the middle of one
    blocks, truth = 400, Truth(LAYOUT, 400, seed=11)
    with Daemon(tmp_path, device="software") as node, node.client() as session:
        space = session.space("chunks", "r1", LAYOUT)
        chain, table = space.chain(list(range(blocks * 16))), _table(1, blocks)
        rank = DeviceRank(LAYOUT, blocks).on(space, chunks=300)
        assert len(rank.device.bytes) > 3 * CHUNK_BYTES
        rank.fill(truth, table)
        pages = rank.described()
        rank.device.close()  # the pages have their own
        pages.open()
        assert _open_files(node.pid, "kvd-chunk-") == 0, "what is mapped needs no descriptor"
        storing = space.store_from("", chain, [pages], [table], wait_s=DEADLINE_S)
        assert storing.wait(DEADLINE_S)
        stored = storing.outcome()
        assert stored is not None
        assert stored.stored == blocks
        for memory in rank.memory:
            memory[:] = 0
        with space.match("", chain) as match:
            loading = match.load_into([pages], [table], first=0, end=blocks, patience_s=DEADLINE_S)
            assert loading.wait(DEADLINE_S)
            assert loading.outcome() == (None, None, blocks * LAYOUT.slot_bytes())
        assert rank.differs(truth, table) == []
        assert pages.close()


def test_chunks_that_are_none_are_refused_by_name(node: Daemon) -> None:
    with node.client() as session:
        space = session.space("no-chunks", "r1", LAYOUT)
        memory = Chunks(CHUNK_BYTES)
        layer = kvd.LayerMemory(memory.address, page_stride=32768, head_stride=128, token_stride=512, device=True)

        def pages(size: int, chunks: list[tuple[int, int]]) -> kvd.Pages:
            ranges = [(memory.address, size, chunks)]
            shape = {"page_tokens": 16, "pages": 1}
            return kvd.Pages.on_device(space, [layer] * 4, device=device_uuid(), ranges=ranges, **shape)

        for size, chunks, says in [
            (CHUNK_BYTES, [(-1, CHUNK_BYTES)], "-1"),
            (CHUNK_BYTES, [(10_000_000, CHUNK_BYTES)], "Bad file descriptor"),
            (2 * CHUNK_BYTES, memory.share, "for 4194304"),
        ]:
            with pytest.raises(kvd.InvalidError, match=says):
                pages(size, chunks)
        other, file = chunk(ordinal=1), os.open("/dev/null", os.O_RDWR)
        for wrong in (other, file):
            with pytest.raises(kvd.InvalidError, match="chunk 0") as refused:
                pages(CHUNK_BYTES, [(wrong, CHUNK_BYTES)]).open()
            assert "cuMemExportToShareableHandle" in refused.value.fix
            os.close(wrong)
        memory.close()
