"""What a vLLM engine's blocks mean: its space in kvd, and what makes one request's blocks another's.

Owns the way from vLLM's configuration to layout and revision, and from a request to adapter, salt and spans. Invariants: everything that changes
the numbers in a block is in the space or in the chain; what cannot be told apart is not shared (a request is left out, a configuration
refused); tensor and pipeline degree, page size and backend are not in it. Leaves to others: hashing (compiled), tensors (`memory`).
"""

from __future__ import annotations

import logging
import os
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import kvd
from kvd import Group, InvalidError, Layout

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

    from kvd.vllm.settings import Settings

logger = logging.getLogger("vllm.kvd")

BLOCK_TOKENS = 64
KINDS = {"image": kvd.IMAGE, "audio": kvd.AUDIO}
ENGINE_KIND = 128


@dataclass(frozen=True)
class GroupPages:
    """One of the engine's cache groups as this rank has it."""

    layer_names: list[str]
    page_tokens: int
    """Of the engine's own page, before its kernels cut it further."""
    first_layer: int
    heads: int
    first_head: int
    stores: bool
    """Whether this rank stores its heads, or another that has the same ones does."""
    vectors: int
    head_size: int


@dataclass(frozen=True)
class Identity:
    """The engine's space, and how its pages fit it."""

    model: str
    revision: bytes
    layout: Layout
    groups: list[GroupPages]
    block_tokens: int
    granule_tokens: int
    """What is loaded and stored are multiples of this: of blocks and of pages."""
    ranks: int


def of_engine(vllm: VllmConfig, cache: KVCacheConfig, settings: Settings, rank: tuple[int, int] = (0, 0)) -> Identity:
    """The identity of an engine; `rank`: tensor and pipeline rank, for the part of the groups that is this rank's."""
    _refuse(vllm)
    pages = [group.kv_cache_spec.block_size for group in cache.kv_cache_groups]
    block_tokens = settings.block_tokens or (
        BLOCK_TOKENS if all(_fits(page, BLOCK_TOKENS) for page in pages) else max(pages)
    )
    for page in pages:
        if not _fits(page, block_tokens):
            raise InvalidError(
                "invalid",
                "kv_connector_extra_config.block_tokens",
                f"{block_tokens}, where the engine's pages have {page} tokens",
                "give a divisor or a multiple of the page (--block-size)",
            )
    described = [
        _group(vllm, at, group, len(cache.kv_cache_groups), rank) for at, group in enumerate(cache.kv_cache_groups)
    ]
    parallel = vllm.parallel_config
    return Identity(
        model=settings.model or served_name(vllm),
        revision=settings.revision.encode() or _revision(vllm),
        layout=Layout([group for group, _ in described], block_tokens),
        groups=[pages for _, pages in described],
        block_tokens=block_tokens,
        granule_tokens=max([block_tokens, *pages]),
        ranks=parallel.tensor_parallel_size * parallel.pipeline_parallel_size,
    )


def _fits(page: int, block: int) -> bool:
    return page % block == 0 or block % page == 0


def _refused(field: str, value: object, fix: str) -> InvalidError:
    return InvalidError("invalid", field, str(value), fix)


def _refuse(vllm: VllmConfig) -> None:
    """What kvd cannot share without a doubt."""
    cache, parallel = vllm.cache_config, vllm.parallel_config
    if getattr(cache, "calculate_kv_scales", False):
        raise _refused(
            "calculate_kv_scales", True, "use scales of the checkpoint: computed ones differ from run to run"
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise _refused(name, getattr(parallel, name), "kvd does not read context-parallel caches: use 1")


def _group(vllm: VllmConfig, at: int, group: Any, groups: int, rank: tuple[int, int]) -> tuple[Group, GroupPages]:
    spec = getattr(group.kv_cache_spec, "first_spec", group.kv_cache_spec)
    kind, window = _kind(spec)
    _check_uniform(group.kv_cache_spec, spec)
    parallel, tp_rank = vllm.parallel_config, rank[0]
    tp = parallel.tensor_parallel_size
    here = spec.num_kv_heads
    heads = 1 if kind == "latent" else max(vllm.model_config.get_total_num_kv_heads(), 1)
    replicas = max(tp // heads, 1)
    if here * tp != heads * replicas:
        raise _refused(
            "num_kv_heads", f"{here} on each of {tp} ranks, of {heads}", "use a tensor parallel size that divides them"
        )
    layers, first_layer = _layers(vllm, group.layer_names, groups)
    vectors = 1 if kind == "latent" else 2
    described = Group(
        kind,
        layers,
        heads,
        spec.head_size,
        _dtype(vllm, spec),
        vectors=vectors,
        window_tokens=window,
        scale=_scale(vllm),
    )
    pages = GroupPages(
        layer_names=list(group.layer_names),
        page_tokens=spec.block_size,
        first_layer=first_layer,
        heads=here,
        first_head=tp_rank // replicas * here,
        stores=tp_rank % replicas == 0,
        vectors=vectors,
        head_size=spec.head_size,
    )
    return described, pages


def _kind(spec: Any) -> tuple[str, int]:
    """The group's kind in kvd, and its window."""
    name = type(spec).__name__
    if name == "FullAttentionSpec":
        return "full", 0
    if name == "MLAAttentionSpec":
        return "latent", 0
    if name == "SlidingWindowSpec":
        return "window", spec.sliding_window
    raise _refused(
        "kv_cache_spec", name, "kvd stores full, sliding-window and MLA attention; run this model without the connector"
    )


def _check_uniform(whole: Any, first: Any) -> None:
    if getattr(first, "head_size_v", first.head_size) != first.head_size and type(first).__name__ != "MLAAttentionSpec":
        raise _refused("head_size_v", first.head_size_v, f"kvd stores keys and values of one size ({first.head_size})")
    for name, spec in getattr(whole, "kv_cache_specs", {}).items():
        if (spec.num_kv_heads, spec.head_size, spec.dtype) != (first.num_kv_heads, first.head_size, first.dtype):
            raise _refused("kv_cache_specs", name, "its layers differ in heads or sizes, and share one group")


def _layers(vllm: VllmConfig, names: list[str], groups: int) -> tuple[int, int]:
    """Layers of the group in the whole model, and the first that this rank has."""
    if vllm.parallel_config.pipeline_parallel_size == 1:
        return len(names), 0
    if groups > 1:
        raise _refused(
            "pipeline_parallel_size", vllm.parallel_config.pipeline_parallel_size, "use 1 with several cache groups"
        )
    first = min(int(part) for name in names for part in name.split(".") if part.isdigit())
    return vllm.model_config.get_total_num_hidden_layers(), first


def _dtype(vllm: VllmConfig, spec: Any) -> str:
    cache = str(vllm.cache_config.cache_dtype)
    names = {"fp8": "f8_e4m3", "fp8_e4m3": "f8_e4m3", "fp8_e5m2": "f8_e5m2"}
    plain = {"torch.bfloat16": "bf16", "torch.float16": "f16", "torch.float32": "f32"}
    found = names.get(cache) or (
        plain.get(str(spec.dtype)) if cache in ("auto", "bfloat16", "float16", "float32") else None
    )
    if found is None:
        raise _refused(
            "kv_cache_dtype", cache, f"kvd knows auto, {', '.join(names)} over bfloat16, float16 and float32"
        )
    return found


def _scale(vllm: VllmConfig) -> str:
    # the checkpoint's scales are weights, and so in the revision
    return "per_tensor" if str(vllm.cache_config.cache_dtype).startswith("fp8") else "none"


def served_name(vllm: VllmConfig) -> str:
    """What its clients call it."""
    served = vllm.model_config.served_model_name
    return served if isinstance(served, str) else served[0]


def _revision(vllm: VllmConfig) -> bytes:
    """The weights' digest, with what else decides about the numbers: how they are loaded, quantised, cut short, drafted."""
    model = vllm.model_config
    words = [
        f"load_format={vllm.load_config.load_format}",
        f"quantization={model.quantization}",
        f"dtype={model.dtype}",
    ]
    if str(vllm.load_config.load_format) == "dummy":
        words.append(f"seed={model.seed}")
    words.append(f"hf_overrides={model.hf_overrides}")
    draft = vllm.speculative_config
    if draft is not None and getattr(draft, "model", None):
        words.append(f"draft={draft.model}:{_digest(str(draft.model)).hex()}")
    return kvd.revision_of_model(_folder(str(model.model)), words=words)


def _digest(model: str) -> bytes:
    return kvd.revision_of_model(_folder(model))


def _folder(model: str) -> str:
    if os.path.isdir(model):
        return model
    try:
        from huggingface_hub import snapshot_download

        return str(snapshot_download(model, local_files_only=True))
    except Exception as error:
        raise _refused(
            "model", model, "its folder is not here: set kv_connector_extra_config.revision to a word for its weights"
        ) from error


def fresh_epoch() -> int:
    """After an update of weights in place nobody else has these: an epoch that nobody else draws."""
    return secrets.randbelow(2**32 - 1) + 1


ADAPTERS_MAX = 4096
"""Adapters of one engine's life. At the limit: further ones are left out; to forget one would be to doubt what the engine has loaded."""


class Adapters:
    """Digests of LoRA adapters, as the engine loaded them.

    The engine reads an adapter's folder once; a folder that changed since is a doubt, and its requests are left out until the engine reloads it.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], tuple[bytes, object]] = {}

    def digest(self, request: Request) -> bytes | None:
        """The digest of a request's adapter: empty without one, `None` if in doubt."""
        adapter = request.lora_request
        if adapter is None:
            return b""
        key = (adapter.lora_int_id, adapter.lora_path)
        if key not in self._known and len(self._known) >= ADAPTERS_MAX:
            return None
        try:
            stamp = _stamp(adapter.lora_path)
            if key not in self._known or adapter.load_inplace:
                self._known[key] = (kvd.revision_of_adapter(adapter.lora_path), stamp)
        except (OSError, kvd.KvdError) as error:
            logger.warning("kvd: adapter %s is not shared: %s", adapter.lora_name, error)
            return None
        digest, loaded = self._known[key]
        return digest if loaded == stamp else None

    def chain(self, space: kvd.Space, request: Request) -> kvd.Chain | None:
        """A request's chain, still without tokens; `None`: what it depends on cannot be told for sure."""
        adapter = self.digest(request)
        if adapter is None or request.prompt_embeds is not None:
            return None
        chain = space.chain(adapter=adapter, salt=(request.cache_salt or "").encode())
        chain.extend([], spans_of(request))
        return chain


def _stamp(folder: str) -> object:
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    return [(entry.name, entry.stat().st_mtime_ns, entry.stat().st_size, entry.stat().st_ino) for entry in entries]


def spans_of(request: Request) -> list[tuple[int, int, int, bytes]]:
    """Images and the like, as (kind, position, tokens, digest)."""
    found = []
    for feature in request.mm_features:
        position = feature.mm_position
        kind = KINDS.get(feature.modality, ENGINE_KIND)
        digest = f"{feature.modality}:{feature.identifier}".encode()
        found.append((kind, position.offset, position.length, digest))
    return found
