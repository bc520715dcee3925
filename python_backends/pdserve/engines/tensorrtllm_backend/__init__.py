"""Legacy (images up to 26.07): models of Triton's C++ ``tensorrtllm`` backend as engines.

TensorRT-LLM has removed that backend after 1.3.0rc20 (NVIDIA/TensorRT-LLM#15907).
Written according to its model configuration and the example that comes with it
(docs/tensorrt-llm.md names the files), and tested with models that have the same tensors; it has
not run with the real ones.
"""
