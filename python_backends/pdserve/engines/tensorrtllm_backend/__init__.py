"""Models of Triton's C++ ``tensorrtllm`` backend as engines of either role.

Written according to its model configuration and the example that comes with it
(docs/tensorrt-llm.md names the files), and tested with models that have the same tensors; it has
not run with the real ones.
"""
