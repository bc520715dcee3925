"""Instances of engines that transfer KV caches themselves.

The link between two is only passed on.
"""
