"""Whole blocks in and out: any memory that Python has, what is refused, what a miss is."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rig import Daemon, content, reason, torch, until

import kvd

SLOT = 16384
TOKENS = list(range(1, 65))


def owned(name: str) -> list[bytearray]:
    return [content((name, block), SLOT) for block in range(4)]


def test_ten_lines(node: Daemon) -> None:
    with kvd.Client(node.socket) as client:
        space = client.space("llama-3-8b", "r1", kvd.Layout.full(2, 2, 64, "f16", 16))
        chain = space.chain(TOKENS)
        blocks = owned("ten lines")
        assert space.store(chain, blocks).stored == 4
        into = [bytearray(SLOT) for _ in blocks]
        assert space.load(chain, into).blocks == 4
        assert into == blocks


def memory_of(data: bytearray) -> kvd.Memory:
    raw = (ctypes.c_char * len(data)).from_buffer(data)
    return kvd.Memory(ctypes.addressof(raw), len(data), keep=raw)


def tensor_of(data: bytearray) -> Any:
    found = torch()
    return found.frombuffer(data, dtype=found.float16)


def matrix_of(data: bytearray) -> Any:
    return np.frombuffer(data, dtype=np.float16).reshape(2, 2, 2, 16, 64)


VIEWS: list[Callable[[bytearray], Any]] = [bytearray, memoryview, matrix_of, memory_of, tensor_of]


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_whatever_has_memory_is_stored_and_loaded(space: kvd.Space, view: Callable[[bytearray], Any]) -> None:
    chain, blocks = space.chain(TOKENS), owned(view.__name__)
    stored = space.store(chain, [view(block) for block in blocks])
    assert (stored.stored, stored.present, stored.busy, stored.no_space) == (4, 0, 0, 0)
    into = [bytearray(SLOT) for _ in blocks]
    raw = into if view is bytearray else [view(data) for data in into]
    loaded = space.load(chain, raw)
    assert (loaded.blocks, loaded.miss) == (4, None)
    assert into == blocks


def test_bytes_are_stored_and_never_written(space: kvd.Space) -> None:
    chain, block = space.chain(TOKENS[:16]), bytes(content("bytes", SLOT))
    assert space.store(chain, [block]).stored == 1
    with pytest.raises(kvd.InvalidError, match="read-only"):
        space.load(chain, [bytes(SLOT)])
    with pytest.raises(kvd.InvalidError, match="read-only"):
        space.load(chain, [memoryview(block)])


def test_what_is_no_slot_is_refused(space: kvd.Space) -> None:
    chain = space.chain(TOKENS[:16])
    for wrong in [bytearray(SLOT - 1), bytearray(SLOT + 1), bytearray(0)]:
        with pytest.raises(kvd.InvalidError, match="exactly one slot") as error:
            space.store(chain, [wrong])
        assert (error.value.code, error.value.field) == ("invalid", "buffer")
        with pytest.raises(ValueError, match="exactly one slot"):
            space.load(chain, [wrong])
    every_other: Any = np.zeros(2 * SLOT, np.uint8)[::2]
    with pytest.raises(kvd.InvalidError, match="not contiguous"):
        space.store(chain, [every_other])
    with pytest.raises(kvd.InvalidError, match="has no memory"):
        space.store(chain, [object()])  # type: ignore[list-item]
    with pytest.raises(kvd.InvalidError, match="one buffer a block"):
        space.store(chain, [bytearray(SLOT)] * 2)
    with pytest.raises(kvd.InvalidError, match="ptr"):
        kvd.Memory(0, SLOT)
    assert space.exists(chain) == []


def test_a_tensor_that_is_not_contiguous_is_refused(space: kvd.Space) -> None:
    found = torch()
    with pytest.raises(kvd.InvalidError, match="contiguous"):
        space.store(space.chain(TOKENS[:16]), [found.zeros(64, 128, dtype=found.float16).t()])


def test_patience_that_is_none_is_refused(space: kvd.Space) -> None:
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(kvd.InvalidError, match="timeout_s"):
            space.exists(space.chain(TOKENS), wrong)


def test_a_prefix_is_loaded_and_the_rest_is_absent(space: kvd.Space) -> None:
    chain, blocks = space.chain(TOKENS), owned("prefix")
    assert space.store(chain, blocks[:2]).stored == 2
    into = [bytearray(b"\xee" * SLOT) for _ in blocks]
    loaded = space.load(chain, into)
    assert (loaded.blocks, reason(loaded.miss)) == (2, "absent")
    assert not loaded.miss
    assert into == [*blocks[:2], *[bytearray(b"\xee" * SLOT)] * 2]
    assert space.exists(chain) == ["dram", "dram"]
    assert space.store(chain, blocks).present == 2
    assert space.load(chain, into[:2], first=2).blocks == 2
    assert into[:2] == blocks[2:]


def test_a_lease_is_read_and_ends(space: kvd.Space) -> None:
    chain, blocks = space.chain(TOKENS), owned("lease")
    space.store(chain, blocks)
    with space.match("request", chain) as found:
        assert (found.blocks, found.source(0), found.hand_off[0]) == (4, "dram", "none")
        assert found.lease > 0
        assert space.match("request", chain).lease == found.lease
        into = bytearray(SLOT)
        assert found.wait(3, 5.0)
        assert found.read(3, into) is True
        assert into == blocks[3]
        with pytest.raises(kvd.InvalidError, match="group"):
            found.read(0, into, group=1)
        beyond = found.read(4, into)
        assert not beyond
    with pytest.raises(kvd.KvdError) as error:
        found.read(0, bytearray(SLOT))
    assert error.value.code == "lease_ended"


def test_fills_say_what_became_of_each_block(space: kvd.Space) -> None:
    chain, blocks = space.chain(TOKENS), owned("fill")
    space.store(chain, blocks[:1])
    with space.reserve("request", chain) as fill:
        assert fill.states == ["present", "granted", "granted", "granted"]
        assert fill.granted == [1, 2, 3]
        other = space.reserve("other", chain, first=1)
        assert (other.states, other.granted) == (["busy"] * 3, [])
        fill.write(1, blocks[1])
        with pytest.raises(kvd.InvalidError, match="not granted"):
            fill.write(0, blocks[0])
        with pytest.raises(kvd.InvalidError, match="not granted"):
            fill.write(4, blocks[0])
        assert space.exists(chain) == ["dram"]
    assert space.exists(chain) == ["dram"]
    # released without a commit: free for others
    until("the slots", lambda: space.reserve("third", chain, first=1).granted == [1, 2, 3])


def test_several_groups_are_filled_and_read_each_for_itself(space_of: Callable[..., kvd.Space]) -> None:
    full = kvd.Group("full", 4, 2, 64, "bf16")
    window = kvd.Group("window", 2, 4, 32, "f16", window_tokens=128)
    state = kvd.Group("state", 2, 2, 1, "f32", state_bytes=3000)
    space = space_of(kvd.Layout([full, window, state], 16))
    sizes = [space.layout.slot_bytes(group) for group in range(3)]
    chain = space.chain(TOKENS[:32])
    with space.reserve("r", chain) as fill:
        for block in fill.granted:
            for group, size in enumerate(sizes):
                fill.write(block, content((block, group), size), group)
        assert fill.commit() == 2
    found = space.match("r2", chain)
    assert found.blocks == 2
    for block in range(2):
        for group, size in enumerate(sizes):
            into = bytearray(size)
            assert found.read(block, into, group) is True
            assert into == content((block, group), size)
    with pytest.raises(kvd.InvalidError, match="several groups"):
        space.store(chain, [bytearray(sizes[0])])


def test_named_blocks_stand_each_for_itself(space_of: Callable[..., kvd.Space]) -> None:
    space = space_of(kvd.Layout.opaque(8192), id_scheme="named")
    keys = [f"key-{at}" for at in range(6)]
    blocks = [content(key, 8192) for key in keys]
    some = [0, 2, 3, 5]
    chain = space.named([keys[at] for at in some])
    assert space.store_each(chain, [blocks[at] for at in some]) == [True] * 4
    whole = space.named(keys)
    assert space.exists_each(whole) == [at in some for at in range(6)]
    into = [bytearray(8192) for _ in keys]
    got = space.load_each(whole, into)
    assert [bool(one) for one in got] == [at in some for at in range(6)]
    assert all(into[at] == blocks[at] for at in some)
    assert space.store_each(whole, blocks) == [True] * 6
    with pytest.raises(kvd.InvalidError, match="id_scheme"):
        space.chain(TOKENS)


def test_pins_and_prefetches_say_how_many(space: kvd.Space) -> None:
    chain = space.chain(TOKENS)
    space.store(chain, owned("pin")[:3])
    assert space.pin(chain, 60.0) == 3
    assert space.pin(chain, 0.0) == 3
    assert space.prefetch(chain) == 0
