"""A bit that changes in the daemon's memory: a miss, counted and gone, never bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from paged import Rank, Truth
from rig import Daemon, content, reason, until

import kvd

LAYOUT = kvd.Layout.full(2, 2, 64, "f16", 16)
SLOT = LAYOUT.slot_bytes()


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon whose memory is damaged by its test alone."""
    with Daemon(tmp_path) as daemon:
        yield daemon


@pytest.mark.parametrize("at", [0, SLOT // 2, SLOT - 16])
def test_a_flipped_bit_is_a_miss_and_then_absent(damaged: Daemon, at: int) -> None:
    with damaged.client() as client:
        space = client.space("model", "r1", LAYOUT)
        chain, blocks = space.chain(range(48)), [content(block, SLOT) for block in range(3)]
        space.store(chain, blocks)
        damaged.wait_checksummed(chain)
        assert damaged.flip_bit_of(bytes(blocks[1][at : at + 16])) == 1
        into = [bytearray(SLOT) for _ in blocks]
        loaded = space.load(chain, into)
        assert (loaded.blocks, reason(loaded.miss)) == (1, "checksum")
        assert into[0] == blocks[0]
        until("the block's end", lambda: len(space.exists(chain)) == 1)
        again = space.load(chain, into)
        assert (again.blocks, reason(again.miss)) == (1, "absent")
        until("room for it", lambda: space.store(chain, blocks).stored == 1)
        assert space.load(chain, into).blocks == 3
        assert into == blocks


def test_a_lease_reads_the_damage_as_a_miss(damaged: Daemon) -> None:
    with damaged.client() as client:
        space = client.space("model", "r1", LAYOUT)
        chain, blocks = space.chain(range(32)), [content(block, SLOT) for block in range(2)]
        space.store(chain, blocks)
        damaged.wait_checksummed(chain)
        with space.match("r", chain) as found:
            damaged.flip_bit_of(bytes(blocks[0][:16]))
            assert reason(found.read(0, bytearray(SLOT))) == "checksum"
            assert found.read(1, into := bytearray(SLOT)) is True
            assert into == blocks[1]


def test_named_blocks_around_the_damage_are_served(damaged: Daemon) -> None:
    with damaged.client() as client:
        space = client.space("model", "r1", kvd.Layout.opaque(4096), id_scheme="named")
        chain, blocks = space.named(["a", "b", "c"]), [content(key, 4096) for key in "abc"]
        assert space.store_each(chain, blocks) == [True] * 3
        damaged.wait_checksummed(chain)
        damaged.flip_bit_of(bytes(blocks[1][100:116]))
        into = [bytearray(4096) for _ in blocks]
        first, second, third = space.load_each(chain, into)
        assert (first, third) == (True, True)
        assert reason(second) == "checksum"
        assert (into[0], into[2]) == (blocks[0], blocks[2])


def test_a_load_into_pages_ends_before_the_damage(damaged: Daemon) -> None:
    truth = Truth(LAYOUT, blocks=3, seed=1)
    with damaged.client() as client:
        space = client.space("model", "r1", LAYOUT)
        chain = space.chain(range(48))
        writer, reader = Rank(LAYOUT, pages=8), Rank(LAYOUT, pages=8)
        writer.fill(truth, table := [5, 0, 3])
        writer.store(space, "w", chain, table)
        damaged.wait_checksummed(chain)
        assert damaged.flip_bit_of(truth.slot(1)[:32]) >= 1
        first_missing, miss, _ = reader.load(space, "r", chain, table)
        assert (first_missing, reason(miss)) == (1, "checksum")
        assert reader.differs(truth, table, end=1) == []
