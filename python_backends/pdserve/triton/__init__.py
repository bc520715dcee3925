"""What Triton loads: tensors in, calls, tensors out.

Only this package knows Triton's Python API.
"""
