"""Instances of engines that transfer KV caches themselves; the link between two is only passed
on."""
