"""Instances of engines that move KV caches themselves; what links two of them is only passed on."""
