"""The TensorRT-LLM arguments that a deployment may set, by TensorRT-LLM's names.

Source of names, defaults and bounds: ``tensorrt_llm/llmapi/llm_args.py``, 1.3.0rc25. TensorRT-LLM
refuses unknown arguments only minutes into its start; here they are refused before. Arguments that
depend on how instances are linked are not options: the role, streaming, the timeout of a transfer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

Count = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]


class CacheTransceiverConfig(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How KV caches are transferred between the engines; the same on both sides."""

    backend: Literal["DEFAULT", "UCX", "NIXL", "MOONCAKE", "MPI"] = "DEFAULT"
    transceiver_runtime: Literal["CPP", "PYTHON"] | None = None
    """None: PYTHON with NIXL, if the version has the choice; otherwise CPP."""
    max_tokens_in_buffer: Count | None = None
    """At least the longest prompt; a multiple of ``tokens_per_block``."""
    kv_transfer_sender_future_timeout_ms: Count | None = None
    kv_transfer_poll_interval_ms: Count | None = None
    kv_cache_bounce_size_mb: Annotated[int, Meta(ge=0)] | None = None


class KvCacheConfig(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The engine's own paged pool."""

    enable_block_reuse: bool | None = None
    enable_partial_reuse: bool | None = None
    copy_on_partial_reuse: bool | None = None
    max_tokens: Count | None = None
    max_attention_window: tuple[int, ...] | None = None
    free_gpu_memory_fraction: Annotated[float, Meta(gt=0, le=1)] | None = None
    host_cache_size: Annotated[int, Meta(ge=0)] | None = None
    event_buffer_max_size: Annotated[int, Meta(ge=0)] | None = None
    """Over 0: changes of the pool are counted, as ``pdserve_kv_events_total``."""
    dtype: str = "auto"
    """Data type of the KV cache; the same in both roles."""
    tokens_per_block: Count = 32
    """Tokens in a block; the same in both roles."""


class LlmArguments(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Arguments of one role's engines; tensor parallelism is the role's ``tensor_parallel``."""

    pipeline_parallel_size: Count = 1
    context_parallel_size: Count = 1
    enable_attention_dp: bool | None = None
    max_num_tokens: Count | None = None
    max_seq_len: Count | None = None
    enable_chunked_prefill: bool | None = None
    disable_overlap_scheduler: bool | None = None
    enable_iter_perf_stats: bool | None = None
    """True: the state of the pool is published, as ``pdserve_kv_blocks``."""
    dtype: str = "auto"
    """Data type of weights and activations; the same in both roles."""
    kv_cache_config: KvCacheConfig = KvCacheConfig()

    def given(self) -> dict[str, Any]:
        """Return what was set, as keyword arguments, without ``kv_cache_config``."""
        arguments: dict[str, Any] = msgspec.to_builtins(self)
        arguments.pop("kv_cache_config", None)
        return arguments


class LlmOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """Options that a deployment passes on to the ``tensorrt_llm`` engine."""

    cache_transceiver_config: CacheTransceiverConfig = CacheTransceiverConfig()
    prefill: LlmArguments = LlmArguments()
    decode: LlmArguments = LlmArguments()

    def problems(self) -> Iterator[str]:
        """Yield the problems between options that are valid one by one."""
        prefill, decode = self.prefill, self.decode
        for name, one, other in (
            ("dtype", prefill.dtype, decode.dtype),
            ("kv_cache_config.dtype", prefill.kv_cache_config.dtype, decode.kv_cache_config.dtype),
            (
                "kv_cache_config.tokens_per_block",
                prefill.kv_cache_config.tokens_per_block,
                decode.kv_cache_config.tokens_per_block,
            ),
        ):
            if one != other:
                yield (
                    f"engine.tensorrt_llm: {name} is {one} of prefill and {other} of decode; "
                    "they exchange KV caches, and so must be equal"
                )
        transceiver, block = self.cache_transceiver_config, prefill.kv_cache_config.tokens_per_block
        buffered = transceiver.max_tokens_in_buffer
        if buffered is not None and buffered % block:
            yield (
                f"engine.tensorrt_llm.cache_transceiver_config.max_tokens_in_buffer: {buffered} "
                f"is no multiple of tokens_per_block, {block}"
            )
