"""Addresses that servers listen at, and under which others reach them.

Triton accepts only full IPv4 addresses: its HTTP server reads a name as 255.255.255.255 and waits
until the start has timed out.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from typing import Protocol

HERE = "this host"
EVERY = "0.0.0.0"  # noqa: S104 - what a deployment says, not what this does


class Listener(Protocol):
    """A listener on ports: a server of a deployment."""

    @property
    def name(self) -> str: ...
    @property
    def host(self) -> str: ...
    @property
    def ports(self) -> tuple[int, ...]: ...


def resolved(host: str) -> str:
    """Return the address that a deployment's ``host`` means.

    Raises:
        ValueError: Triton cannot listen at it; the message says why, and what is allowed.
    """
    if host == "localhost":
        return "127.0.0.1"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(
            f"{host!r} is no address; an IPv4 address in full is allowed, such as 127.0.0.1, or "
            "localhost (Triton looks up no names)"
        ) from None
    if address.version != 4:
        raise ValueError(f"{host} is an IPv6 address; servers listen at IPv4 addresses only")
    if address.is_multicast or address.is_reserved:
        raise ValueError(f"{host} is no address of a host: it is for broadcast or reserved")
    return host


def machine(host: str) -> str:
    """Return the machine of an address: all of loopback, and 0.0.0.0, are one."""
    address = ipaddress.ip_address(resolved(host))
    return HERE if address.is_loopback or address.is_unspecified else host


def problems(servers: Sequence[Listener]) -> Iterator[str]:
    """Yield the problems between servers' addresses that are valid one by one."""
    wildcards = [server for server in servers if ipaddress.ip_address(server.host).is_unspecified]
    others = [server for server in servers if machine(server.host) != HERE]
    if wildcards and others:
        yield (
            f"server {wildcards[0].name}: host 0.0.0.0 is no address under which "
            f"{others[0].name} ({others[0].host}) could reach it; give its host's own address"
        )
    taken: list[tuple[str, str, int]] = []
    for server in servers:
        for port in server.ports:
            for name, host, number in taken:
                if number == port and (EVERY in (host, server.host) or host == server.host):
                    where = f"by {name} and {server.name}" if name != server.name else f"by {name}"
                    yield f"address {server.host}:{port} is used more than once, {where}"
            taken.append((server.name, server.host, port))


def check_endpoint(address: str) -> None:
    """Check the port of ``host:port``. Raises ValueError if it is out of range."""
    port = int(address.rpartition(":")[2])
    if not 1 <= port <= 65535:
        raise ValueError(f"port {port} of {address} is not allowed; allowed: 1 to 65535")
