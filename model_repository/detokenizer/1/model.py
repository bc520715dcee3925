"""Triton model `detokenizer`; the code is in the installed package."""

from pdserve.models.detokenizer import TritonPythonModel

__all__ = ["TritonPythonModel"]
