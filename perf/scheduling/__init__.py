"""Scheduling policies side by side, on real servers: `python -m perf.scheduling`."""
