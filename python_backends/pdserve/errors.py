"""Errors that a client may see, each with the code it is reported under.

``code`` is the name of a Triton error code; Triton maps it to an HTTP status
(INVALID_ARG 400, NOT_FOUND 404, UNAVAILABLE 503, INTERNAL 500).
"""

from __future__ import annotations

from typing import ClassVar


class PDServeError(Exception):
    """Base of everything that ends a request other than with its tokens."""

    code: ClassVar[str] = "INTERNAL"


class InvalidRequest(PDServeError):
    """The request can never be served; the message names the value and what is allowed."""

    code = "INVALID_ARG"


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


class DeploymentError(Exception):
    """deployment.yaml, or the machine it is for, cannot work as it stands."""


def brief(error: Exception) -> str:
    """An error may quote the client's value; gRPC carries no message of more than some KiB."""
    text = str(error)
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"
