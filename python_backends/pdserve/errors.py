"""Errors that a client may see, each with the code it is reported under.

``code`` is the name of a Triton error code; Triton maps it to an HTTP status
(INVALID_ARG 400, NOT_FOUND 404, UNSUPPORTED 501, UNAVAILABLE 503, INTERNAL 500).
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import ClassVar


class PDServeError(Exception):
    """Base of everything that ends a request other than with its tokens."""

    code: ClassVar[str] = "INTERNAL"


class InvalidRequest(PDServeError):
    """The request can never be served; the message names the value and what is allowed."""

    code = "INVALID_ARG"


class Unsupported(InvalidRequest):
    """The model cannot do what is asked, whatever else the request says; it is not its fault."""

    code = "UNSUPPORTED"


class NotFound(PDServeError):
    """The request names something that the deployment does not have."""

    code = "NOT_FOUND"


class Unavailable(PDServeError):
    """No instance could take the request within its limit; trying again later may work."""

    code = "UNAVAILABLE"


class Late(Unavailable):
    """A limit that the request itself has brought has passed."""


class Cancelled(PDServeError):
    """The client went away or asked for the end."""

    code = "CANCELLED"


class HandleError(PDServeError):
    """A KV handle that must not be read: malformed, foreign, stale, expired or used."""


class InstanceError(PDServeError):
    """An instance failed or did not answer in time."""


class InstanceEnded(InstanceError):
    """An instance that had been answering has ended, or the connection to it has."""


class Suspected(PDServeError):
    """The request was open on so many instances when they ended that it is not tried again."""


class DeploymentError(Exception):
    """deployment.yaml, or the machine it is for, cannot work as it stands."""


def brief(error: BaseException) -> str:
    """An error may quote the client's value; gRPC carries no message of more than some KiB."""
    text = str(error)
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"


def shown(value: object) -> str:
    """A value that a client has sent, as an error may quote it: its beginning."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def loggable(error: BaseException) -> str:
    """What a log may say of an error: short, and nothing of what a client has sent.

    The messages of this package's own errors are made for that. Of any other exception, which may
    quote a prompt, only the kind is told, and where it was raised.
    """
    if isinstance(error, PDServeError):
        return f"{type(error).__name__}: {brief(error)}"
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    where = ", ".join(f"{Path(one.filename).name}:{one.lineno} in {one.name}" for one in frames)
    return f"{type(error).__name__} ({where or 'nowhere'})"
