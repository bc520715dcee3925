"""The ratio controller beside fixed ratios, on real servers: `python -m perf.control`."""
