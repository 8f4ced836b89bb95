"""Engines' pages in and out: ranks of every degree read what ranks of any other stored, byte by byte."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from paged import Rank, Truth, ranks
from rig import DEADLINE_S, Daemon

import kvd

Spaces = Callable[..., kvd.Space]
Store = Callable[..., None]
LAYOUT = kvd.Layout([kvd.Group("full", 4, 4, 64, "bf16", layer_ranges=2)], 16)
BLOCKS = 3
PROMPT = list(range(16 * BLOCKS))
TABLE = [6, 0, 3]


@pytest.fixture
def store_by(node: Daemon, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Every rank stores its own, as a member of its own; the blocks are there with the last. The scheduler's
    hold keeps the slots from one rank's end to another's beginning."""

    def store(truth: Truth, writers: list[Rank], prompt: list[int], table: list[int]) -> None:
        with node.client(member="scheduler") as scheduler:
            space = scheduler.space(request.node.name, "r1", truth.layout)
            chain = space.chain(prompt)
            with space.reserve("w", chain) as hold:
                assert hold.granted == list(range(truth.blocks))
                for at, rank in enumerate(writers):
                    assert space.exists(chain) == [], "a block is visible before its last part"
                    rank.fill(truth, table)
                    with node.client(member=f"rank-{at}", join=scheduler.token) as member:
                        own = member.space(request.node.name, "r1", truth.layout)
                        assert rank.store(own, "w", chain, table).stored == truth.blocks
            assert space.exists(chain) == ["dram"] * truth.blocks

    return store


@pytest.mark.parametrize("style", ["NHD", "HND"])
@pytest.mark.parametrize(("stored", "loaded"), [(1, 2), (1, 4), (2, 1), (4, 1), (4, 2), (2, 4)])
def test_any_degree_reads_what_any_other_stored(
    space_of: Spaces, store_by: Store, stored: int, loaded: int, style: str
) -> None:
    space, truth = space_of(LAYOUT), Truth(LAYOUT, BLOCKS, seed=stored * 10 + loaded)
    chain = space.chain(PROMPT)
    store_by(truth, ranks(LAYOUT, stored, pages=8, style=style), PROMPT, TABLE)
    with space.match("whole", chain) as found:
        for block in range(BLOCKS):
            into = bytearray(space.layout.slot_bytes())
            assert found.read(block, into) is True
            assert into == truth.slot(block), "not as FORMAT.md has it"
    table = [1, 7, 2]
    for rank in ranks(LAYOUT, loaded, pages=8):
        first_missing, miss, copied = rank.load(space, "r", chain, table)
        assert (first_missing, miss) == (None, None)
        assert copied == BLOCKS * LAYOUT.slot_bytes() // loaded
        assert rank.differs(truth, table) == []
        assert all(rank.untouched(page) for page in range(8) if page not in table)


def test_stages_of_a_pipeline_are_slices_as_well(space_of: Spaces, store_by: Store) -> None:
    space, truth = space_of(LAYOUT), Truth(LAYOUT, BLOCKS, seed=3)
    chain = space.chain(PROMPT)
    store_by(truth, ranks(LAYOUT, 2, stages=2, pages=8), PROMPT, TABLE)
    (whole,) = ranks(LAYOUT, 1, pages=8)
    assert whole.load(space, "r", chain, TABLE)[0] is None
    assert whole.differs(truth, TABLE) == []


LATENT = kvd.Layout([kvd.Group("latent", 3, 1, 576, "bf16", vectors=1)], 16)
WINDOW = kvd.Layout([kvd.Group("window", 4, 4, 64, "f16", window_tokens=64)], 16)


@pytest.mark.parametrize("layout", [LATENT, WINDOW], ids=["latent", "window"])
@pytest.mark.parametrize("page_tokens", [4, 16, 64])
def test_latents_and_windows_in_pages_of_any_size(
    space_of: Spaces, store_by: Store, layout: kvd.Layout, page_tokens: int
) -> None:
    space, truth = space_of(layout), Truth(layout, 4, seed=page_tokens)
    prompt, entries = list(range(64)), 64 // page_tokens
    table = random.Random(page_tokens).sample(range(32), entries)
    store_by(truth, ranks(layout, 1, pages=32, page_tokens=page_tokens), prompt, table)
    chain = space.chain(prompt)
    for rank in ranks(layout, 4, pages=32, page_tokens=page_tokens, style="HND"):
        assert rank.load(space, "r", chain, table)[0] is None
        assert rank.differs(truth, table) == []


def test_what_a_window_does_not_see_is_not_loaded(space_of: Spaces, store_by: Store) -> None:
    space, truth = space_of(WINDOW), Truth(WINDOW, BLOCKS, seed=5)
    chain = space.chain(PROMPT)
    store_by(truth, ranks(WINDOW, 1, pages=8), PROMPT, TABLE)
    (rank,) = ranks(WINDOW, 1, pages=8)
    table = [-1, 5, 4]
    assert rank.load(space, "r", chain, table)[0] is None
    assert rank.differs(truth, table) == []
    assert all(rank.untouched(page) for page in (0, 1, 2, 3, 6, 7))


def test_groups_go_together(space_of: Spaces) -> None:
    layout = kvd.Layout(
        [kvd.Group("full", 4, 2, 64, "bf16"), kvd.Group("window", 2, 4, 32, "f16", window_tokens=32)], 16
    )
    space, truth = space_of(layout), Truth(layout, BLOCKS, seed=6)
    chain, tables = space.chain(PROMPT), [TABLE, [2, 4, 1]]
    pair = [Rank(layout, 8, group=group) for group in (0, 1)]
    for rank, table in zip(pair, tables, strict=True):
        rank.fill(truth, table)
    storing = space.store_from("w", chain, [rank.described() for rank in pair], tables)
    assert storing.wait(DEADLINE_S)
    assert (stored := storing.outcome()) is not None
    assert stored.stored == BLOCKS
    other = [Rank(layout, 8, group=group, style="HND") for group in (0, 1)]
    found = space.match("r", chain)
    described = [rank.described() for rank in other]
    loading = found.load_into(described, tables, first=0, end=BLOCKS)
    for group, layers in ((0, 4), (1, 2)):
        assert all(loading.wait_layer(at, group=group, timeout_s=DEADLINE_S) for at in range(layers))
    assert loading.wait(DEADLINE_S)
    assert loading.done()
    for rank, table in zip(other, tables, strict=True):
        assert rank.differs(truth, table) == []
    with pytest.raises(kvd.InvalidError, match="pages"):
        found.load_into(described[:1], tables[:1], first=0, end=BLOCKS)


@pytest.mark.parametrize("seed", range(25))
def test_any_shape(space_of: Spaces, store_by: Store, seed: int) -> None:
    pick = random.Random(seed)
    heads, layers = pick.choice([1, 2, 4, 6]), pick.choice([1, 2, 3, 4, 6])
    block_tokens = pick.choice([8, 16, 32])
    kind = pick.choice(["full", "window", "latent"])
    group = kvd.Group(
        kind,
        layers,
        heads,
        pick.choice([16, 64, 80]),
        pick.choice(["f32", "bf16", "f8_e4m3"]),
        vectors=pick.choice([1, 2]),
        window_tokens=64 if kind == "window" else 0,
        head_ranges=heads,
        layer_ranges=pick.choice([at for at in range(1, layers + 1) if layers % at == 0]),
    )
    layout = kvd.Layout([group], block_tokens)
    blocks = pick.choice([1, 2, 4])
    space, truth = space_of(layout), Truth(layout, blocks, seed)
    prompt = [pick.randrange(1 << 17) for _ in range(blocks * block_tokens)]
    chain = space.chain(prompt)

    def placed() -> tuple[int, list[int]]:
        sizes = [block_tokens // 4, block_tokens // 2, block_tokens, blocks * block_tokens]
        size = pick.choice(sizes)
        return size, pick.sample(range(40), blocks * block_tokens // size)

    divisors = [at for at in range(1, heads + 1) if heads % at == 0]
    page_tokens, table = placed()
    writers = ranks(layout, pick.choice(divisors), pages=40, page_tokens=page_tokens)
    store_by(truth, writers, prompt, table)
    page_tokens, table = placed()
    for rank in ranks(layout, pick.choice(divisors), pages=40, page_tokens=page_tokens, style="HND"):
        assert rank.load(space, "r", chain, table)[0] is None
        assert rank.differs(truth, table) == []


def test_a_slice_or_a_table_that_makes_no_sense_is_refused(space_of: Spaces) -> None:
    space = space_of(LAYOUT)
    chain = space.chain(PROMPT)
    rank = Rank(LAYOUT, 8)
    memory = [kvd.LayerMemory(4096, page_stride=1, head_stride=1, token_stride=1)] * 4
    for wrong, match in [
        ({"page_tokens": 5, "pages": 8}, "page_tokens"),
        ({"page_tokens": 16, "pages": 0}, "pages"),
        ({"page_tokens": 16, "pages": 8, "first_head": 3, "heads": 2}, "head"),
        ({"page_tokens": 16, "pages": 8, "first_layer": 1}, "layer"),
        ({"page_tokens": 16, "pages": 8, "group": 1}, "group"),
        ({"page_tokens": 16, "pages": 8}, "stride"),
    ]:
        with pytest.raises(kvd.InvalidError, match=match):
            kvd.Pages(LAYOUT, memory, **wrong)
    with pytest.raises(kvd.InvalidError):
        rank.store(space, "w", chain, [1, 2, 99])
    with pytest.raises(kvd.InvalidError):
        rank.store(space, "w2", chain, [1, 2])
    with pytest.raises(kvd.InvalidError):
        rank.store(space, "w3", chain, [1, -1, 2])
    assert space.exists(chain) == []
    rank.fill(Truth(LAYOUT, BLOCKS, seed=7), TABLE)
    assert rank.store(space, "w4", chain, TABLE).stored == BLOCKS
    with pytest.raises(kvd.InvalidError):
        rank.load(space, "r", chain, [1, 2, 99])
    other = Rank(kvd.Layout.full(4, 4, 64, "f16", 16), 8)
    with pytest.raises(kvd.InvalidError, match="layout"):
        other.load(space, "r2", chain, TABLE)


def test_stopped_they_leave_the_pages_alone(node: Daemon) -> None:
    layout = kvd.Layout.full(8, 8, 128, "f32", 16)
    truth, prompt = Truth(layout, 12, seed=8), list(range(16 * 12))
    table = list(range(12))
    with node.client() as client:
        space = client.space("stopped", "r1", layout)
        chain, rank = space.chain(prompt), Rank(layout, 12)
        rank.fill(truth, table)
        storing = space.store_from("w", chain, [rank.described()], [table])
        storing.stop()
        for memory in rank.memory:
            memory[:] = 0  # the engine computes something else there
        assert storing.wait(DEADLINE_S)
        rank.fill(truth, table)
        rest = space.store_from("w2", chain, [rank.described()], [table], wait_s=5.0)
        assert rest.wait(DEADLINE_S)
        # whichever blocks the first one still stored are right
        reader = Rank(layout, 12)
        assert reader.load(space, "r", chain, table)[0] is None
        assert reader.differs(truth, table) == []
        loading = space.match("r2", chain).load_into([(late := Rank(layout, 12)).described()], [table], first=0, end=12)
        loading.stop()
        before = [memory.copy() for memory in late.memory]
        outcome = loading.outcome()
        assert outcome is not None
        assert late.differs(truth, table, end=12 if outcome[0] is None else outcome[0]) == []
        assert all((one == other).all() for one, other in zip(before, late.memory, strict=True))
