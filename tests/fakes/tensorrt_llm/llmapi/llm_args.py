"""Arguments of `LLM`, and the configurations among them."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from msgspec import Meta
from tensorrt_llm.llmapi.strict import StrictBaseModel
from tensorrt_llm.version import OLDEST, SINCE_1_3, SINCE_1_4

Positive = Annotated[int, Meta(gt=0)]
Fraction = Annotated[float, Meta(gt=0, le=1)]

# Where the backend is DEFAULT, the first of these that is "1" decides.
_BACKENDS = ("NIXL", "UCX", "MOONCAKE", "MPI")


class CacheTransceiverConfig(StrictBaseModel):
    """The transfer of KV caches; without a backend there is none."""

    if OLDEST:
        backend: Literal["DEFAULT", "UCX", "NIXL", "MPI"] | None = None
    else:
        backend: Literal["DEFAULT", "UCX", "NIXL", "MOONCAKE", "MPI"] | None = None  # type: ignore[no-redef]
    if SINCE_1_3:
        transceiver_runtime: Literal["CPP", "PYTHON", "auto"] | None = (
            "PYTHON" if SINCE_1_4 else "auto"
        )
    max_tokens_in_buffer: int | None = None
    if not OLDEST:
        kv_transfer_timeout_ms: Positive | None = 60000 if SINCE_1_3 else None
        kv_transfer_sender_future_timeout_ms: Positive | None = 1000
    if SINCE_1_3:
        kv_transfer_poll_interval_ms: Positive | None = 5000
        kv_cache_bounce_size_mb: Annotated[int, Meta(ge=0)] = 0
        enable_pipelined_transfer: bool = False
        agent_bounce_buffer_enable: bool = False
        agent_bounce_params: dict[str, str] | None = None

    @property
    def _timeout_s(self) -> float | None:
        timeout_ms = None if OLDEST else self.kv_transfer_timeout_ms
        return None if timeout_ms is None else timeout_ms / 1e3

    @property
    def _resolved(self) -> str | None:
        if self.backend != "DEFAULT":
            return self.backend
        chosen = (name for name in _BACKENDS if os.environ.get(f"TRTLLM_USE_{name}_KVCACHE") == "1")
        return next(chosen, "NIXL")

    @property
    def _runtime(self) -> Literal["CPP", "PYTHON"] | None:
        """Return which transceiver it asks for; None: none.

        Raises:
            ValueError: the Python one, and what that cannot do.
        """
        backend = self._resolved
        if backend is None:
            return None
        asked = self.transceiver_runtime if SINCE_1_3 else "CPP"
        possible = backend == "NIXL" and self._timeout_s is not None
        if asked == "PYTHON" and not possible:
            raise ValueError(
                f"the Python transceiver needs the backend NIXL, not {backend}, and a "
                f"kv_transfer_timeout_ms, not {self.kv_transfer_timeout_ms}"
            )
        return "PYTHON" if asked == "PYTHON" or (asked == "auto" and possible) else "CPP"


class KvCacheConfig(StrictBaseModel):
    """The pool of KV cache blocks."""

    enable_block_reuse: bool = True
    max_tokens: int | None = None
    max_attention_window: list[int] | None = None
    sink_token_length: int | None = None
    free_gpu_memory_fraction: Fraction | None = 0.9
    host_cache_size: int | None = None
    if not SINCE_1_3:
        onboard_blocks: bool = True
    cross_kv_cache_fraction: float | None = None
    secondary_offload_min_priority: int | None = None
    event_buffer_max_size: int = 0
    attention_dp_events_gather_period_ms: int = 5
    enable_partial_reuse: bool = True
    copy_on_partial_reuse: bool = True
    use_uvm: bool = False
    dtype: str = "auto"
    tokens_per_block: Positive = 32
    if not OLDEST:
        max_gpu_total_bytes: int = 0
    if SINCE_1_3:
        disk_cache_size: int | None = None
        disk_cache_path: str | None = None
        iteration_stats_interval: Positive = 1
        use_kv_cache_manager_v2: bool | Literal["auto"] = "auto"
        kv_events_config: Any = None
        kv_cache_event_hash_algo: Literal["auto", "v1_block_key", "v2_sha256", "v2_sha256_64"] = (
            "auto"
        )
        block_reuse_config: Any = None
        mamba_state_config: Any = None


class TorchLlmArgs(StrictBaseModel):
    """Arguments of the PyTorch backend. `Any`: accepted, and without effect."""

    model: Any
    tokenizer: Any = None
    tokenizer_mode: Literal["auto", "slow"] = "auto"
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    tensor_parallel_size: Positive = 1
    dtype: str = "auto"
    revision: str | None = None
    tokenizer_revision: str | None = None
    backend: Literal["pytorch"] | None = "pytorch" if SINCE_1_3 else None
    pipeline_parallel_size: Positive = 1
    context_parallel_size: Positive = 1
    gpus_per_node: Any = None
    moe_tensor_parallel_size: Any = None
    moe_expert_parallel_size: Any = None
    moe_config: Any = None
    enable_attention_dp: bool = False
    attention_dp_config: Any = None
    max_batch_size: Positive | None = 2048 if SINCE_1_3 else None
    max_num_tokens: Positive | None = 8192
    max_seq_len: Positive | None = None
    max_input_len: Positive | None = 1024 if SINCE_1_3 else None
    max_beam_width: Positive | None = 1 if SINCE_1_3 else None
    kv_cache_config: KvCacheConfig | None = None
    cache_transceiver_config: CacheTransceiverConfig | None = None
    enable_chunked_prefill: bool = False
    disable_overlap_scheduler: bool = False
    scheduler_config: Any = None
    if not SINCE_1_3:
        sampler_type: Any = "auto"
    attn_backend: str = "TRTLLM"
    cuda_graph_config: Any = None
    torch_compile_config: Any = None
    load_format: Any = "auto"
    enable_iter_perf_stats: bool = False
    enable_iter_req_stats: bool = False
    iter_stats_max_iterations: int | None = None
    request_stats_max_iterations: int | None = None
    print_iter_log: bool = False
    return_perf_metrics: bool = False
    stream_interval: Positive = 1
    num_postprocess_workers: int = 0
    postprocess_tokenizer_dir: str | None = None
    reasoning_parser: str | None = None
    guided_decoding_backend: Any = None
    speculative_config: Any = None
    enable_lora: Literal[False] = False
    lora_config: None = None
    garbage_collection_gen0_threshold: int = 20000
    if not OLDEST:
        perf_metrics_max_requests: int = 0
        otlp_traces_endpoint: str | None = None
        orchestrator_type: str | None = None
    if SINCE_1_3:
        enable_early_first_token_response: bool = False
        env_overrides: dict[str, str] | None = None
        max_stats_len: int = 1000
