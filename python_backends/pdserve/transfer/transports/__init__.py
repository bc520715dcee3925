"""Transports from one process to the KV memory of another."""
