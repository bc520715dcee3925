"""Load, overhead and soak measurements against real servers; run as ``python -m perf.overhead``."""
