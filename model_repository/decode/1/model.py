"""Triton model `decode`; the code is in the installed package."""

from pdserve.models.decode import TritonPythonModel

__all__ = ["TritonPythonModel"]
