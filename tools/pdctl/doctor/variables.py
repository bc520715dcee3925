"""Environment variables that an inventory has, since they change what servers do."""

from __future__ import annotations

from pdserve.config.llm_options import BACKEND_VARIABLES

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
    *BACKEND_VARIABLES,
    *NO_STATISTICS,
)
