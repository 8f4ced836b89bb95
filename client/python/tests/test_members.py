"""Members of one session, each a process: ranks, one that dies, a hand-off to another engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from paged import Rank, Truth, ranks
from rig import Daemon, child, content, reason, says, tell, until

import kvd

LAYOUT = kvd.Layout.full(2, 4, 64, "bf16", 16)
PROMPT = list(range(64))
TABLE = [3, 0, 2, 5]
SEED = 11

RANK = """
import sys, kvd
from paged import Truth, ranks
from test_members import LAYOUT, PROMPT, SEED, TABLE
socket, token, at, degree = sys.argv[1], bytes.fromhex(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
client = kvd.Client(socket, join=token, member=f"rank-{at}")
space = client.space("shared", "r1", LAYOUT)
rank = ranks(LAYOUT, degree, pages=8)[at]
rank.fill(Truth(LAYOUT, 4, SEED), TABLE)
chain = space.chain(PROMPT)
fill = space.reserve("request", chain)
print("reserved", len(fill.granted), flush=True)
for line in sys.stdin:
    print("stored", rank.store(space, "request", chain, TABLE).stored, flush=True)
"""

ENGINE = """
import sys, kvd
from rig import content
client = kvd.Client(sys.argv[1], engine="prefill")
space = client.space("handed", "r1", kvd.Layout.full(2, 2, 64, "f16", 16))
chain = space.chain(range(40)).with_tail()
slot = space.layout.slot_bytes()
hold = kvd.HandOff("request-7", blocks=len(chain))
with space.reserve("p", chain, hand_off=hold) as fill:
    print("reserved", len(fill.granted), fill.handed_off, flush=True)
    sys.stdin.readline()
    for block in fill.granted:
        fill.write(block, content(block, slot))
    print("committed", fill.commit(), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path) as daemon:
        yield daemon


def test_ranks_in_processes_of_their_own_fill_the_same_blocks(alone: Daemon) -> None:
    with alone.client(member="scheduler") as client:
        space = client.space("shared", "r1", LAYOUT)
        chain, truth = space.chain(PROMPT), Truth(LAYOUT, 4, SEED)
        words = str(alone.socket), client.token.hex()
        with child(RANK, *words, "0", "2") as first, child(RANK, *words, "1", "2") as second:
            for rank in (first, second):
                assert says(rank, "reserved") == "4"
            tell(first)
            assert says(first, "stored") == "4"
            assert space.exists(chain) == [], "half of every block is missing"
            tell(second)
            assert says(second, "stored") == "4"
        assert space.exists(chain) == ["dram"] * 4
        for reader in ranks(LAYOUT, 4, pages=8, style="HND"):
            assert reader.load(space, "r", chain, TABLE)[0] is None
            assert reader.differs(truth, TABLE) == []


def test_a_rank_that_dies_before_its_commit_leaves_nothing_to_see(alone: Daemon) -> None:
    with alone.client(member="scheduler") as client:
        space = client.space("shared", "r1", LAYOUT)
        chain, truth = space.chain(PROMPT), Truth(LAYOUT, 4, SEED)
        words = str(alone.socket), client.token.hex()
        with child(RANK, *words, "0", "2") as first, child(RANK, *words, "1", "2") as second:
            for rank in (first, second):
                assert says(rank, "reserved") == "4"
            tell(first)
            assert says(first, "stored") == "4"
            second.kill()
            second.wait()
            assert space.exists(chain) == []
            # somebody else may fill them, while the first still has its hands on the slots
            whole = Rank(LAYOUT, 8)
            whole.fill(truth, TABLE)
            until("the fill's end", lambda: whole.store(space, "again", chain, TABLE).stored == 4)
        assert whole.load(space, "r", chain, TABLE)[0] is None
        assert whole.differs(truth, TABLE) == []


def test_a_request_is_handed_over_tail_and_all(alone: Daemon) -> None:
    layout = kvd.Layout.full(2, 2, 64, "f16", 16)
    slot = layout.slot_bytes()
    with alone.client(engine="decode") as client, child(ENGINE, str(alone.socket)) as prefill:
        space = client.space("handed", "r1", layout)
        chain = space.chain(range(40)).with_tail()
        assert (len(chain), chain.tail_tokens) == (3, 8)
        assert says(prefill, "reserved") == "3 True"
        claim = kvd.Claim("request-7")
        with space.match("d", chain, claim=claim) as early:
            state, ready, blocks = early.hand_off
            assert (state, ready, blocks, early.blocks) == ("not_yet", 0, 3, 0)
        tell(prefill)
        assert says(prefill, "committed") == "3"
        with space.match("d", chain, claim=kvd.Claim("request-7", wait_s=10.0), timeout_s=20.0) as found:
            assert (found.hand_off[0], found.blocks) == ("ready", 3)
            for block in range(3):
                assert found.wait(block, 10.0)
                into = bytearray(slot)
                assert found.read(block, into) is True
                assert into == content(block, slot)
        with space.match("d2", chain, claim=claim) as late:
            assert (late.hand_off[0], late.blocks) == ("gone", 2), "claimed once; whole blocks stay"


def test_who_joins_with_a_wrong_token_is_refused(alone: Daemon) -> None:
    with pytest.raises(kvd.KvdError) as error:
        kvd.Client(alone.socket, join=b"not a token", wait_s=1.0)
    assert error.value.fix


def test_a_member_comes_back_with_the_new_token(alone: Daemon) -> None:
    with alone.client(member="scheduler") as scheduler, alone.client(join=scheduler.token) as rank:
        old = scheduler.token
        alone.restart()
        until("another session", lambda: scheduler.connected and scheduler.token != old)
        rank.join(scheduler.token)
        assert rank.wait_connected(20.0)
        space = rank.space("m", "r1", LAYOUT)
        missed = space.load(space.chain(PROMPT), [bytearray(LAYOUT.slot_bytes())] * 4)
        assert reason(missed.miss) == "absent"
