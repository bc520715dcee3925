"""Triton model `tokenizer`; the code is in the installed package."""

from pdserve.triton.tokenizer import TritonPythonModel

__all__ = ["TritonPythonModel"]
