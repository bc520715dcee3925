"""The TensorRT-LLM arguments that a deployment may set, by TensorRT-LLM's names.

Source of names, defaults and bounds: ``tensorrt_llm/llmapi/llm_args.py``. TensorRT-LLM refuses
unknown arguments only minutes into its start; here they are refused before. A test compares the
names with the tables of the versions that were read (``llm_tables``). What not every version has is
refused by an engine whose version lacks it, when it starts. Arguments that depend on how instances
are linked are not options: the role, streaming, the timeout of a transfer.

A value of type ``dict`` is passed on as it is; TensorRT-LLM checks what is in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

Count = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
Size = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Names = dict[str, Any]
BACKEND_VARIABLES = {
    "TRTLLM_USE_NIXL_KVCACHE": "NIXL",
    "TRTLLM_USE_UCX_KVCACHE": "UCX",
    "TRTLLM_USE_MOONCAKE_KVCACHE": "MOONCAKE",
    "TRTLLM_USE_MPI_KVCACHE": "MPI",
}
"""The transceiver's backend that each variable chooses where the option is ``DEFAULT``: the first
one that is "1" counts, and NIXL if there is none
(tensorrt_llm/_torch/pyexecutor/kv_cache_transceiver.py)."""


class CacheTransceiverConfig(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How KV caches are transferred between the engines; the same on both sides."""

    backend: Literal["DEFAULT", "UCX", "NIXL", "MOONCAKE", "MPI"] = "NIXL"
    """``DEFAULT``: what ``TRTLLM_USE_*_KVCACHE`` says in the environment of each server."""
    transceiver_runtime: Literal["CPP", "PYTHON", "auto"] | None = None
    """None: ``auto`` if the version has it, otherwise the version's default."""
    max_tokens_in_buffer: Count | None = None
    """At least the longest prompt; a multiple of ``tokens_per_block``."""
    kv_transfer_sender_future_timeout_ms: Count | None = None
    kv_transfer_poll_interval_ms: Count | None = None
    kv_cache_bounce_size_mb: Annotated[int, Meta(ge=0)] | None = None
    """Over 0: KV caches are gathered in a buffer, sent in one piece, and scattered."""
    agent_bounce_buffer_enable: bool | None = None
    agent_bounce_params: dict[str, str] | None = None
    enable_pipelined_transfer: bool | None = None
    """True: each chunk of a prompt is sent while the next is computed. TensorRT-LLM does so only
    where the generation engine asks first, and here the context comes first."""


class KvCacheConfig(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The engine's own paged pool."""

    enable_block_reuse: bool | None = None
    """None: the version's default, which is true, where tenants can be kept apart; else false."""
    enable_partial_reuse: bool | None = None
    copy_on_partial_reuse: bool | None = None
    block_reuse_config: Names | None = None
    max_tokens: Count | None = None
    max_attention_window: tuple[int, ...] | None = None
    free_gpu_memory_fraction: Annotated[float, Meta(gt=0, le=1)] | None = None
    max_gpu_total_bytes: Size | None = None
    host_cache_size: Size | None = None
    disk_cache_size: Size | None = None
    disk_cache_path: str | None = None
    """Directory for KV caches that neither GPU nor host memory has room for."""
    event_buffer_max_size: Annotated[int, Meta(ge=0)] | None = None
    """Over 0: changes of the pool are counted, as ``pdserve_kv_events_total``."""
    use_kv_cache_manager_v2: bool | Literal["auto"] | None = None
    """The same in both roles."""
    mamba_state_config: Names | None = None
    dtype: str = "auto"
    """Data type of the KV cache; the same in both roles."""
    tokens_per_block: Count = 32
    """Tokens in a block; the same in both roles."""


class LlmArguments(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Arguments of one role's engines; tensor parallelism is the role's ``tensor_parallel``."""

    pipeline_parallel_size: Count = 1
    context_parallel_size: Count = 1
    moe_expert_parallel_size: Count | None = None
    """Ranks of ``tensor_parallel`` that share out the experts; the KV cache is the same."""
    moe_config: Names | None = None
    enable_attention_dp: bool | None = None
    max_num_tokens: Count | None = None
    max_seq_len: Count | None = None
    enable_chunked_prefill: bool | None = None
    scheduler_config: Names | None = None
    disable_overlap_scheduler: bool | None = None
    enable_early_first_token_response: bool | None = None
    """True: with the overlap scheduler, a first token does not wait for the next step. It matters
    where a decode computes prompts itself (``gateway.local``)."""
    cuda_graph_config: Names | UnsetType | None = UNSET
    """Null: no CUDA graphs."""
    speculative_config: Names | None = None
    """A prefill is refused that has it: only the decode side speculates."""
    enable_iter_perf_stats: bool | None = None
    """True: the state of the pool is published, as ``pdserve_kv_blocks``."""
    trust_remote_code: bool | None = None
    """True: Python code in the model's directory is run."""
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
        pool, other_pool = prefill.kv_cache_config, decode.kv_cache_config
        for name, one, other in (
            ("dtype", prefill.dtype, decode.dtype),
            ("kv_cache_config.dtype", pool.dtype, other_pool.dtype),
            (
                "kv_cache_config.tokens_per_block",
                pool.tokens_per_block,
                other_pool.tokens_per_block,
            ),
            (
                "kv_cache_config.use_kv_cache_manager_v2",
                pool.use_kv_cache_manager_v2,
                other_pool.use_kv_cache_manager_v2,
            ),
        ):
            if one != other:
                yield (
                    f"engine.tensorrt_llm: {name} is {one} of prefill and {other} of decode; "
                    "they exchange KV caches, and so must be equal"
                )
        if prefill.speculative_config is not None:
            yield (
                "engine.tensorrt_llm.prefill.speculative_config: engines that compute prompts for "
                "others do not speculate; allowed: engine.tensorrt_llm.decode.speculative_config"
            )
        yield from self._transfer_problems()

    def _transfer_problems(self) -> Iterator[str]:
        transceiver, prefill = self.cache_transceiver_config, self.prefill
        where = "engine.tensorrt_llm.cache_transceiver_config"
        block, buffered = prefill.kv_cache_config.tokens_per_block, transceiver.max_tokens_in_buffer
        if buffered is not None and buffered % block:
            yield (
                f"{where}.max_tokens_in_buffer: {buffered} is no multiple of tokens_per_block, "
                f"{block}"
            )
        runtime, backend = transceiver.transceiver_runtime, transceiver.backend
        if runtime == "PYTHON" and backend not in ("NIXL", "DEFAULT"):
            yield f"{where}.transceiver_runtime: PYTHON needs the backend NIXL, not {backend}"
        if transceiver.enable_pipelined_transfer and not (
            backend == "NIXL"
            and runtime != "CPP"
            and not transceiver.kv_cache_bounce_size_mb
            and prefill.enable_chunked_prefill
            and prefill.pipeline_parallel_size == prefill.context_parallel_size == 1
        ):
            yield (
                f"{where}.enable_pipelined_transfer: it needs backend NIXL, the runtime PYTHON, no "
                "kv_cache_bounce_size_mb, and prefill.enable_chunked_prefill without pipeline or "
                "context parallelism"
            )


def _elsewhere() -> Iterator[tuple[str, str]]:
    where = "engine.tensorrt_llm"
    yield f"{where}.cache_transceiver_config.kv_transfer_timeout_ms", "set prefill.lease_s, seconds"
    for role in ("prefill", "decode"):
        yield f"{where}.{role}.tensor_parallel_size", f"set {role}.tensor_parallel"
        yield f"{where}.{role}.max_batch_size", f"set {role}.slots"
        yield f"{where}.{role}.model", "set model"
        yield f"{where}.{role}.backend", "it is always pytorch"
        yield f"{where}.{role}.cache_transceiver_config", f"set {where}.cache_transceiver_config"


ELSEWHERE = dict(_elsewhere())
"""Arguments of TensorRT-LLM that other keys set, by their place, with what to do."""
