"""Triton model `pdserve`; the code is in the installed package."""

from pdserve.triton.pdserve import TritonPythonModel

__all__ = ["TritonPythonModel"]
