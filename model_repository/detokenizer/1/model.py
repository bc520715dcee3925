"""Triton model `detokenizer`; the code is in the installed package."""

from pdserve.triton.detokenizer import TritonPythonModel

__all__ = ["TritonPythonModel"]
