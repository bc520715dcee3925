"""docs/benchmarks.md, and the headline figures of README.md, written from ``perf/results``."""
