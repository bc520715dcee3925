"""Instances of engines that move KV caches themselves; what links the two is only passed on."""
