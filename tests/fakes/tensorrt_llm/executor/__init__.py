"""In the library, what runs requests."""

from tensorrt_llm.executor.utils import RequestError

__all__ = ["RequestError"]
