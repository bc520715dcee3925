"""Traces of requests through the code, module by module."""
