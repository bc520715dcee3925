"""Triton model `scheduler`; the code is in the installed package."""

from pdserve.triton.scheduler import TritonPythonModel

__all__ = ["TritonPythonModel"]
