"""Checks whether a server's ports are free, and which process has them if not."""

from __future__ import annotations

import errno
import socket

import psutil

from pdctl.errors import PortTaken, ServerError
from pdserve.config import Server


def check(server: Server) -> None:
    """Check that a server's ports are free.

    Raises PortTaken, with the port, its use and the process that holds it; ServerError if it cannot
    be used for another reason.
    """
    for use in ("http", "grpc", "metrics"):
        port: int = getattr(server, f"{use}_port")
        reason = obstacle(server.host, port)
        if reason is not None:
            error, words, mend = reason
            raise error(
                f"server {server.name}: {use}_port {port} on {server.host} cannot be used: "
                f"{words}. {mend}."
            )


Obstacle = tuple[type[ServerError], str, str]


def obstacle(host: str, port: int) -> Obstacle | None:
    """Return the error, reason and remedy if nothing can listen at an address; None: it can.

    Port 0 checks the host alone.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            here = ", ".join(own_addresses())
            mend = (
                f"Start that server on its own host (--server names one), or give it an address "
                f"of this one: {here}"
            )
            return ServerError, f"{host} is an address of another machine", mend
        if error.errno == errno.EACCES:
            return ServerError, "this user may not listen at it", "Choose a port above 1023"
        reason = holder(port) or error.strerror or str(error)
        return PortTaken, reason, "End that process or choose another port in the deployment"
    return None


def own_addresses() -> list[str]:
    """Return this machine's IPv4 addresses."""
    return sorted(
        address.address
        for interface in psutil.net_if_addrs().values()
        for address in interface
        if address.family == socket.AF_INET
    )


def listens(host: str, port: int) -> bool:
    """Tell whether a process answers there."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(2)
        return probe.connect_ex((host, port)) == 0


def is_here(server: Server) -> bool:
    """Tell whether its host is this machine, or this part of its network."""
    return obstacle(server.host, 0) is None


def holder(port: int) -> str | None:
    """Describe the process that listens on a port; None: unknown (perhaps another user's)."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return None
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,):
            try:
                name = psutil.Process(connection.pid).name()
            except (psutil.Error, ValueError):
                return None
            return f"taken by {name} (process {connection.pid})"
    return None
