"""Measurement of KV cache transfers between processes: `python -m perf.transfer`."""
