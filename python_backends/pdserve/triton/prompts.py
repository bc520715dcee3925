"""The inputs of a prompt that is text, as pdserve, tokenizer and scheduler read them."""

from __future__ import annotations

from pdserve.errors import InvalidRequest
from pdserve.gateway.parameters import Tensors, needed, scalar

NO_TOKENS = "text_input: no tokens; at least 1 is needed"


def text(inputs: Tensors, most: int) -> bytes:
    """Return ``text_input``.

    Raises:
        InvalidRequest: it is missing, or has more bytes than ``most``.
    """
    needed(inputs, "text_input")
    data: bytes = scalar(inputs, "text_input")
    if len(data) > most:
        raise InvalidRequest(f"text_input: {len(data)} bytes; at most {most} are allowed")
    return data


def echo(inputs: Tensors) -> str:
    """Return the text that comes before the answer: the prompt, if the client asks for it."""
    left_out = scalar(inputs, "exclude_input_in_output")
    data: bytes = scalar(inputs, "text_input")
    return data.decode() if left_out is not None and not left_out else ""
