"""Observability: the metrics that a process publishes."""
