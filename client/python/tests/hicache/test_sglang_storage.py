"""The backend against a real daemon: bytes, identity, hit policies, leases, a daemon that dies. SGLang itself
is not needed."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hosts import PAGE_TOKENS, Host, LayerFirst, hashes, slots
from rig import MIB, Daemon, until
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

import kvd
from kvd.sglang import KvdStorage

PAGES = 128
Config = Callable[..., Any]


def opened(config: Any, host: Host | None = None) -> KvdStorage:
    storage = KvdStorage(config, {})
    if host is not None:
        storage.register_mem_pool_host(host)
    until("a session", lambda: storage._client.connected)
    return storage


def same(host: Host, expected: list[np.ndarray], pages: list[int]) -> bool:
    return all(
        np.array_equal(buffer[pages], wanted[pages]) for buffer, wanted in zip(host.buffers, expected, strict=True)
    )


@pytest.mark.parametrize("kind", [Host, LayerFirst])
@pytest.mark.parametrize("sizes", [(65_536, 65_536), (40_000,), (1000, 24, 4096), (4096,) * 12])
def test_a_batch_of_128_pages_comes_back_whole(
    daemon: Daemon, storage_config: Config, kind: type[Host], sizes: tuple[int, ...]
) -> None:
    host = kind(PAGES, sizes)
    host.fill(1)
    stored, keys, all_pages = host.copy(), hashes(PAGES), list(range(PAGES))
    storage = opened(storage_config(str(daemon.socket)), host)
    assert storage.batch_exists(keys) == 0
    assert storage.batch_get_v1(keys, slots(all_pages)) == [False] * PAGES
    assert storage.batch_set_v1(keys, slots(all_pages)) == [True] * PAGES
    assert storage.batch_set_v1(keys, slots(all_pages)) == [True] * PAGES, "again is fine"
    host.wipe()

    other = opened(storage_config(str(daemon.socket)), host)
    backwards = all_pages[::-1]
    assert other.batch_exists([*keys, "more"]) == PAGES
    assert other.batch_get_v1(keys, slots(backwards)) == [True] * PAGES
    assert same(host, [buffer[::-1] for buffer in stored], all_pages)
    assert other.exists(keys[5]) and not other.exists("more")


def test_a_fresh_process_reads_the_pages(daemon: Daemon, storage_config: Config) -> None:
    host = Host(PAGES)
    host.fill(2)
    assert all(opened(storage_config(str(daemon.socket)), host).batch_set_v1(hashes(PAGES), slots(list(range(PAGES)))))
    reader = Path(__file__).parent / "reader.py"
    command = [sys.executable, str(reader), str(daemon.socket), str(PAGES), "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip() == f"{PAGES} pages, wrong bytes 0", done.stderr


def test_flat_pages_as_tensors(daemon: Daemon, storage_config: Config) -> None:
    storage = opened(storage_config(str(daemon.socket), interface_v1=0), LayerFirst(1, (5000, 300)))
    rng = np.random.default_rng(3)
    values = [rng.integers(0, 256, 5300, np.uint8) for _ in range(9)]
    keys = hashes(9)
    assert storage.batch_set(keys[:8], values[:8])
    assert storage.set(keys[8], values[8])
    targets = [np.zeros(5300, np.uint8) for _ in range(10)]
    got = storage.batch_get([*keys, "more"], targets)
    assert got[9] is None
    assert all(one is target for one, target in zip(got[:9], targets[:9], strict=True))
    assert all(np.array_equal(one, value) for one, value in zip(got, values, strict=False))
    assert storage.batch_exists([*keys, "more"]) == 9
    assert storage.get(keys[0], np.zeros(5300, np.uint8)) is not None
    assert storage.get(keys[0]) is None, "nowhere to put it"
    assert not storage.batch_set(keys, values[:1])


def test_whatever_changes_the_bytes_changes_the_identity(daemon: Daemon, storage_config: Config) -> None:
    host, keys = Host(2), hashes(2)
    base = opened(storage_config(str(daemon.socket)), host)
    assert all(base.batch_set_v1(keys, slots([0, 1])))
    tp = {"tp_rank": 1, "tp_size": 2}
    others = [
        opened(storage_config(str(daemon.socket), ranks=tp), host),
        opened(storage_config(str(daemon.socket), ranks={"pp_rank": 1, "pp_size": 2}), host),
        opened(storage_config(str(daemon.socket), ranks={"attn_cp_rank": 1, "attn_cp_size": 2}), host),
        opened(storage_config(str(daemon.socket), ranks={"model_name": "other"}), host),
        opened(storage_config(str(daemon.socket), ranks={"is_mla_model": True}), host),
        opened(storage_config(str(daemon.socket), revision="2"), host),
        opened(storage_config(str(daemon.socket), tenant="other"), host),
        opened(storage_config(str(daemon.socket)), Host(2, (131_072,))),
        opened(storage_config(str(daemon.socket)), Host(4, page_size=8)),
        opened(storage_config(str(daemon.socket)), LayerFirst(2)),
    ]
    assert [other.batch_exists(keys) for other in others] == [0] * len(others)
    assert opened(storage_config(str(daemon.socket)), host).batch_exists(keys) == 2


def test_latent_pages_are_stored_once_and_read_by_all_ranks(daemon: Daemon, storage_config: Config) -> None:
    host = Host(2, (65_536,))
    host.fill(4)
    keys = hashes(2)
    ranks = [{"tp_rank": rank, "tp_size": 2, "is_mla_model": True} for rank in range(2)]
    writer, reader = (opened(storage_config(str(daemon.socket), ranks=rank), host) for rank in ranks)
    assert reader.batch_set_v1(keys, slots([0, 1])) == [True, True], "not its to write"
    assert writer.batch_exists(keys) == 0
    assert writer.batch_set_v1(keys, slots([0, 1])) == [True, True]
    assert reader.batch_exists(keys) == 2
    mamba = Host(2, (8192,))
    for storage in (writer, reader):
        storage.register_mem_host_pool_v2(mamba, PoolName.MAMBA)
    transfer = PoolTransfer(PoolName.MAMBA, host_indices=slots([0]), keys=keys[:1])
    assert writer.batch_set_v2([transfer]) == {PoolName.MAMBA: [True]}
    assert reader.batch_get_v2([transfer]) == {PoolName.MAMBA: [False]}, "its state is sharded"


def hybrid(storage: KvdStorage) -> tuple[Host, Host]:
    mamba, indexer = Host(16, (8192, 100)), Host(16, (4096,))
    storage.register_mem_host_pool_v2(mamba, PoolName.MAMBA)
    storage.register_mem_host_pool_v2(indexer, PoolName.INDEXER)
    return mamba, indexer


def test_hit_policies_of_hybrid_pools(daemon: Daemon, storage_config: Config) -> None:
    kv, keys = Host(16), hashes(10)
    storage = opened(storage_config(str(daemon.socket)), kv)
    mamba, _indexer = hybrid(storage)
    mamba.fill(5)
    assert all(storage.batch_set_v1(keys[:8], slots(list(range(8)))))
    boundaries = [2, 3, 6]
    states = PoolTransfer(PoolName.MAMBA, host_indices=slots(boundaries), keys=[keys[at] for at in boundaries])
    rows = PoolTransfer(PoolName.INDEXER, host_indices=slots(list(range(7))), keys=keys[:7])
    assert storage.batch_set_v2([states, rows]) == {PoolName.MAMBA: [True] * 3, PoolName.INDEXER: [True] * 7}

    def asked(trailing: int, *more: PoolTransfer) -> Any:
        window = PoolTransfer(PoolName.MAMBA, keys=["?"] * trailing, hit_policy=PoolHitPolicy.TRAILING_PAGES)
        return storage.batch_exists_v2(keys, [window, *more])

    everywhere = PoolTransfer(PoolName.INDEXER, hit_policy=PoolHitPolicy.ALL_PAGES)
    one = asked(1, everywhere)
    assert (one.kv_hit_pages, one.restorable_prefix_pages) == (7, [3, 4, 7])
    assert one.extra_pool_hit_pages == {"kv": 8, PoolName.MAMBA: 7, PoolName.INDEXER: 7}
    two = asked(2)
    assert (two.kv_hit_pages, two.restorable_prefix_pages) == (4, [4])
    groups = PoolTransfer(
        PoolName.INDEXER, keys=keys, hit_policy=PoolHitPolicy.BLOCK_GROUPS, block_pages=4, group_pages=2
    )
    three = asked(1, groups)
    assert three.kv_hit_pages == 7 and three.extra_pool_hit_pages[PoolName.INDEXER] == 12
    unknown = PoolTransfer(PoolName.SWA)
    assert asked(1, unknown).kv_hit_pages == 0

    wanted = mamba.copy()
    mamba.wipe()
    states.host_indices = slots([9, 10, 11])
    assert storage.batch_get_v2([states]) == {PoolName.MAMBA: [True] * 3}
    assert all(np.array_equal(mamba.buffers[at][[9, 10, 11]], wanted[at][boundaries]) for at in range(2))
    too_few = PoolTransfer(PoolName.MAMBA, host_indices=slots([1]), keys=keys[:2])
    assert storage.batch_get_v2([too_few]) == {PoolName.MAMBA: [False, False]}


def test_what_a_lookup_promised_stays_until_it_is_read(storage_config: Config, tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, dram=32 * MIB, segment=4 * MIB).start()
    try:
        host, page = Host(300), 2 * 65_536
        host.fill(6)
        storage, keys = opened(storage_config(str(daemon.socket)), host), hashes(300)
        hybrid(storage)
        assert all(storage.batch_set_v1(keys[:64], slots(list(range(64)))))
        assert storage.batch_exists_v2(keys[:32], []).kv_hit_pages == 32
        others = [opened(storage_config(str(daemon.socket), revision=str(at)), host) for at in range(8)]
        for other in others:  # ten times the memory there is
            for first in range(0, 300, 64):
                pages = list(range(first, min(first + 64, 300)))
                other.batch_set_v1([keys[at] for at in pages], slots(pages))
        assert 300 * page * len(others) > 9 * 32 * MIB
        expected = host.copy()
        host.wipe()
        assert storage.batch_get_v1(keys[:32], slots(list(range(32)))) == [True] * 32
        assert same(host, expected, list(range(32)))
        assert len(storage._pools["kv"].pages._promises) == 0, "read, so given back"
        assert storage.batch_exists(keys[32:64]) < 32, "not promised, so not kept"
    finally:
        daemon.kill9()


def test_promises_are_bounded_in_number_and_time() -> None:
    from kvd.sglang.promises import PROMISES_MAX, Promises

    class Lease:
        released = False

        def release(self) -> None:
            self.released = True

    leases = [Lease() for _ in range(PROMISES_MAX + 2)]
    promises = Promises(10.0)
    for at, lease in enumerate(leases):
        promises.keep(lease, [f"{at}", "common"], now_s=float(at) / 1000)  # type: ignore[arg-type]
    assert [lease.released for lease in leases] == [True, True] + [False] * PROMISES_MAX
    assert promises.take(["0"], 1.0) == (None, []), "the oldest went first"
    assert promises.take(["common", "2"], 1.0) == (leases[2], [1, 0])
    assert promises.take(["common", "2"], 1.0) == (None, []), "once a promise"
    assert promises.take(["3", "4"], 1.0) == (None, []), "of no one promise"
    assert promises.take(["5"], 100.0) == (None, [])
    assert all(lease.released for lease in leases[3:]) and len(promises) == 0


def test_a_daemon_that_dies_in_mid_batch_is_a_miss_and_comes_back(
    daemon: Daemon, storage_config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    host, keys = Host(PAGES), hashes(PAGES)
    host.fill(7)
    expected, everything = host.copy(), slots(list(range(PAGES)))
    storage = opened(storage_config(str(daemon.socket), timeout_s=0.5), host)
    assert all(storage.batch_set_v1(keys, everything))
    assert storage.batch_exists(keys) == PAGES
    with caplog.at_level(logging.WARNING, "kvd"):
        read = storage._pools["kv"].pages.read(keys, kill_at(daemon, 40, host))
        came = list(read)
        assert came[:40] == [True] * 40
        good = [page for page, there in enumerate(came) if there]
        assert same(host, expected, good), "never wrong"
        assert storage.batch_get_v1(keys, everything) == [False] * PAGES
        assert storage.batch_set_v1(hashes(4, 900), slots([0, 1, 2, 3])) == [False] * 4
        assert storage.batch_exists(keys) == 0 and not storage.exists(keys[0])
        assert storage.batch_exists_v2(keys, []).kv_hit_pages == 0
        failures = [record for record in caplog.records if "misses until" in record.message]
        assert len(failures) == 1, "said once"
        daemon.start()
        until("it works again", lambda: storage.batch_set_v1(hashes(4, 900), slots([0, 1, 2, 3])) == [True] * 4)
    assert any("works again" in record.message for record in caplog.records)


def kill_at(daemon: Daemon, at: int, host: Host) -> list[list[tuple[int, int]]]:
    """Places of all pages; the daemon dies when the `at`-th is asked for."""
    ptrs, sizes = host.get_page_buffer_meta(slots(list(range(PAGES))))
    pieces = list(zip(ptrs, sizes, strict=True))
    places = [pieces[page * 2 : page * 2 + 2] for page in range(PAGES)]

    class Places(list[list[tuple[int, int]]]):
        def __iter__(self) -> Any:
            for page in range(PAGES):
                if page == at:
                    daemon.kill9()
                for buffer in host.buffers:
                    buffer[page] = 0
                yield self[page]

    return Places(places)


def test_a_daemon_that_is_not_there_yet(storage_config: Config, tmp_path: Path) -> None:
    host, keys = Host(2), hashes(2)
    storage = KvdStorage(storage_config(str(tmp_path / "none.sock"), timeout_s=0.05), {})
    storage.register_mem_pool_host(host)
    assert storage.batch_exists(keys) == 0
    assert storage.batch_set_v1(keys, slots([0, 1])) == [False, False]
    assert storage.batch_get_v1(keys, slots([0, 1])) == [False, False]
    storage.close()


def test_clear_hides_what_was_stored(daemon: Daemon, storage_config: Config) -> None:
    host, keys = Host(2), hashes(2)
    storage = opened(storage_config(str(daemon.socket)), host)
    assert all(storage.batch_set_v1(keys, slots([0, 1])))
    assert storage.batch_exists(keys) == 2
    storage.clear()
    assert storage.batch_exists(keys) == 0
    assert storage.batch_get_v1(keys, slots([0, 1])) == [False, False]
    assert all(storage.batch_set_v1(keys, slots([0, 1])))
    assert storage.batch_exists(keys) == 2
    assert opened(storage_config(str(daemon.socket), epoch=1), host).batch_exists(keys) == 2


def test_a_logical_kv_pool_leaves_the_hit_to_the_others(daemon: Daemon, storage_config: Config) -> None:
    host, keys = Host(4), hashes(4)
    host.kv_buffer = None
    storage = opened(storage_config(str(daemon.socket)), host)
    assert storage.batch_set_v1(keys, slots([0, 1, 2, 3])) == [True] * 4
    rows = Host(4, (4096,))
    storage.register_mem_host_pool_v2(rows, PoolName.INDEXER)
    transfer = PoolTransfer(PoolName.INDEXER, host_indices=slots([0, 1]), keys=keys[:2])
    assert storage.batch_exists_v2(keys, [transfer]).kv_hit_pages == 0
    assert storage.batch_set_v2([transfer]) == {PoolName.INDEXER: [True, True]}
    assert storage.batch_exists_v2(keys, [transfer]).kv_hit_pages == 2


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"sokcet": "x"}, "sokcet"),
        ({"socket": ""}, "socket"),
        ({"revision": ""}, "revision"),
        ({"timeout_s": "2"}, "timeout_s"),
        ({"timeout_s": True}, "timeout_s"),
        ({"epoch": -1}, "epoch"),
        ({"tenant": 4}, "tenant"),
    ],
)
def test_a_setting_that_can_never_be_right_is_named(storage_config: Config, extra: dict[str, Any], field: str) -> None:
    with pytest.raises(kvd.InvalidError) as caught:
        KvdStorage(storage_config(**{"socket": "/tmp/x.sock", **extra}), {})
    assert caught.value.field.endswith(f".{field}") and caught.value.fix


def test_a_page_too_large_for_a_slot_is_named(storage_config: Config) -> None:
    storage = KvdStorage(storage_config("/tmp/x.sock"), {})

    class Huge(Host):
        def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
            return [4096], [65 * MIB]

    with pytest.raises(kvd.KvdError, match="slot"):
        storage.register_mem_pool_host(Huge(1, (4096,), PAGE_TOKENS))
