"""SGLang's hierarchical cache over kvd: the backend for `--hicache-storage-backend dynamic`.

Owns nothing: the class that SGLang's loader names is `kvd.sglang.KvdStorage`. Imports SGLang, so nothing else
of kvd imports it.
"""

from kvd.sglang.storage import KvdStorage

__all__ = ["KvdStorage"]
