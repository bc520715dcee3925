"""Triton model `decode`; the code is in the installed package."""

from pdserve.triton.decode import TritonPythonModel

__all__ = ["TritonPythonModel"]
