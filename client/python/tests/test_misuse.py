"""Who asks for something that is almost the same: another model state's blocks are never served."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rig import Daemon, content

import kvd

LAYOUT = kvd.Layout.full(2, 2, 64, "f16", 16)
SLOT = LAYOUT.slot_bytes()
PROMPT = list(range(32))
BLOCKS = [content(block, SLOT) for block in range(2)]
RIGHT: dict[str, Any] = {"model": "misuse", "revision": "r1", "layout": LAYOUT, "epoch": 0}

ALMOST: dict[str, dict[str, Any]] = {
    "revision": {"revision": "r2"},
    "epoch": {"epoch": 1},
    "model": {"model": "misuse-2"},
    "dtype": {"layout": kvd.Layout.full(2, 2, 64, "bf16", 16)},
    "block size": {"layout": kvd.Layout.full(4, 2, 64, "f16", 8)},
    "layers and heads the other way": {"layout": kvd.Layout([kvd.Group("full", 4, 1, 64, "f16")], 16)},
    "kind": {"layout": kvd.Layout([kvd.Group("window", 2, 2, 64, "f16", window_tokens=32)], 16)},
    "scales": {"layout": kvd.Layout([kvd.Group("full", 2, 2, 64, "f16", scale="per_head")], 16)},
    "scale digest": {
        "layout": kvd.Layout([kvd.Group("full", 2, 2, 64, "f16", scale="per_tensor", scale_digest=b"0" * 32)], 16)
    },
}


@pytest.fixture(scope="module")
def stored(node: Daemon) -> Iterator[kvd.Client]:
    with node.client() as client:
        space = client.space(**RIGHT)
        assert space.store(space.chain(PROMPT), BLOCKS).stored == 2
        yield client


def nothing_is_there(space: kvd.Space, chain: kvd.Chain) -> None:
    into = [bytearray(b"\xee" * SLOT) for _ in chain.ids[::16]]
    assert space.exists(chain) == []
    assert space.load(chain, into).blocks == 0
    assert into == [bytearray(b"\xee" * SLOT)] * len(into)


def test_the_right_one_is_served(stored: kvd.Client) -> None:
    space, into = stored.space(**RIGHT), [bytearray(SLOT), bytearray(SLOT)]
    assert space.load(space.chain(PROMPT), into).blocks == 2
    assert into == BLOCKS


@pytest.mark.parametrize("what", ALMOST)
def test_almost_the_same_space_has_none_of_its_blocks(stored: kvd.Client, what: str) -> None:
    space = stored.space(**{**RIGHT, **ALMOST[what]})
    assert space.layout.slot_bytes() == SLOT, "it would fit"
    nothing_is_there(space, space.chain(PROMPT))


@pytest.mark.parametrize("given", [{"salt": b"user"}, {"adapter": b"lora"}], ids=["salt", "adapter"])
def test_another_users_or_adapters_prompt_is_another(stored: kvd.Client, given: dict[str, bytes]) -> None:
    space = stored.space(**RIGHT)
    nothing_is_there(space, space.chain(PROMPT, **given))


def test_another_tenant_has_nothing_of_it(stored: kvd.Client, node: Daemon) -> None:
    assert stored.tenant == "default"
    with node.client(tenant="other") as client:
        space = client.space(**RIGHT)
        nothing_is_there(space, space.chain(PROMPT))


def test_ids_of_one_space_mean_nothing_in_another(stored: kvd.Client) -> None:
    right = stored.space(**RIGHT).chain(PROMPT)
    other = stored.space(**{**RIGHT, "epoch": 7})
    nothing_is_there(other, other.chain_of(right.root, right.ids))


def test_a_block_in_the_middle_is_not_reached_from_another_beginning(stored: kvd.Client) -> None:
    space = stored.space(**RIGHT)
    nothing_is_there(space, space.chain([7, *PROMPT[1:]]))
    nothing_is_there(space, space.chain(PROMPT[16:]))


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (lambda client: client.space("", "r1", LAYOUT), "model"),
        (lambda client: client.space("m" * 10_000, "r1", LAYOUT), "model"),
        (lambda client: client.space("m", b"", LAYOUT), "revision"),
        (lambda client: client.space("m", "r1", LAYOUT, id_scheme="tags"), "id_scheme"),
    ],
    ids=["no model", "a long model", "no revision", "another scheme"],
)
def test_spaces_that_can_never_be_right_name_the_field(
    stored: kvd.Client, wrong: Callable[[kvd.Client], kvd.Space], field: str
) -> None:
    with pytest.raises(kvd.InvalidError) as error:
        wrong(stored)
    assert field in error.value.field
    assert error.value.fix


def test_keys_and_firsts_beyond_limits_are_refused(stored: kvd.Client) -> None:
    space = stored.space(**RIGHT)
    chain = space.chain(PROMPT)
    with pytest.raises(kvd.InvalidError, match="key"):
        space.match(b"k" * 10_000, chain)
    with pytest.raises(kvd.InvalidError, match="first"):
        space.reserve("r", chain, first=3)
    with pytest.raises(kvd.InvalidError, match="chain"):
        space.exists_each(chain)
