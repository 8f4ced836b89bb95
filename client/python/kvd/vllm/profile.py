"""How fast the engine is, measured by asking it as a client would: what the router computes with.

Owns the questions and the fit. Invariants: prompts are of words that nobody asked before, so that nothing of them is cached; every question
has a deadline. A step's time as the cache fills up (`decode_a_us`, `decode_b_us`) is not measured: that needs load; give it where it
matters. Leaves to others: when (`standing`), what is done with it (the router).
"""

from __future__ import annotations

import json
import random
import time
import urllib.request

import numpy

WORDS = (8, 32, 128, 512, 2048)
"""Of the prompts, until one has more tokens than a step takes, or takes longer than `PROMPT_S_MAX`."""
REPEATS = 3
"""Of each, for the fastest: what disturbs only ever makes it slower."""
PROMPT_S_MAX = 2.0
DECODED = 17
"""Tokens of the answer whose steps are timed."""
ANSWER_S_MAX = 120.0


class Measuring:
    """One engine, at its own door."""

    def __init__(self, address: str, model: str, batched_tokens_max: int) -> None:
        self.address, self.model = address.rstrip("/"), model
        self.tokens_max = batched_tokens_max or 1 << 30

    def profile(self) -> dict[str, float]:
        """Its speed, as `kvd.Worker` takes it. Raises `OSError` where it does not answer."""
        self._asked(WORDS[0], 1)  # the first is slow in ways that no other is
        points = self._prompts()
        base, token, square = fit(points)
        one = min(self._asked(WORDS[0], 1)[1] for _ in range(REPEATS))
        many = min(self._asked(WORDS[0], DECODED)[1] for _ in range(REPEATS))
        return {
            "prefill_base_us": base,
            "prefill_token_us": token,
            "prefill_square_us": square,
            # n new tokens look at each other in n * n / 2 pairs, and at c before them in n * c
            "prefill_context_us": 2 * square,
            "decode_c_us": max(many - one, 0.0) / (DECODED - 1) * 1e6,
        }

    def _prompts(self) -> list[tuple[int, float]]:
        points: list[tuple[int, float]] = []
        for words in WORDS:
            try:
                answers = [self._asked(words, 1) for _ in range(REPEATS)]
            except urllib.error.HTTPError:
                if not points:
                    raise
                break  # it has no room for so many
            tokens, seconds = min(answers, key=lambda answer: answer[1])
            if tokens > self.tokens_max:
                break
            points.append((tokens, seconds * 1e6))
            if seconds > PROMPT_S_MAX:
                break
        return points

    def _asked(self, words: int, answer: int) -> tuple[int, float]:
        """Tokens of a fresh prompt of so many words, and seconds until its whole answer."""
        prompt = " ".join(f"{random.getrandbits(24)}" for _ in range(words))
        body = {"model": self.model, "prompt": prompt, "max_tokens": answer, "temperature": 0, "ignore_eos": True}
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self.address}/v1/completions", json.dumps(body).encode(), headers)
        began = time.monotonic()
        with urllib.request.urlopen(request, timeout=ANSWER_S_MAX) as said:
            usage = json.load(said)["usage"]
        return int(usage["prompt_tokens"]), time.monotonic() - began


def fit(points: list[tuple[int, float]]) -> tuple[float, float, float]:
    """Base, token and square of `us = base + token * n + square * n * n`, none negative, by least squares of relative errors."""
    tokens = numpy.array([point[0] for point in points], float)
    us = numpy.array([point[1] for point in points], float)
    for powers in ((0, 1, 2), (0, 1), (1,)):
        if len(powers) > len(points):
            continue
        columns = numpy.stack([tokens**power for power in powers], axis=1) / us[:, None]
        found = numpy.linalg.lstsq(columns, numpy.ones(len(points)), rcond=None)[0]
        if (found >= 0).all():
            by_power = dict(zip(powers, (float(one) for one in found), strict=True))
            return by_power.get(0, 0.0), by_power.get(1, 0.0), by_power.get(2, 0.0)
    raise AssertionError("times are positive, and so is their slope through nothing")
