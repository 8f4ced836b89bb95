"""OpenAI's own Python client against the router: one line for each thing that was seen, an error for what was not.

Arguments: the router's address, the engine's (which counts what was cancelled). Run by openai.rs.
"""

import json
import sys
import time
import urllib.error
import urllib.request

import openai

ROUTER, ENGINE = sys.argv[1:]
MODEL = "sim-8b"
WAIT_S = 20
CHAT = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "What is a block of a prompt?"}]
client = openai.OpenAI(base_url=f"{ROUTER}/v1", api_key="none", max_retries=0, timeout=WAIT_S)


def until(what, so):
    """Asks again until it is so."""
    end = time.monotonic() + WAIT_S
    while not so():
        assert time.monotonic() < end, f"waited {WAIT_S} s until {what}"


def get(url):
    with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
        return json.load(answer)


def refused(kind, **asked):
    """The error that a request is refused with."""
    try:
        client.chat.completions.create(**asked)
    except kind as error:
        return error
    raise AssertionError(f"{asked.get('model')} was not refused with {kind.__name__}")


def models():
    found = [model.id for model in client.models.list()]
    assert MODEL in found, found
    print(f"models: {found}")


def whole():
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=20)
    choice, usage = answer.choices[0], answer.usage
    assert choice.message.role == "assistant" and choice.message.content and choice.finish_reason == "length"
    assert usage.completion_tokens == 20 and usage.prompt_tokens > 10, usage
    print(f"chat: {usage.completion_tokens} tokens after {usage.prompt_tokens}")
    return choice.message.content


def streamed(text):
    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=20, stream=True, stream_options=options
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == text, "the stream says the same"
    assert len(pieces) > 1 and chunks[-1].usage.completion_tokens == 20, chunks[-1]
    print(f"streamed chat: the same text in {len(pieces)} pieces, and its usage")


def completion():
    answer = client.completions.create(model=MODEL, prompt="The prefix of a prompt", max_tokens=5)
    assert answer.choices[0].text and answer.usage.completion_tokens == 5
    print(f"completion: {answer.usage.completion_tokens} tokens")


def cancelled():
    before = get(f"{ENGINE}/stats")["cancelled"]
    stream = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=3000, stream=True)
    taken = [next(stream) for _ in range(3)]
    stream.close()
    until("the engine has stopped", lambda: get(f"{ENGINE}/stats")["cancelled"] == before + 1)
    until("it has nothing left", lambda: get(f"{ENGINE}/stats")["running"] == 0)
    print(f"cancelled after {len(taken)} pieces: the engine counts it and has nothing left")


def mistakes():
    error = refused(openai.NotFoundError, model="no-such-model", messages=CHAT)
    assert error.code == "model_not_found" and MODEL in error.message, error
    print(f"unknown model: {error.status_code} {error.code}: {error.message}")
    much = [{"role": "user", "content": "one block of a prompt and another " * 5000}]
    error = refused(openai.BadRequestError, model=MODEL, messages=much)
    assert error.code == "context_length_exceeded" and error.param == "messages", error
    print(f"oversized prompt: {error.status_code} {error.code}: {error.message}")
    error = refused(openai.BadRequestError, model=MODEL, messages="no list")
    print(f"messages of the wrong kind: {error.status_code}: {error.message}")


def malformed():
    request = urllib.request.Request(f"{ROUTER}/v1/chat/completions", data=b'{"model": ', method="POST")
    try:
        urllib.request.urlopen(request, timeout=WAIT_S)
    except urllib.error.HTTPError as refusal:
        error = json.load(refusal)["error"]
        assert refusal.code == 400 and error["type"] == "invalid_request_error" and error["message"], error
        print(f"malformed JSON: {refusal.code} {error['type']}: {error['message']}")
        return
    raise AssertionError("malformed JSON was taken")


until("the router knows its engine", lambda: get(f"{ROUTER}/observation")["workers"])
models()
streamed(whole())
completion()
cancelled()
mistakes()
malformed()
