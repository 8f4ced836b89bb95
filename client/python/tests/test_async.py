"""What is under way: asyncio, callbacks, patience, and giving up."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from rig import DEADLINE_S, content, until

import kvd

SLOT = 16384


def pieces(space: kvd.Space, name: str) -> tuple[kvd.Chain, list[bytearray]]:
    return space.chain(list(range(64)), salt=name.encode()), [content((name, at), SLOT) for at in range(4)]


async def round_trip(space: kvd.Space, name: str) -> bool:
    chain, blocks = pieces(space, name)
    stored = await space.store_soon(chain, blocks)
    with await space.match_soon(name, chain) as found:
        assert found.blocks == stored.stored == 4
    into = [bytearray(SLOT) for _ in blocks]
    loaded = await space.load_soon(chain, into)
    return loaded.blocks == 4 and into == blocks


def test_many_at_once_in_one_loop(space: kvd.Space) -> None:
    async def all_of_them() -> list[bool]:
        return await asyncio.gather(*(round_trip(space, f"task-{at}") for at in range(20)))

    assert all(asyncio.run(all_of_them()))


def test_threads_do_not_wait_for_each_other(space: kvd.Space) -> None:
    done: list[bool] = []
    work = [
        threading.Thread(target=lambda at=at: done.append(asyncio.run(round_trip(space, f"thread-{at}"))))
        for at in range(4)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join(DEADLINE_S)
    assert done == [True] * 4


def test_a_cancelled_task_gives_up_its_work_and_what_it_held(space: kvd.Space) -> None:
    chain, blocks = pieces(space, "cancelled")

    async def give_up() -> None:
        held = space.reserve("holder", chain)
        # the slots are busy: whoever may wait waits
        task = asyncio.ensure_future(round_trip(space, "another"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        held.release()

    asyncio.run(give_up())
    until("the slots", lambda: space.store(chain, blocks).stored == 4)


def test_a_pending_result_is_asked_called_and_cancelled(space: kvd.Space) -> None:
    chain, _ = pieces(space, "pending")
    pending = space.exists_soon(chain)
    called = threading.Event()
    pending.add_done_callback(lambda one: called.set() if one is pending else None)
    assert pending.result(DEADLINE_S) == []
    assert pending.done()
    assert called.wait(DEADLINE_S)
    assert pending.result() == [], "a result may be asked for again"
    late = threading.Event()
    pending.add_done_callback(lambda _: late.set())
    assert late.is_set(), "at once, if it is done"
    pending.cancel()
    assert pending.result() == []


def test_a_match_that_nobody_takes_is_given_back(space: kvd.Space) -> None:
    chain, blocks = pieces(space, "untaken")
    space.store(chain, blocks)
    pending = space.match_soon("untaken", chain)
    until("the match", pending.done)
    lease = space.match("untaken", chain).lease
    del pending
    until("another lease", lambda: space.match("untaken", chain).lease != lease)


def test_without_a_node_patience_ends(tmp_path: Path) -> None:
    with kvd.Client(tmp_path / "nobody.sock", wait_s=0) as client:
        space = client.space("model", "r1", kvd.Layout.opaque(4096))
        pending = space.match_soon("r", space.chain([1]))
        with pytest.raises(kvd.UnavailableError) as error:
            pending.result(DEADLINE_S)
        assert error.value.code == "unavailable"
        assert isinstance(error.value, ConnectionError)

        async def asked() -> None:
            with pytest.raises(kvd.UnavailableError):
                await space.exists_soon(space.chain([1]))

        asyncio.run(asked())
