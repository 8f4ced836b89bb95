"""A process of its own that reads the pages another stored, and counts wrong bytes: `reader.py SOCKET PAGES
SEED`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


def main(socket: str, pages: int, seed: int) -> None:
    try:
        import sglang.srt.mem_cache.hicache_storage  # noqa: F401
    except ImportError:
        sys.path.insert(0, str(HERE / "stub"))
        sys.modules.pop("sglang", None)
    import numpy as np
    from hosts import Host, hashes, slots

    from kvd.sglang import KvdStorage

    config = SimpleNamespace(
        tp_rank=0,
        tp_size=1,
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=False,
        enable_storage_metrics=False,
        model_name="tiny",
        extra_config={"socket": socket, "revision": "1", "interface_v1": 1},
    )
    host, expected = Host(pages), Host(pages)
    expected.fill(seed)
    storage = KvdStorage(config, {})
    storage.register_mem_pool_host(host)
    assert storage._client.wait_connected(10)
    assert storage.batch_exists(hashes(pages)) == pages
    came = sum(storage.batch_get_v1(hashes(pages), slots(list(range(pages)))))
    wrong = sum(int(np.count_nonzero(a != b)) for a, b in zip(host.buffers, expected.buffers, strict=True))
    print(f"{came} pages, wrong bytes {wrong}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
