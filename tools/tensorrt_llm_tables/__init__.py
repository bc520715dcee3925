"""Reads the names of TensorRT-LLM's API from its source, without importing it."""
