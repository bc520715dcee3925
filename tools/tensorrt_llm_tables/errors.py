"""What is wrong with a source of TensorRT-LLM."""

from __future__ import annotations


class SourceError(Exception):
    """A source that lacks something, or is no source; the text says which file and which class."""
