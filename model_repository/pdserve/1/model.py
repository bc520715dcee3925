"""Triton model `pdserve`; the code is in the installed package."""

from pdserve.models.pdserve import TritonPythonModel

__all__ = ["TritonPythonModel"]
