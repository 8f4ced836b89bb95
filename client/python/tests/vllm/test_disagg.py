"""Prefill and decode in two real vLLM servers behind the router: the same text as from one without kvd, whoever is killed.

Two nodes: the prefill engine and one decode engine on the first, another decode engine on the second. The tests are one story in their order:
what dies stays dead for those after it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="SKIPPED: vLLM is not installed; see install.sh")

from disagg import MODEL, Growth, Node, Router, Server, Servers, ask, complete, free_port, stream, text_of
from rig import until

import kvd
from kvd.vllm.profile import fit
from kvd.vllm.settings import Settings
from kvd.vllm.standing import Standing
from kvd.vllm.told import Told

HERE = Path(__file__).parent
BLOCK = 64
SYLLABLES = ["ba", "do", "fi", "gu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti"]
# one decode engine is told to be the faster one, so that the router's choice is known; the prefill engine measures itself
FAST, SLOW = {"decode_c_us": 1000.0}, {"decode_c_us": 2000.0}


def tokens(count: int, seed: int) -> list[int]:
    """A prompt of so many tokens that no other seed begins with."""
    dice = random.Random(seed)
    return [dice.randrange(3, 1024) for _ in range(count)]


def words(count: int, seed: int) -> str:
    """The same as text."""
    dice = random.Random(seed)
    return " ".join("".join(dice.choices(SYLLABLES, k=3)) for _ in range(count))


def prompts(seed: int) -> list[Any]:
    """Shorter than a block, one block, whole blocks, blocks and a tail of every kind, as tokens, text and conversation."""
    sizes = [5, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, 4 * BLOCK + 17, 1500]
    found: list[Any] = [tokens(size, seed + size) for size in sizes]
    talk = [{"role": "system", "content": words(40, seed)}, {"role": "user", "content": words(90, seed + 1)}]
    return [*found, words(120, seed + 2), talk]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """All of it."""
    folder = tmp_path_factory.mktemp("disagg")
    model = str(folder / "model")
    with Servers(folder, model) as servers:
        subprocess.run([sys.executable, str(HERE / "model.py"), "llama", model], check=True, timeout=120)
        addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
        with Node(folder / "a", addresses, 0) as a, Node(folder / "b", addresses, 1) as b:

            def start(name: str, node: Node, role: str, **worker: Any) -> Server:
                word = {"node": str(node.grpc), "name": name, "role": role, **worker}
                kv_role = "kv_producer" if role == "prefill" else "kv_consumer"
                extra = {"socket": str(node.socket), "worker": word, "claim_wait_ms": 2000}
                return servers.start(name, extra, kv_role)

            alone = servers.start("alone", None)
            prefill = start("prefill", a, "prefill")
            near, far = start("near", a, "decode", profile=FAST), start("far", b, "decode", profile=SLOW)
            for server in (alone, prefill, near, far):
                servers.wait(server)
            with Router(folder, addresses[0], model) as router:
                listed = {"prefill", "near", "far"}
                until("all are listed", lambda: router.workers() == listed, 60)
                yield SimpleNamespace(**locals())


def both(fleet: SimpleNamespace, prompt: Any, count: int = 16) -> dict[str, Any]:
    """The router's answer, which is that of the engine without kvd."""
    status, expected = complete(fleet.alone.url, prompt, count)
    assert status == 200, expected
    status, body = complete(fleet.router.url, prompt, count)
    assert status == 200, body
    assert text_of(body) == text_of(expected), prompt
    return body


def peer_blocks(node: Node) -> int:
    """Blocks that a node had from another."""
    (status,) = node.kvctl("status")
    return int(json.loads(json.dumps(status))["counters"]["hit_blocks_peer"])


def hand_offs(node: Node) -> int:
    """Not claimed yet."""
    (status,) = node.kvctl("status")
    return int(str(status["hand_offs"]))


def is_split(fleet: SimpleNamespace, decode: Server, prompt: Any) -> None:
    """The prompt is computed by the prefill engine, and all of it comes to the decode engine, the last token's KV included."""
    ours, theirs = Growth(decode), Growth(fleet.prefill)
    usage = both(fleet, prompt)["usage"]
    here, there = ours.after(1), theirs.after(1)
    assert there["prompt_tokens"] == usage["prompt_tokens"] == here["prompt_tokens"], "both had the whole prompt"
    assert here.get("prompt_tokens_by_source.local_compute", 0) == 0, here
    assert here["prompt_tokens_by_source.external_kv_transfer"] == usage["prompt_tokens"], here
    assert here["kvd_loaded_blocks"] == -(-usage["prompt_tokens"] // BLOCK), "tail included"
    assert here.get("kvd_failed_blocks", 0) == 0


def test_on_one_node_the_decode_engine_computes_no_prompt(fleet: SimpleNamespace) -> None:
    """Short, long, whole blocks and tails; tokens, text and conversations."""
    for prompt in prompts(seed=1):
        is_split(fleet, fleet.near, prompt)
    assert peer_blocks(fleet.b) == 0, "the faster decode engine had them all"
    until("nothing waits to be claimed", lambda: hand_offs(fleet.a) == 0)


def test_streams_are_the_same_and_what_is_cached_is_claimed_as_well(fleet: SimpleNamespace) -> None:
    """The same prompts again: both engines have their whole pages, and the rest is handed off all the same."""
    for prompt in prompts(seed=1):
        ours = Growth(fleet.near)
        pieces = list(stream(fleet.router.url, prompt))
        assert "".join(pieces) == "".join(stream(fleet.alone.url, prompt)) != ""
        assert ours.after(1).get("prompt_tokens_by_source.local_compute", 0) == 0
    until("nothing waits to be claimed", lambda: hand_offs(fleet.a) == 0)


def test_many_at_once(fleet: SimpleNamespace) -> None:
    """Answers of a batch are those of one after the other here: greedy, and of the same engine."""
    asked = [tokens(100 + 50 * at, 5000 + at) for at in range(6)]
    answers: dict[int, tuple[int, dict[str, Any]]] = {}

    def one(at: int) -> None:
        answers[at] = complete(fleet.router.url, asked[at], 4)

    threads = [threading.Thread(target=one, args=(at,)) for at in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for at, prompt in enumerate(asked):
        expected = complete(fleet.alone.url, prompt, 4)[1]
        assert answers[at][0] == 200 and text_of(answers[at][1]) == text_of(expected), at


def test_the_answer_of_a_prefill_says_what_it_left_and_a_word_of_nonsense_is_none(fleet: SimpleNamespace) -> None:
    """What comes in `kv_transfer_params` is anybody's."""
    prompt = tokens(20, 77)
    expected = text_of(complete(fleet.alone.url, prompt, 4)[1])
    word = {"kvd": {"do": "prefill", "request_key": "k1", "reservation": 1 << 60}}
    said = complete(fleet.prefill.url, prompt, 1, kv_transfer_params=word)[1]["kv_transfer_params"]["kvd"]
    assert said == {"do": "prefill", "request_key": "k1", "prefilled_tokens": 20}
    word = {"kvd": {"request_key": "k1", "prefill_node": "node0"}}
    ours = Growth(fleet.near)
    assert text_of(complete(fleet.near.url, prompt, 4, kv_transfer_params=word)[1]) == expected
    assert ours.after(1)["prompt_tokens_by_source.external_kv_transfer"] == 20, "without a router it is the same"
    for nonsense in (
        7,
        [],
        {"do": 3},
        {"request_key": "x" * 1000, "do": "prefill"},
        {"request_key": 1, "prefill_node": {}},
        {"expects": {}, "priority": 1 << 60, "ttl_ms": [], "return_ms": "soon"},
    ):
        status, body = complete(fleet.near.url, prompt, 4, kv_transfer_params={"kvd": nonsense})
        assert status == 200 and text_of(body) == expected, nonsense
    for hint in (
        {"expects": "tool_call", "return_ms": 500, "ttl_ms": 60_000, "priority": 200},
        {"expects": "session_end"},
    ):
        status, body = complete(fleet.router.url, prompt, 4, kv_transfer_params={"kvd": hint})
        assert status == 200 and text_of(body) == expected, hint
    nobody = {"kvd": {"request_key": "nobody filled it", "prefill_node": "node0"}}
    status, body = complete(fleet.near.url, tokens(150, 78), 4, kv_transfer_params=nobody)
    assert status == 200 and text_of(body) == text_of(complete(fleet.alone.url, tokens(150, 78), 4)[1])


def test_a_decode_engine_killed_ends_its_streams_with_an_error_and_another_takes_over_from_another_node(
    fleet: SimpleNamespace,
) -> None:
    """What was prefilled on one node is loaded on the other."""
    pieces = stream(fleet.router.url, tokens(300, 9000), 1500)
    first = [next(pieces) for _ in range(3)]
    assert not any(piece.startswith("!") for piece in first)
    fleet.near.kill9()
    assert list(pieces)[-1].startswith("!"), "a stream that breaks off says so"
    until("the node has noticed", lambda: "near" not in fleet.router.workers())
    before = peer_blocks(fleet.b)
    for prompt in prompts(seed=2):
        is_split(fleet, fleet.far, prompt)
    assert peer_blocks(fleet.b) > before
    until("nothing waits to be claimed", lambda: hand_offs(fleet.a) == 0)


def test_a_prefill_engine_killed_in_the_middle_costs_a_request_nothing_but_time(fleet: SimpleNamespace) -> None:
    """It is stopped when it has the prompt, and killed; the decode engine computes."""
    prompt = tokens(1200, 12000)
    expected = text_of(complete(fleet.alone.url, prompt)[1])
    ours = Growth(fleet.far)
    os.killpg(fleet.prefill.pid, signal.SIGSTOP)
    answers: list[tuple[int, dict[str, Any]]] = []
    asking = threading.Thread(target=lambda: answers.append(complete(fleet.router.url, prompt)))
    asking.start()
    until(
        "it was sent the prompt",
        lambda: any(
            w["registration"]["name"] == "prefill" and w["reserved_requests"] for w in fleet.a.kvctl("workers")
        ),
    )
    os.killpg(fleet.prefill.pid, signal.SIGKILL)
    asking.join(60)
    assert answers and answers[0][0] == 200 and text_of(answers[0][1]) == expected
    assert ours.after(1)["prompt_tokens_by_source.local_compute"] == len(prompt)
    for again in prompts(seed=3):
        both(fleet, again)


def test_with_the_last_engine_gone_the_router_says_so_and_carries_on_when_it_is_back(fleet: SimpleNamespace) -> None:
    """Nobody restarts the router or the nodes."""
    fleet.far.kill9()
    status, body = complete(fleet.router.url, tokens(100, 1), 4)
    assert status in (502, 503) and body["error"]["message"], body
    until("it is not listed", lambda: not fleet.router.workers())
    assert complete(fleet.router.url, tokens(100, 1), 4)[0] == 503
    fleet.servers.wait(fleet.servers.again(fleet.far))
    until("it is listed", lambda: fleet.router.workers() == {"far"}, 60)
    both(fleet, tokens(333, 2))
    ours = Growth(fleet.far)
    assert ask(f"{fleet.far.url}/reset_prefix_cache?reset_external=true", {})[0] == 200
    until("it is listed with its new space", lambda: fleet.router.workers() == {"far"})
    both(fleet, tokens(333, 2))
    assert ours.after(1)["prompt_tokens_by_source.local_compute"] == 333, "nothing of before is found"
    assert json.loads(ask(f"{fleet.router.url}/v1/models")[1])["data"][0]["id"] == MODEL


def test_an_engine_is_counted_and_is_listed_anew_when_its_blocks_are_of_another_space(tmp_path: Path) -> None:
    """After an update of weights nobody may expect the old blocks of it."""
    request = SimpleNamespace(request_id="r", num_prompt_tokens=70, num_tokens=75, kv_transfer_params=None)
    given = {"address": "http://127.0.0.1:1", "node": str(tmp_path / "a/grpc.sock"), "profile": FAST}
    known = {"model": MODEL, "requests_max": 4, "kv_tokens_max": 100, "batched_tokens_max": 0}
    with Node(tmp_path / "a", [f"127.0.0.1:{free_port()}"]) as node, node.client() as client:
        old, new = (client.space(MODEL, "r", kvd.Layout.full(2, 2, 64, "f16", 16), epoch=epoch) for epoch in (0, 1))
        standing = Standing(old, Settings.of({"worker": given}), known)

        def listed(*load: int) -> str | None:
            names = ("running_requests", "waiting_requests", "waiting_tokens", "kv_tokens")
            told = [
                worker for worker in node.kvctl("workers") if [worker["load"][name] for name in names] == list(load)
            ]
            return str(told[0]["registration"]["fingerprint"]) if told else None

        before = until("it is listed", lambda: listed(0, 0, 0, 0))
        standing.began(request)
        assert until("it waits", lambda: listed(0, 1, 70, 0)) == before
        standing.runs({"r", "of somebody else"})
        assert until("it runs", lambda: listed(1, 0, 0, 75)) == before
        standing.moved(new)
        until("it has moved", lambda: listed(1, 0, 0, 75) not in (None, before))
        standing.ended(request)
        until("it is over", lambda: listed(0, 0, 0, 0))
        standing.close()
        until("it is gone", lambda: not node.kvctl("workers"))


def test_a_prefill_is_timed_as_straight_or_bent_as_it_is_and_never_negative() -> None:
    """What the router computes with."""
    bent = [(n, 500.0 + 3.0 * n + 0.01 * n * n) for n in (10, 100, 1000, 4000)]
    assert fit(bent) == pytest.approx((500.0, 3.0, 0.01))
    straight = [(n, 500.0 + 3.0 * n) for n in (10, 100, 1000)]
    assert fit(straight) == pytest.approx((500.0, 3.0, 0.0), abs=1e-6)
    assert fit([(100, 900.0)]) == (0.0, 9.0, 0.0)
    falling = fit([(10, 900.0), (100, 800.0), (1000, 900.0)])
    assert (min(falling) >= 0 and falling[1] > 0) or falling[0] > 0


@pytest.mark.parametrize(
    "word", [None, {}, {"kvd": None}, {"kvd": [1]}, {"kvd": {"reservation": "7", "do": "prefill"}}]
)
def test_what_is_no_word_says_nothing(word: dict[str, Any] | None) -> None:
    """A request without a router, or with somebody else's parameters."""
    assert Told.of(word) == Told()


def test_a_word_names_one_half_of_a_split_request() -> None:
    """As the router sends them."""
    prefill = Told.of({"kvd": {"request_key": "k", "reservation": 7, "do": "prefill"}})
    assert prefill == Told(7, hands_off="k")
    decode = Told.of({"kvd": {"request_key": "k", "reservation": 8, "prefill_node": "a"}})
    assert decode == Told(8, claims="k", node="a")
    assert Told.of({"kvd": {"request_key": "k" * 65, "do": "prefill"}}) == Told()


@pytest.mark.parametrize(
    ("worker", "field"),
    [
        ({"node": "x"}, "worker.address"),
        ({"address": "http://a:1"}, "worker.node"),
        ({"address": "a:1", "node": "x"}, "worker.address"),
        ({"address": "http://a:1", "node": "x", "role": "prefil"}, "worker.role"),
        ({"address": "http://a:1", "node": "x", "adress": "y"}, "worker.adress"),
    ],
)
def test_a_worker_that_can_never_be_right_is_refused_with_the_field(worker: dict[str, str], field: str) -> None:
    """When the engine starts."""
    with pytest.raises(kvd.InvalidError) as refused:
        Settings.of({"worker": worker})
    assert refused.value.field == f"kv_connector_extra_config.{field}"
