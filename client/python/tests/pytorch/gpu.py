"""A model on a GPU that goes on from what another process computed, and what that saves: run by hand, with a daemon that has the GPU.

    gpu.py --socket SOCKET [--device cuda] [--tokens 2048,8192,32768] [--layers 4] [--output json]

A few layers of Llama-3-8B's shape with random weights. This process computes a prompt and stores it, a fresh one loads it and goes
on; the logits of both are compared bit for bit. Cold is computing the whole prompt up to its first token, loaded is loading it
and computing the rest; medians, after a warm-up. Without a GPU it says SKIPPED. `--device cpu` tries the script out on a tiny model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCK_TOKENS = 16
#: Computed in any case, after what is loaded: a prompt's last block and a bit.
REST_TOKENS = 24
WARM_TOKENS = 512
TIMES = 5


def model(layers: int, device: str) -> Any:
    """Random weights, the same in every process."""
    import torch
    import transformers

    large = device != "cpu"
    config = transformers.LlamaConfig(
        vocab_size=32_000 if large else 512,
        hidden_size=4096 if large else 256,
        intermediate_size=14_336 if large else 512,
        num_hidden_layers=layers,
        num_attention_heads=32 if large else 4,
        num_key_value_heads=8 if large else 2,
        head_dim=128 if large else 64,
        rope_theta=500_000.0,
        max_position_embeddings=131_072,
        dtype="bfloat16",
    )
    torch.manual_seed(7)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return made.to(device).eval()


def prompt(tokens: int, device: str) -> Any:
    """Of a seed of its own for each length: no prompt is the beginning of another."""
    import torch

    draw = torch.Generator().manual_seed(tokens)
    return torch.randint(0, 500, (1, tokens + REST_TOKENS), generator=draw).to(device)


def go_on(made: Any, ids: Any, cache: Any) -> Any:
    """Logits of the tokens that the cache does not have; the cache has them afterwards."""
    import torch

    with torch.inference_mode():
        return made(ids[:, cache.get_seq_length() :], past_key_values=cache, use_cache=True, logits_to_keep=8).logits


def kvd_cache(socket: str, made: Any, layers: int, device: str) -> Any:
    """One for a model of this many layers."""
    import kvd
    import kvd.torch

    client = kvd.Client(socket)
    name = f"gpu-{layers}"
    options = {"model": name, "revision": "seed-7", "block_tokens": BLOCK_TOKENS, "device": device}
    return kvd.torch.KvdCache(client, made.config, **options)


def timed(device: str, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the device has done it, and what came of it."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    done = work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, done


def cold(args: argparse.Namespace, out: Path) -> dict[int, float]:
    """Computes and stores every prompt; writes the logits of going on from its own cache."""
    import torch
    import transformers

    made = model(args.layers, args.device)
    store = kvd_cache(args.socket, made, args.layers, args.device)
    seconds = {}
    for tokens in [WARM_TOKENS, *args.tokens]:
        ids = prompt(tokens, args.device)

        def compute(ids: Any = ids) -> Any:
            return go_on(made, ids, transformers.DynamicCache(config=made.config))

        seconds[tokens] = statistics.median(timed(args.device, compute)[0] for _ in range(TIMES))
        cache = transformers.DynamicCache(config=made.config)
        go_on(made, ids[:, :tokens], cache)
        stored_s, stored = timed(args.device, lambda ids=ids, cache=cache: store.store(ids, cache, timeout_s=60.0))
        blocks = tokens // BLOCK_TOKENS
        say(args, {"check": "stored", "tokens": tokens, "blocks": stored, "of": blocks, "store_s": round(stored_s, 6)})
        torch.save(go_on(made, ids, cache).cpu(), out / f"{tokens}.pt")
        del cache
    return seconds


def loaded(args: argparse.Namespace, out: Path) -> None:
    """The fresh process: loads each prompt and goes on."""
    import torch

    made = model(args.layers, args.device)
    store = kvd_cache(args.socket, made, args.layers, args.device)
    for tokens in [WARM_TOKENS, *args.tokens]:
        ids, expected = prompt(tokens, args.device), torch.load(out / f"{tokens}.pt")
        times, loads, same, found = [], [], True, tokens
        for _ in range(TIMES + 1):
            began = time.perf_counter()
            took, cache = timed(args.device, lambda ids=ids: store.load(ids, timeout_s=60.0))
            found = min(found, cache.get_seq_length())
            logits = go_on(made, ids, cache).cpu()
            times.append(time.perf_counter() - began)
            loads.append(took)
            same = same and bool(torch.equal(logits, expected))
            del cache
        record = {"loaded": found, "loaded_s": statistics.median(times[1:]), "load_s": statistics.median(loads[1:])}
        (out / f"{tokens}.json").write_text(json.dumps({**record, "identical": same}))


def say(args: argparse.Namespace, record: dict[str, Any]) -> None:
    """A JSON line, or words."""
    print(json.dumps(record) if args.output == "json" else ", ".join(f"{k} {v}" for k, v in record.items()), flush=True)


def break_even(points: list[tuple[int, float, float]]) -> float | None:
    """Tokens from which on loading is sooner, between the measured ones by straight lines; `None`: it never is there."""
    before: tuple[int, float] | None = None
    for tokens, cold_s, loaded_s in points:
        gain = cold_s - loaded_s
        if gain >= 0:
            if before is None:
                return float(tokens)
            at, lost = before
            return at + (tokens - at) * -lost / (gain - lost)
        before = (tokens, gain)
    return None


def main() -> int:
    """The whole; 0 unless something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--socket", required=True, help="the daemon's session socket")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tokens", default="2048,8192,32768", help="lengths of prompts, multiples of 16")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--output", default="table", choices=["table", "json"])
    parser.add_argument("--fresh", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.tokens = [int(tokens) for tokens in str(args.tokens).split(",")]
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        say(args, {"check": "SKIPPED", "why": f"{error}"})
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        say(args, {"check": "SKIPPED", "why": "torch sees no CUDA device"})
        return 0
    if args.fresh:
        loaded(args, Path(args.fresh))
        return 0
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        seconds = cold(args, out)
        lengths = ",".join(map(str, args.tokens))
        shape = ["--device", args.device, "--layers", str(args.layers), "--tokens", lengths]
        fresh = [sys.executable, __file__, "--socket", args.socket, *shape, "--fresh", folder]
        subprocess.run(fresh, check=True)
        points, good = [], True
        for tokens in [WARM_TOKENS, *args.tokens]:
            got = json.loads((out / f"{tokens}.json").read_text())
            well = got["identical"] and got["loaded"] == tokens
            good = good and well
            record = {"check": "ok" if well else "WRONG", "device": device, "layers": args.layers, "tokens": tokens}
            say(args, {**record, "cold_s": round(seconds[tokens], 6), **{k: got[k] for k in sorted(got)}})
            points.append((tokens, seconds[tokens], got["loaded_s"]))
    tokens_at = break_even(points)
    say(args, {"check": "break_even", "layers": args.layers, "break_even_tokens": tokens_at})
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
