"""The package that runs requests in the library."""

from tensorrt_llm.executor.utils import RequestError

__all__ = ["RequestError"]
