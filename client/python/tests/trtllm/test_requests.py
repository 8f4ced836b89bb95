"""What is loaded, stored and promised, decided without an engine, a daemon or a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvd._requests import REQUESTS_MAX, Requests


class FakeChain:
    """Whole blocks of tokens, as `kvd.Chain` counts them."""

    def __init__(self, block_tokens: int, tokens: Sequence[int] = ()) -> None:
        self._block_tokens = block_tokens
        self.tokens = list(tokens)

    def extend(self, tokens: Sequence[int]) -> int:
        self.tokens += tokens
        return len(self)

    def prefix(self, blocks: int) -> FakeChain:
        assert blocks <= len(self), "a prefix is of whole blocks"
        return FakeChain(self._block_tokens, self.tokens[: blocks * self._block_tokens])

    def __len__(self) -> int:
        return len(self.tokens) // self._block_tokens


def requests(block_tokens: int = 4, page_tokens: int = 4) -> Requests:
    return Requests(block_tokens, page_tokens, lambda _salt: FakeChain(block_tokens))


def test_a_cold_prompt_is_stored_once_and_then_block_by_block() -> None:
    wanted = requests()
    ask = wanted.begin(1, range(10), 0)
    assert ask is not None and len(ask.chain) == 2 and ask.first == 0
    assert wanted.promise(1, 0) == 0
    step = wanted.step(1, [], [7, 3, 5], 0, 10)
    assert step.load is None
    assert step.store is not None and (step.store.first, step.store.end, step.store.table) == (0, 2, (7, 3))
    assert wanted.step(1, [10], [], 10, 1).store is None
    last = wanted.step(1, [11], [], 11, 1).store
    assert last is not None and (last.first, last.end, last.table) == (2, 3, (7, 3, 5))


def test_what_is_there_is_loaded_behind_the_engines_own_and_not_stored_again() -> None:
    wanted = requests()
    ask = wanted.begin(1, range(18), 4)
    assert ask is not None and ask.first == 1 and len(ask.chain) == 4
    assert wanted.promise(1, 3) == 8
    step = wanted.step(1, [], [9, 8, 7, 6, 5], 4, 6)
    assert step.load is not None and (step.load.first, step.load.end) == (1, 3)
    assert step.load.table == (-1, 8, 7)
    assert step.store is not None and (step.store.first, step.store.end) == (3, 4)
    assert wanted.step(1, [18], [], 18, 1).load is None, "a promise is kept once"


def test_an_engine_that_counts_the_promise_as_computed_gets_the_same() -> None:
    wanted = requests()
    wanted.begin(1, range(18), 4)
    wanted.promise(1, 3)
    step = wanted.step(1, [], [9, 8, 7, 6, 5], 12, 6)
    assert step.load is not None and (step.load.first, step.load.end) == (1, 3)
    assert step.store is not None and (step.store.first, step.store.end) == (3, 4)


def test_the_last_token_is_always_computed() -> None:
    wanted = requests()
    ask = wanted.begin(1, range(8), 0)
    assert ask is not None and len(ask.chain) == 1
    assert wanted.promise(1, 2) == 4
    assert wanted.begin(2, range(4), 0) is None
    assert wanted.begin(3, range(1), 0) is None


@pytest.mark.parametrize(("block", "page", "promised"), [(8, 4, 16), (4, 8, 16), (4, 4, 20)])
def test_promises_end_with_a_block_and_a_page(block: int, page: int, promised: int) -> None:
    wanted = requests(block, page)
    assert wanted.begin(1, range(24), 0) is not None
    assert wanted.promise(1, 24 // block) == promised


def test_a_page_within_a_block_that_the_engine_has_is_skipped() -> None:
    wanted = requests(8, 4)
    ask = wanted.begin(1, range(20), 4)
    assert ask is not None and ask.first == 0
    assert wanted.promise(1, 2) == 12
    load = wanted.step(1, [], [1, 2, 3, 4, 5], 4, 4).load
    assert load is not None and (load.first, load.end, load.table) == (0, 2, (-1, 2, 3, 4))


def test_half_a_page_of_the_engines_own_asks_nothing_but_is_stored() -> None:
    wanted = requests()
    assert wanted.begin(1, range(9), 3) is None
    store = wanted.step(1, [], [1, 2, 3], 3, 6).store
    assert store is not None and (store.first, store.end) == (0, 2)


def test_chunks_are_stored_as_they_are_computed() -> None:
    wanted = requests()
    wanted.begin(1, range(13), 0)
    ends = [wanted.step(1, [], pages, at, 5).store for at, pages in ((0, [1, 2]), (5, [3]), (10, [4]))]
    assert [(one.first, one.end) for one in ends if one is not None] == [(0, 1), (1, 2), (2, 3)]


def test_tokens_without_pages_are_not_stored() -> None:
    wanted = requests()
    wanted.begin(1, range(12), 0)
    store = wanted.step(1, [], [1, 2], 0, 12).store
    assert store is not None and store.end == 2
    assert wanted.step(1, [], [-1], 12, 0).store is None


def test_pages_that_a_window_has_left_behind_are_no_loss() -> None:
    wanted = requests()
    wanted.begin(1, range(9), 0)
    wanted.promise(1, 1)
    store = wanted.step(1, [], [-1, 2, 3], 4, 5).store
    assert store is not None and (store.first, store.table) == (1, (-1, 2))


def test_what_the_engine_does_not_take_is_not_loaded() -> None:
    wanted = requests()
    wanted.begin(1, range(20), 0)
    assert wanted.promise(1, 4) == 16
    assert wanted.cancel(1, 9) == 8
    load = wanted.step(1, [], [1, 2, 3, 4, 5], 0, 12).load
    assert load is not None and load.end == 2
    wanted.begin(2, range(20), 0)
    wanted.promise(2, 4)
    assert wanted.cancel(2, 0) == 0
    assert wanted.step(2, [], [1, 2, 3, 4, 5], 0, 20).load is None
    assert wanted.cancel(3, 0) == 0, "nobody knows this one"


def test_a_store_begins_with_the_first_block_of_its_page() -> None:
    wanted = requests(4, 8)
    wanted.begin(1, range(8), 0)
    first = wanted.step(1, [], [1], 0, 4).store
    assert first is not None and (first.first, first.end, first.table) == (0, 1, (1,))
    more = wanted.step(1, [8], [2], 4, 5).store
    assert more is not None and (more.first, more.end, more.table) == (0, 2, (1,))
    last = wanted.step(1, [9, 10, 11, 12, 13, 14, 15, 16], [3], 9, 8).store
    assert last is not None and (last.first, last.end, last.table) == (2, 4, (1, 2))


def test_a_request_that_begins_anew_has_no_past() -> None:
    wanted = requests()
    wanted.begin(1, range(12), 0)
    wanted.step(1, [], [1, 2, 3], 0, 12)
    wanted.begin(1, range(12), 0)
    store = wanted.step(1, [], [4, 5, 6], 0, 12).store
    assert store is not None and store.table == (4, 5, 6)
    wanted.end(1)
    assert 1 not in wanted and wanted.tokens(1) == 0
    assert wanted.step(1, [1], [1], 0, 1).store is None


def test_more_requests_than_the_limit_pass_by(monkeypatch: pytest.MonkeyPatch) -> None:
    assert REQUESTS_MAX > 0
    monkeypatch.setattr("kvd._requests.REQUESTS_MAX", 1)
    wanted = requests()
    assert wanted.begin(1, range(9), 0) is not None
    assert wanted.begin(2, range(9), 0) is None
    assert len(wanted) == 1 and 2 not in wanted


def test_blocks_and_pages_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="set block_tokens to 12"):
        requests(8, 12)
