"""Causal language models of transformers, on PyTorch."""
