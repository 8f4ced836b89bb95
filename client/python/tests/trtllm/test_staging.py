"""Rows are given once, and again only when nothing touches them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="SKIPPED: torch is not installed")

from kvd._staging import Staging


def test_rows_come_back_when_their_reader_is_done() -> None:
    staging = Staging(torch.zeros(8, 2, 2, 4), 3)
    taken = staging.take(2)
    assert taken is not None and len(set(taken)) == 2
    assert staging.take(2) is None, "none rather than some"
    done = [False]
    staging.give(taken, lambda: done[0])
    assert staging.free == 1
    done[0] = True
    assert staging.free == 3


def test_rows_and_pages_hold_the_same() -> None:
    pool = torch.arange(8 * 2 * 2 * 4, dtype=torch.float32).reshape(8, 2, 2, 4)
    want = pool.clone()
    staging = Staging(pool, 2)
    rows = staging.take(2)
    assert rows is not None
    assert staging.from_pool(rows, pool, [5, 1], None) is None
    pool.zero_()
    staging.to_pool(rows, pool, [5, 1], None)
    assert torch.equal(pool[5], want[5]) and torch.equal(pool[1], want[1])
    assert not pool[[0, 2, 3, 4, 6, 7]].any()


def test_a_gpus_pages_go_through_pinned_rows_in_the_order_of_the_stream() -> None:
    if not torch.cuda.is_available():
        pytest.skip("SKIPPED: no CUDA device")
    pool = torch.arange(8 * 2 * 2 * 4, dtype=torch.float32, device="cuda").reshape(8, 2, 2, 4)
    want = pool.clone()
    staging, stream = Staging(pool, 2), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    assert staging.rows.is_pinned()
    rows = staging.take(2)
    assert rows is not None
    copied = staging.from_pool(rows, pool, [5, 1], stream)
    with torch.cuda.stream(stream):
        pool.zero_()
    back = staging.to_pool(rows, pool, [1, 5], stream)
    stream.synchronize()
    assert copied is not None and copied() and back is not None and back()
    assert torch.equal(pool[1], want[5]) and torch.equal(pool[5], want[1])
