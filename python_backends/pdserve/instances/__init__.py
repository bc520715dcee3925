"""Instances: one engine in one role, with admission, batching and the transfer of KV caches."""
