"""Triton model `prefill`; the code is in the installed package."""

from pdserve.models.prefill import TritonPythonModel

__all__ = ["TritonPythonModel"]
