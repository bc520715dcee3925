"""Environment variables that an inventory has, since they change what servers do."""

from __future__ import annotations

BACKENDS = {
    "TRTLLM_USE_MOONCAKE_KVCACHE": "MOONCAKE",
    "TRTLLM_USE_MPI_KVCACHE": "MPI",
    "TRTLLM_USE_NIXL_KVCACHE": "NIXL",
    "TRTLLM_USE_UCX_KVCACHE": "UCX",
}
"""The transceiver backend that TensorRT-LLM takes for ``DEFAULT``, by the variable that is 1
(cpp/tensorrt_llm/common/envUtils.cpp)."""
NO_STATISTICS = {
    "DO_NOT_TRACK": ("1",),
    "TELEMETRY_DISABLED": ("1", "true"),
    "TRTLLM_NO_USAGE_STATS": ("1",),
}
"""Values with which TensorRT-LLM sends no statistics of use (tensorrt_llm/usage/usage_lib.py)."""
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "UCX_IB_GID_INDEX",
    "UCX_NET_DEVICES",
    "UCX_TLS",
    *BACKENDS,
    *NO_STATISTICS,
)
