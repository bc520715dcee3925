"""Prefill and decode apart, on Triton Inference Server."""
