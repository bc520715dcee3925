"""The models that Triton loads: they translate between tensors and calls.

Only this package knows Triton's Python API.
"""
