"""DisaggregatedParams as bytes and back: every field that a version has, whatever it means.

With the C++ transceiver the link is ``opaque_state`` and a request id, with the Python one an
endpoint, a rank and a request id. Nothing here depends on which.
"""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any

import msgspec

from pdserve.errors import HandleError

Plain = None | bool | int | float | str | bytes | list[Any] | dict[str, Any]


def pack(params: Any) -> bytes:
    """The fields that are set.

    Raises:
        HandleError: one of them is no plain data, which this link does not carry.
    """
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        if value is None:
            continue
        fields[field.name] = value.value if isinstance(value, Enum) else value
    try:
        return msgspec.msgpack.encode(fields)
    except (TypeError, OverflowError) as error:
        raise HandleError(f"DisaggregatedParams that cannot be passed on: {error}") from error


def unpack(link: bytes, kind: Any, request_type: str) -> Any:
    """The params of another engine, for a request of this type.

    Args:
        kind: the DisaggregatedParams of the installed version.

    Raises:
        HandleError: not what ``pack`` makes, or of another version's fields.
    """
    try:
        fields = msgspec.msgpack.decode(link, type=dict[str, Any])
        return kind(**{**fields, "request_type": request_type})
    except (msgspec.MsgspecError, TypeError, ValueError) as error:
        raise HandleError(f"a link that DisaggregatedParams does not take: {error}") from error
