"""The LLM API."""

from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.executor.result import CompletionOutput
from tensorrt_llm.executor.utils import RequestError
from tensorrt_llm.llmapi.llm import LLM, RequestOutput
from tensorrt_llm.llmapi.llm_args import CacheTransceiverConfig, KvCacheConfig, TorchLlmArgs
from tensorrt_llm.sampling_params import SamplingParams

LlmArgs = TorchLlmArgs

__all__ = [
    "LLM",
    "CacheTransceiverConfig",
    "CompletionOutput",
    "DisaggregatedParams",
    "KvCacheConfig",
    "LlmArgs",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "TorchLlmArgs",
]
