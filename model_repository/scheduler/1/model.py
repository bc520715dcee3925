"""Triton model `scheduler`; the code is in the installed package."""

from pdserve.models.scheduler import TritonPythonModel

__all__ = ["TritonPythonModel"]
