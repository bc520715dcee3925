"""Triton model `prefill`; the code is in the installed package."""

from pdserve.triton.prefill import TritonPythonModel

__all__ = ["TritonPythonModel"]
