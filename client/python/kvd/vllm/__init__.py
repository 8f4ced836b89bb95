"""kvd for vLLM: `--kv-transfer-config '{"kv_connector": "KvdConnector", "kv_connector_module_path": "kvd.vllm", "kv_role": "kv_both"}'`.

The connector's halves live in files of their own: `scheduler` decides (which blocks to look up, load and store), `worker` moves bytes,
`identity` says what an engine's blocks mean, `memory` reads how its tensors lie, `settings` what an operator may set.
"""

from kvd.vllm.connector import KvdConnector

__all__ = ["KvdConnector"]
