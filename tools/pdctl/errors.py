"""Errors of servers; each message is meant for the person at the terminal."""

from __future__ import annotations


class ServerError(Exception):
    """A server cannot be started, reached or stopped."""


class Starved(ServerError):
    """A server could not start because the machine was too slow; it may the next time."""


class PortTaken(ServerError):
    """Another process listens on a port that the deployment names."""


class AlreadyRunning(ServerError):
    """The server runs already; nothing was changed."""


class Stopped(ServerError):
    """The server has been stopped as asked, and must not be started again."""
