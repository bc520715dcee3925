"""Trace contexts: a request may bring one (W3C traceparent), and each of its calls carries it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pdserve.scheduling.request import Request

if TYPE_CHECKING:
    from typing_extensions import Self

# Version 00 ends with its flags; a later version may be longer, and only its known part is read.
_TRACEPARENT = re.compile(
    r"(?!ff|00.{54})[0-9a-f]{2}"
    r"(-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2})(?=-|\Z)",
    re.DOTALL,
)

Log = Callable[[str], None]


class Trace:
    """The trace context of one request: a context manager from its arrival to its end.

    Args:
        traceparent: the context that the request's calls carry; empty: none.
    """

    def __init__(self, traceparent: str) -> None:
        self.traceparent = traceparent

    def carry(self, request: Request) -> None:
        """Set the trace context of a request."""
        request.trace = self.traceparent

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


class Traces:
    """Traces of one gateway that only passes on the contexts that clients bring.

    Args:
        log: called with a line from time to time, from any thread.
    """

    def __init__(self, gateway: str, log: Log) -> None:
        self._gateway = gateway
        self._log = log
        self._invalid_logged = False

    def begin(self, parameters: Mapping[str, Any]) -> Trace:
        """Begin the trace of a request with these parameters."""
        return Trace(self.parent(parameters))

    def close(self) -> None:
        """End all traces; no request comes any more."""

    def parent(self, parameters: Mapping[str, Any]) -> str:
        """Return the traceparent among a request's parameters; empty: none, or an invalid one."""
        given = parameters.get("traceparent") or ""
        if given == "":
            return ""
        found = _TRACEPARENT.match(given) if isinstance(given, str) else None
        if found is not None:
            return f"00{found[1]}"
        if not self._invalid_logged:
            self._invalid_logged = True
            self._log(
                f"{self._gateway}: traceparent: {given!r:.80} is invalid and ignored, "
                "as all that follow will be"
            )
        return ""
