"""Handing KV caches from process to process: `python -m perf.transfer`."""
