"""Converts DisaggregatedParams, with all fields that a version has, to bytes and back.

With the C++ transceiver the link is ``opaque_state`` and a request id, with the Python one an
endpoint, a rank and a request id. Nothing here depends on which it is.
"""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any

import msgspec

from pdserve.errors import HandleError

Plain = None | bool | int | float | str | bytes | list[Any] | dict[str, Any]


def pack(params: Any) -> bytes:
    """Encode the fields that are set and that a new DisaggregatedParams can be made with.

    Raises:
        HandleError: a field is no plain data, which this link cannot carry.
    """
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        if value is None or not field.init:
            continue
        fields[field.name] = value.value if isinstance(value, Enum) else value
    try:
        return msgspec.msgpack.encode(fields)
    except (TypeError, OverflowError) as error:
        raise HandleError(f"DisaggregatedParams that cannot be passed on: {error}") from error


def unpack(link: bytes, kind: Any, request_type: str) -> Any:
    """Decode the params of another engine, for a request of this type.

    Args:
        kind: the DisaggregatedParams class of the installed version.

    Raises:
        HandleError: it was not made by ``pack``, or has fields of another version.
    """
    try:
        fields = msgspec.msgpack.decode(link, type=dict[str, Any])
        return kind(**{**fields, "request_type": request_type})
    except (msgspec.MsgspecError, TypeError, ValueError) as error:
        raise HandleError(f"a link that DisaggregatedParams does not take: {error}") from error
