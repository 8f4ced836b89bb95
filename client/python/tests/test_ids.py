"""What blocks are called: golden vectors, a second reading of the format, and what makes ids differ.

No daemon is needed: a session that waits for none hashes as well.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import format_ids
import pytest
from format_ids import Extra, Span

import kvd

_VECTORS = Path(__file__).resolve().parents[3] / "proto" / "vectors"
LAYOUT = kvd.Layout.full(2, 2, 64, "f16", 4)
DTYPES = ["f32", "f16", "bf16", "f8_e4m3", "f8_e5m2", "i8", "f4_e2m1"]
KINDS = ["full", "window", "state", "latent", "draft"]
SCALES = ["none", "per_tensor", "per_head", "per_token"]


def vectors(name: str) -> list[Any]:
    found = json.loads((_VECTORS / f"{name}.json").read_text())["vectors"]
    return [pytest.param(one["input"], one["output"], id=one["name"]) for one in found]


@pytest.fixture
def client(tmp_path: Path) -> Iterator[kvd.Client]:
    with kvd.Client(tmp_path / "nobody.sock", wait_s=0) as session:
        yield session


@pytest.fixture
def space(client: kvd.Client) -> kvd.Space:
    return client.space("model", "r1", LAYOUT)


def group_of(given: dict[str, Any]) -> kvd.Group:
    one = {"head_size": 0, "vectors": 0, "dtype": 0, "scale": 0, "scale_digest_hex": "", **given}
    dtype = DTYPES[one["dtype"] - 1] if one["dtype"] else "bf16"
    more = {name: one[name] for name in ("window_tokens", "state_bytes") if name in one}
    return kvd.Group(
        KINDS[one["kind"] - 1],
        one["layers"],
        one["heads"],
        one["head_size"],
        dtype,
        vectors=one["vectors"],
        layer_ranges=one["layer_ranges"],
        head_ranges=one["head_ranges"],
        scale=SCALES[one["scale"]],
        scale_digest=bytes.fromhex(one["scale_digest_hex"]),
        **more,
    )


@pytest.mark.parametrize(("given", "expected"), vectors("spaces"))
def test_fingerprints_are_those_of_the_golden_vectors(
    given: dict[str, Any], expected: dict[str, str], tmp_path: Path
) -> None:
    groups = given["groups"]
    if any(group.get("dtype", 0) == 0 for group in groups):
        pytest.skip("SKIPPED: Group gives every group an element type, and this vector has one without")
    layout = kvd.Layout([group_of(group) for group in groups], given["block_tokens"])
    with kvd.Client(tmp_path / "nobody.sock", tenant=given["tenant"], wait_s=0) as client:
        space = client.space(
            given["model"],
            bytes.fromhex(given["revision_hex"]),
            layout,
            epoch=given["epoch"],
            id_scheme="tokens" if given["id_scheme"] == 1 else "named",
        )
    assert space.fingerprint.hex() == expected["fingerprint_hex"]


@pytest.mark.parametrize(("given", "expected"), vectors("layouts"))
def test_slots_are_cut_as_the_golden_vectors_have_it(given: dict[str, Any], expected: dict[str, Any]) -> None:
    if any(group.get("dtype", 0) == 0 for group in given["groups"]):
        pytest.skip("SKIPPED: Group gives every group an element type, and this vector has one without")
    layout = kvd.Layout([group_of(group) for group in given["groups"]], given["block_tokens"])
    for group, cut in enumerate(expected["groups"]):
        assert layout.slot_bytes(group) == cut["slot_bytes"]


def expected_ids(given: dict[str, Any]) -> bytes:
    space = bytes.fromhex(given["space_hex"])
    parent = bytes.fromhex(given.get("parent_hex", ""))
    match given["kind"]:
        case "root":
            adapter, salt = (bytes.fromhex(given[name]) for name in ("adapter_hex", "salt_hex"))
            return format_ids.root(space, adapter, salt)
        case "block" | "tail":
            extra = [Extra(one["offset"], one["kind"], bytes.fromhex(one["bytes_hex"])) for one in given["extras"]]
            return format_ids.block(space, parent, given["tokens"], extra, tail=given["kind"] == "tail")
        case "named":
            return format_ids.named(space, bytes.fromhex(given["key_hex"]))
        case _:
            found = given.get("spans", [])
            spans = [Span(s["position"], s["kind"], bytes.fromhex(s["digest_hex"]), s["tokens"]) for s in found]
            return b"".join(format_ids.chain(space, parent, given["tokens"], given["block_tokens"], spans))


@pytest.mark.parametrize(("given", "expected"), vectors("ids"))
def test_the_second_reading_is_that_of_the_golden_vectors(given: dict[str, Any], expected: dict[str, str]) -> None:
    assert expected_ids(given).hex() == expected.get("id_hex", expected.get("packed_hex"))


@pytest.mark.parametrize("seed", range(40))
def test_any_prompt_is_called_as_the_format_says(client: kvd.Client, seed: int) -> None:
    pick = random.Random(seed)
    block_tokens = pick.choice([1, 4, 16, 64])
    space = client.space("model", f"r{seed}", kvd.Layout.opaque(4096, block_tokens))
    adapter, salt = pick.choice([b"", pick.randbytes(32)]), pick.choice([b"", b"user"])
    tokens = [pick.randrange(1 << 32) for _ in range(pick.randrange(200))]
    spans = []
    at = pick.randrange(20)
    while at < len(tokens):
        spans.append(Span(at, pick.choice([kvd.IMAGE, kvd.AUDIO, 200]), pick.randbytes(32), 1 + pick.randrange(30)))
        at = spans[-1].position + spans[-1].tokens + pick.randrange(40)
    chain = space.chain(adapter=adapter, salt=salt)
    given = 0
    while given < len(tokens):
        end = min(len(tokens), given + 1 + pick.randrange(50))
        begun = [(s.kind, s.position, s.tokens, s.digest) for s in spans if given <= s.position < end]
        assert chain.extend(tokens[given:end], begun) == end // block_tokens
        given = end
    root = format_ids.root(space.fingerprint, adapter, salt)
    assert chain.root == root
    assert chain.tokens == len(tokens)
    whole = format_ids.chain(space.fingerprint, root, tokens, block_tokens, spans)
    assert chain.ids == b"".join(whole)
    assert [chain.id(at) for at in range(len(chain))] == whole
    tailed = chain.with_tail()
    assert tailed.tail_tokens == len(tokens) % block_tokens
    assert tailed.ids == b"".join(
        format_ids.chain(space.fingerprint, root, tokens, block_tokens, spans, with_tail=True)
    )
    assert space.chain_of(tailed.root, tailed.ids, tailed.tail_tokens).ids == tailed.ids


def test_what_makes_a_prompt_another(client: kvd.Client, space: kvd.Space) -> None:
    tokens = list(range(8))
    other = {
        "epoch": client.space("model", "r1", LAYOUT, epoch=1),
        "revision": client.space("model", "r2", LAYOUT),
        "model": client.space("other", "r1", LAYOUT),
        "dtype": client.space("model", "r1", kvd.Layout.full(2, 2, 64, "bf16", 4)),
        "block size": client.space("model", "r1", kvd.Layout.full(2, 2, 64, "f16", 8)),
    }
    ids = {name: space.chain(tokens).id(0) for name, space in other.items()}
    ids["plain"] = space.chain(tokens).id(0)
    ids["salt"] = space.chain(tokens, salt=b"user").id(0)
    ids["adapter"] = space.chain(tokens, adapter=b"user").id(0)
    for kind in (kvd.IMAGE, kvd.AUDIO, kvd.EMBEDDING, 128):
        chain = space.chain()
        chain.extend(tokens, [(kind, 1, 2, b"digest")])
        ids[f"span of kind {kind}"] = chain.id(0)
    assert len(set(ids.values())) == len(ids), ids
    assert client.space("model", b"r1", LAYOUT).chain(tokens).ids == space.chain(tokens).ids
    assert client.space("model", "r1", LAYOUT, id_scheme="named").named(["k"]).id(0) not in ids.values()


def test_pieces_of_a_chain(space: kvd.Space) -> None:
    chain = space.chain(range(14))
    assert (len(chain), chain.tokens, chain.tail_tokens) == (3, 14, 0)
    assert chain.prefix(2).ids == chain.ids[:32]
    assert len(chain.prefix(99)) == 3
    assert len(chain.with_tail()) == 4
    for piece in (chain.prefix(2), chain.with_tail()):
        with pytest.raises(kvd.InvalidError, match="piece of another"):
            piece.extend([1])
    with pytest.raises(kvd.InvalidError, match="block"):
        chain.id(3)


def test_what_can_be_no_token_is_refused(space: kvd.Space) -> None:
    for wrong in ([-1], [1 << 32]):
        with pytest.raises(OverflowError):
            space.chain(wrong)
    with pytest.raises(TypeError):
        space.chain(["a"])  # type: ignore[list-item]
    with pytest.raises(kvd.InvalidError):
        space.chain([1, 2], salt=bytes(5000))
    chain = space.chain(range(8))
    with pytest.raises(kvd.InvalidError):
        chain.extend([1, 2], [(kvd.IMAGE, 7, 1, b"in a block that is hashed")])


def test_layouts_that_make_no_sense_name_the_field() -> None:
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: kvd.Layout.full(0, 2, 64, "f16", 16), "layers"),
        (lambda: kvd.Layout.full(2, 2, 64, "f16", 0), "block_tokens"),
        (lambda: kvd.Layout.full(2, 2, 64, "f12", 16), "dtype"),
        (lambda: kvd.Layout([kvd.Group("full", 4, 3, 64, head_ranges=2)], 16), "head_ranges"),
        (lambda: kvd.Group("other", 4, 2, 64), "kind"),
        (lambda: kvd.Layout.opaque(4096, 3), "block_tokens"),
        (lambda: kvd.Layout.opaque(100), "bytes"),
        (lambda: kvd.Layout([], 16), "groups"),
    ]
    for wrong, field in cases:
        with pytest.raises(kvd.InvalidError) as error:
            wrong()
        assert field in error.value.field
        assert error.value.fix
