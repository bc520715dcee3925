"""TensorRT-LLM's LLM API as an engine of either role.

Written according to its documented API and its source (docs/tensorrt-llm.md names the files), and
tested with a fake of it; it has not run with the real one.
"""
