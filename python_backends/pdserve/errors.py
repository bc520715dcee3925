"""Errors that a client may see, each with the code it is reported under.

``code`` is the name of a Triton error code; Triton maps it to an HTTP status
(INVALID_ARG 400, NOT_FOUND 404, UNSUPPORTED 501, UNAVAILABLE 503, INTERNAL 500).
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import ClassVar


class PDServeError(Exception):
    """Base of all errors that end a request."""

    code: ClassVar[str] = "INTERNAL"


class InvalidRequest(PDServeError):
    """The request can never be served; the message names the value and what is allowed."""

    code = "INVALID_ARG"


class Unsupported(InvalidRequest):
    """The model cannot do what is asked, whatever else the request says."""

    code = "UNSUPPORTED"


class NotFound(PDServeError):
    """The request names something that the deployment does not have."""

    code = "NOT_FOUND"


class Unavailable(PDServeError):
    """No instance could take the request within its limit; trying again later may work."""

    code = "UNAVAILABLE"


class Late(Unavailable):
    """A time limit of the request itself has passed."""


class Cancelled(PDServeError):
    """The client has disconnected or has cancelled the request."""

    code = "CANCELLED"


class HandleError(PDServeError):
    """A KV handle that must not be read: malformed, foreign, stale, expired or used."""


class InstanceError(PDServeError):
    """An instance failed or did not answer in time."""


class InstanceEnded(InstanceError):
    """An instance that had been answering has ended, or the connection to it has."""


class Drained(InstanceError):
    """An instance serves no request under this assignment any more.

    It drains, or has another assignment; that is no failure. Another instance goes on with the
    request, whose client never sees this error.
    """

    code = "DRAINED"


class Suspected(PDServeError):
    """The request was open on so many instances when they ended that it is not tried again."""


class DeploymentError(Exception):
    """The deployment, or the machine that it is for, does not work as configured."""


def brief(error: BaseException) -> str:
    """Return an error's text, shortened, since it may quote a client and gRPC carries few KiB."""
    text = str(error)
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"


def shown(value: object) -> str:
    """Return the beginning of a value from a client, for an error's text."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def loggable(error: BaseException) -> str:
    """Return what a log may contain of an error: short, and nothing that a client has sent.

    The messages of this package's own errors are written for that. Of any other exception, which
    may quote a prompt, only the kind and the place where it was raised are returned.
    """
    if isinstance(error, PDServeError):
        return f"{type(error).__name__}: {brief(error)}"
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    where = ", ".join(f"{Path(one.filename).name}:{one.lineno} in {one.name}" for one in frames)
    return f"{type(error).__name__} ({where or 'nowhere'})"
