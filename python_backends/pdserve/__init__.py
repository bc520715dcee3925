"""Disaggregated prefill and decode serving on Triton Inference Server."""
