"""The parameters of a request: names, types, ranges and defaults, checked before any work is done.

Triton has checked names, types and dimensions of tensors against the model's configuration before;
this module checks their values.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from pdserve.errors import InvalidRequest, shown
from pdserve.sampling import Sampling

DEFAULT_MAX_TOKENS = 128
MAX_LABEL_BYTES = 64
MAX_STOP_BYTES = 256
# These are accepted as request parameters of the same names, too.
ROUTING = ("scenario", "tenant", "priority")
PARAMETERS = (*ROUTING, "timeout", "traceparent")

Tensors = Mapping[str, NDArray[Any]]


@dataclass(slots=True, frozen=True)
class Parameters:
    """All parameters of a request but its prompt. None: not given, the scenario decides."""

    max_tokens: int | None
    """Checked by ``answer_length``, since the bound depends on the prompt's length."""
    sampling: Mapping[str, Any]
    """Fields of ``Sampling`` that are given."""
    stop: tuple[str, ...]
    stream: bool
    ignore_eos: bool
    scenario: str
    """Label of the scenario; empty: none is given."""
    tenant: str
    priority: int | None
    ttft_limit_ms: int | None
    timeout_us: int
    """Microseconds; 0: none. HTTP's generate passes Triton's own request timeout as a parameter."""


def scalar(tensors: Tensors, name: str) -> Any:
    """Return the one value of tensor ``name``, or None where it is not given.

    Raises:
        InvalidRequest: the tensor has more or fewer values than one.
    """
    tensor = tensors.get(name)
    if tensor is None:
        return None
    if tensor.size != 1:
        raise InvalidRequest(f"{name}: {tensor.size} values given; exactly 1 is allowed")
    return tensor.reshape(-1)[0].item() if tensor.dtype != object else tensor.reshape(-1)[0]


def needed(tensors: Tensors, name: str) -> NDArray[Any]:
    """Return tensor ``name``. Raises InvalidRequest: it is not given.

    Triton checks only the number of inputs.
    """
    if name not in tensors:
        raise InvalidRequest(f"{name} is missing; every request needs it")
    return tensors[name]


def parse(
    tensors: Tensors, extra: Mapping[str, Any], max_stop_words: int, inputs: Collection[str]
) -> Parameters:
    """Check everything that a request gives beside its prompt.

    Args:
        tensors: the request's inputs by name.
        extra: the request's parameters.
        inputs: names of the inputs that are allowed, for the error of an unknown field.

    Raises:
        InvalidRequest: a value is not allowed; the message names it and what is allowed.
    """
    for name, value in extra.items():
        # HTTP's generate leaves the request id among the parameters, and clients of other backends
        # send fields such as bad_words empty.
        if name not in (*PARAMETERS, "id") and value not in ("", None):
            raise _unknown(name, inputs)
    routing = {name: extra[name] for name in ROUTING if name in extra}
    routing |= {name: scalar(tensors, name) for name in ROUTING if name in tensors}
    sampling = {
        "temperature": _number(tensors, "temperature", 0.0, 100.0),
        "top_k": _number(tensors, "top_k", 0, 1 << 24),
        "top_p": _number(tensors, "top_p", 0.0, 1.0),
        "seed": _seed(tensors),
        "repetition_penalty": _number(tensors, "repetition_penalty", 0.0, 10.0, above=True),
        "presence_penalty": _number(tensors, "presence_penalty", -2.0, 2.0),
        "frequency_penalty": _number(tensors, "frequency_penalty", -2.0, 2.0),
    }
    return Parameters(
        max_tokens=scalar(tensors, "max_tokens"),
        sampling={name: value for name, value in sampling.items() if value is not None},
        stop=_stop_words(tensors, max_stop_words),
        stream=bool(scalar(tensors, "stream")),
        ignore_eos=bool(scalar(tensors, "ignore_eos")),
        scenario=_label("scenario", routing.get("scenario", "")),
        tenant=_label("tenant", routing.get("tenant", "")),
        priority=_integer("priority", routing["priority"]) if "priority" in routing else None,
        ttft_limit_ms=_number(tensors, "ttft_limit_ms", 1, (1 << 31) - 1),
        timeout_us=_microseconds("timeout", extra.get("timeout", 0)),
    )


def _unknown(name: str, inputs: Collection[str]) -> InvalidRequest:
    if name in inputs:
        return InvalidRequest(f"{name} is an input, and no request parameter")
    close = difflib.get_close_matches(name[:MAX_LABEL_BYTES], [*inputs, *PARAMETERS], n=1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    return InvalidRequest(
        f"unknown field {shown(name)}{meant}; inputs allowed: {', '.join(inputs)}; "
        f"request parameters allowed: {', '.join(PARAMETERS)}"
    )


def sampling(given: Mapping[str, Any], otherwise: Mapping[str, Any]) -> Sampling:
    """Return the sampling parameters: those of a request, and otherwise those of its scenario.

    A ``top_p`` of 0 is off, as in TensorRT-LLM.
    """
    made = Sampling(**{**otherwise, **given})
    return made if made.top_p else msgspec.structs.replace(made, top_p=1.0)


def answer_length(
    asked: int | None, otherwise: int | None, prompt_tokens: int, context_length: int
) -> int:
    """Return the maximum number of tokens of the answer.

    Args:
        asked: the client's ``max_tokens``.
        otherwise: the default for a request that gives none, as far as there is room.

    Raises:
        InvalidRequest: the prompt leaves no room, or ``asked`` exceeds it.
    """
    room = context_length - prompt_tokens
    if room < 1:
        raise InvalidRequest(
            f"the prompt has {prompt_tokens} tokens; at most {context_length - 1} are allowed"
        )
    if asked is not None and not 1 <= asked <= room:
        raise InvalidRequest(
            f"max_tokens: {asked}; allowed: 1 to {room} after a prompt of {prompt_tokens} tokens"
        )
    return asked or min(otherwise or DEFAULT_MAX_TOKENS, room)


def _number(tensors: Tensors, name: str, low: float, high: float, above: bool = False) -> Any:
    """Return the value of tensor ``name`` within its bounds, or None where it is not given."""
    value = scalar(tensors, name)
    if value is None:
        return None
    if math.isfinite(value) and (low < value if above else low <= value) and value <= high:
        return value
    shown = f"{value:.8g}" if isinstance(value, float) else value
    bounds = f"{'more than' if above else 'from'} {low} to {high}"
    raise InvalidRequest(f"{name}: {shown}; allowed: {bounds}")


def _seed(tensors: Tensors) -> int | None:
    """Return the value of ``seed``, or of ``random_seed``, TensorRT-LLM's older name for it."""
    seed, older = scalar(tensors, "seed"), scalar(tensors, "random_seed")
    if seed is not None and older is not None and seed != older:
        raise InvalidRequest(f"random_seed: {older}; allowed: what seed says, {seed}, or none")
    return older if seed is None else seed  # type: ignore[no-any-return]


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name}: {shown(value)}; an integer is allowed")
    return value


def _microseconds(name: str, value: Any) -> int:
    if _integer(name, value) < 0:
        raise InvalidRequest(f"{name}: {shown(value)}; allowed: 0 or more microseconds")
    return value  # type: ignore[no-any-return]


def _label(name: str, value: bytes | str) -> str:
    text = _utf8(name, value) if isinstance(value, bytes) else value
    if not isinstance(text, str):
        raise InvalidRequest(f"{name}: {shown(value)}; a string is allowed")
    # In this order: a lone surrogate, which JSON can carry, is not printable and cannot be encoded.
    if not text.isprintable() or len(text.encode()) > MAX_LABEL_BYTES:
        more = "..." if len(text) > MAX_LABEL_BYTES else ""
        raise InvalidRequest(
            f"{name}: {text[:MAX_LABEL_BYTES]!r}{more}; "
            f"allowed: printable, up to {MAX_LABEL_BYTES} bytes"
        )
    return text


def _stop_words(tensors: Tensors, most: int) -> tuple[str, ...]:
    given = tensors.get("stop_words", np.empty(0, object)).reshape(-1)
    # Clients of other backends send an empty stop string to give none.
    words = tuple(_utf8("stop_words", word) for word in given if word)
    if len(words) > most:
        raise InvalidRequest(f"stop_words: {len(words)} given; at most {most} are allowed")
    for word in words:
        if len(word.encode()) > MAX_STOP_BYTES:
            raise InvalidRequest(
                f"stop_words: {word[:32]!r}... has {len(word.encode())} bytes; "
                f"at most {MAX_STOP_BYTES} are allowed"
            )
    return words


def _utf8(name: str, value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{name}: invalid UTF-8 at byte {error.start}") from error
