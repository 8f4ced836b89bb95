"""A daemon that is not there yet, is killed, comes back: misses meanwhile, nothing to do for whoever asks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rig import DEADLINE_S, Daemon, content, reason, until

import kvd

LAYOUT = kvd.Layout.full(2, 2, 64, "f16", 16)
SLOT = LAYOUT.slot_bytes()


def blocks_of(name: str) -> list[bytearray]:
    return [content((name, block), SLOT) for block in range(2)]


def test_a_client_waits_for_nobody_and_is_there_when_the_daemon_is(tmp_path: Path) -> None:
    with kvd.Client(tmp_path / "kvd.sock", wait_s=0) as client:
        space = client.space("model", "r1", LAYOUT)
        chain, blocks = space.chain(range(32)), blocks_of("a")
        into = [bytearray(SLOT) for _ in blocks]
        assert not client.connected
        assert (client.token, client.node_epoch) == (b"", 0)
        loaded = space.load(chain, into)
        assert (loaded.blocks, reason(loaded.miss)) == (0, "away")
        with pytest.raises(kvd.UnavailableError):
            space.store(chain, blocks)
        until("why not", lambda: client.trouble)
        assert not client.wait_connected(0.0)
        with Daemon(tmp_path):
            assert client.wait_connected(DEADLINE_S)
            assert client.trouble is None
            assert space.store(chain, blocks).stored == 2
            assert space.load(chain, into).blocks == 2
            assert into == blocks


def test_whoever_waits_and_finds_nobody_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(kvd.UnavailableError) as error:
        kvd.Client(tmp_path / "kvd.sock", wait_s=0.05)
    assert "kvd" in error.value.fix
    with pytest.raises(kvd.InvalidError, match="wait_s"):
        kvd.Client(tmp_path / "kvd.sock", wait_s=-1.0)


def test_named_blocks_are_misses_while_the_node_is_away(tmp_path: Path) -> None:
    with kvd.Client(tmp_path / "kvd.sock", wait_s=0) as client:
        space = client.space("model", "r1", kvd.Layout.opaque(4096), id_scheme="named")
        chain = space.named(["a", "b"])
        assert space.exists_each(chain) == [False, False]
        assert space.store_each(chain, [bytearray(4096)] * 2) == [False, False]
        assert [reason(one) for one in space.load_each(chain, [bytearray(4096)] * 2)] == ["away"] * 2


def test_a_killed_daemon_is_a_miss_and_comes_back(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon, daemon.client() as client:
        space = client.space("model", "r1", LAYOUT)
        chain, blocks = space.chain(range(32)), blocks_of("b")
        space.store(chain, blocks)
        old, fill = space.match("r", chain), space.reserve("f", space.chain(range(100, 132)))
        assert (old.blocks, fill.granted) == (2, [0, 1])
        epoch = client.node_epoch
        daemon.kill9()
        into = [bytearray(SLOT) for _ in blocks]
        loaded = space.load(chain, into)
        assert (loaded.blocks, reason(loaded.miss)) == (0, "away")
        with pytest.raises(kvd.KvdError):
            fill.commit()
        daemon.start()
        assert client.wait_connected(DEADLINE_S)
        until("the new daemon", lambda: client.node_epoch != epoch)
        assert reason(old.read(0, into[0])) == "lease_ended"
        absent = space.load(chain, into)
        assert (absent.blocks, reason(absent.miss)) == (0, "absent")
        # the space is registered again by itself
        assert space.store(chain, blocks).stored == 2
        assert space.load(chain, into).blocks == 2
        assert into == blocks


def test_a_kill_amid_loads_is_never_more_than_a_miss(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon, daemon.client() as client:
        space = client.space("model", "r1", LAYOUT)
        chain, blocks = space.chain(range(32)), blocks_of("c")
        space.store(chain, blocks)
        loads = [(space.load_soon(chain, into), into) for into in ([bytearray(SLOT), bytearray(SLOT)],) * 50]
        daemon.kill9()
        for pending, into in loads:
            loaded = pending.result(DEADLINE_S)
            assert into[: loaded.blocks] == blocks[: loaded.blocks]


def test_what_reached_nvme_outlives_the_daemon(tmp_path: Path) -> None:
    with Daemon(tmp_path, dram=8 << 20, nvme=64 << 20) as daemon, daemon.client() as client:
        space = client.space("model", "r1", kvd.Layout.opaque(65536))
        chains = [space.chain([number]) for number in range(200)]
        for number, chain in enumerate(chains):
            assert space.store(chain, [content(number, 65536)], wait_s=5.0, timeout_s=10.0).stored == 1
        until("the first on NVMe", lambda: "nvme" in space.exists(chains[0]))
        assert daemon.stop() == 0
        daemon.start()
        assert client.wait_connected(DEADLINE_S)
        found = until("the first again", lambda: space.match("r", chains[0]).source(0) == "nvme" or None)
        assert found
        into = bytearray(65536)
        assert space.load(chains[0], [into]).blocks == 1
        assert into == content(0, 65536)


def test_a_lease_ends_with_its_time(tmp_path: Path) -> None:
    with Daemon(tmp_path, lease_ttl_ms=100) as daemon, daemon.client() as client:
        space = client.space("model", "r1", LAYOUT)
        chain, blocks = space.chain(range(32)), blocks_of("d")
        space.store(chain, blocks)
        found, into = space.match("r", chain), bytearray(SLOT)
        until("its end", lambda: reason(found.read(0, into)) == "lease_ended")


def test_a_closed_client_says_so(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon:
        client = daemon.client()
        client.close()
        client.close()
        with pytest.raises(kvd.UnavailableError, match="closed"):
            client.space("model", "r1", LAYOUT)


def test_a_child_after_a_fork_has_a_client_of_its_own(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon, daemon.client() as client:
        space = client.space("model", "r1", LAYOUT)
        chain, blocks = space.chain(range(32)), blocks_of("e")
        space.store(chain, blocks)
        child = os.fork()
        if child == 0:
            os._exit(_forked(daemon, client, blocks))
        until("the child", lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert space.exists(chain) == ["dram"] * 2


def _forked(daemon: Daemon, inherited: kvd.Client, blocks: list[bytearray]) -> int:
    """0: refused with the parent's client, served with its own."""
    try:
        inherited.space("model", "r1", LAYOUT)
        return 1
    except kvd.InvalidError:
        pass
    own = daemon.client().space("model", "r1", LAYOUT)
    into = [bytearray(SLOT) for _ in blocks]
    return 0 if own.load(own.chain(range(32)), into).blocks == 2 and into == blocks else 2
