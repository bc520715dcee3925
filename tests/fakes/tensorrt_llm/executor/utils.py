"""Errors of requests."""

from __future__ import annotations


class RequestError(RuntimeError):
    """A request has failed; raised where its results are read."""
