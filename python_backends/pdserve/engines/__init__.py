"""Engines: PyTorch, TensorRT-LLM, and an emulated engine that only waits."""
