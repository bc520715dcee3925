"""Triton model `flexible`; the code is in the installed package."""

from pdserve.triton.flexible import TritonPythonModel

__all__ = ["TritonPythonModel"]
