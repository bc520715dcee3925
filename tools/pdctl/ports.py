"""Whether a server's ports are free, and who has them if not."""

from __future__ import annotations

import socket

import psutil

from pdctl.errors import PortTaken
from pdserve.config import Server


def check(server: Server) -> None:
    """Raises: PortTaken: naming the port, what it is for, and the process that holds it."""
    for use in ("http", "grpc", "metrics"):
        port: int = getattr(server, f"{use}_port")
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((server.host, port))
        except OSError as error:
            raise PortTaken(
                f"server {server.name}: {use}_port {port} on {server.host} cannot be used: "
                f"{holder(port) or error.strerror}. "
                "End that process or choose another port in the deployment."
            ) from error


def listens(host: str, port: int) -> bool:
    """Whether somebody answers there."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(2)
        return probe.connect_ex((host, port)) == 0


def is_here(server: Server) -> bool:
    """Its host is this machine, or this part of its network."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((server.host, 0))
    except OSError:
        return False
    return True


def holder(port: int) -> str | None:
    """The process that listens on a port, in words; None: not known (perhaps another user's)."""
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
