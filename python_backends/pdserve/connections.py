"""Connections to the servers of a deployment, which never use a proxy from the environment.

gRPC, urllib and requests use ``http_proxy`` and similar variables for loopback, too, unless they
are told otherwise. Servers are reached at the addresses in the deployment.
"""

from __future__ import annotations

import ipaddress
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from urllib.parse import urlsplit

GRPC_OPTIONS: list[tuple[str, int]] = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # The next call makes a new connection at once after a failure: shared ones would keep the
    # pause, up to two minutes, that grpc makes between two tries.
    ("grpc.use_local_subchannel_pool", 1),
]
"""Options of every channel; for tritonclient as ``channel_args``."""

_PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def read(url: str | urllib.request.Request, timeout: float) -> bytes:
    """Return the body of an answer with a status below 300.

    Args:
        timeout: seconds for each step.

    Raises:
        OSError: there is no answer, or not in HTTP; ``urllib.error.HTTPError`` for any other
            status.
    """
    try:
        with _opener.open(url, timeout=timeout) as answer:
            body: bytes = answer.read()
            return body
    except HTTPException as error:  # the server does not speak HTTP, or has broken off
        raise ConnectionError(f"no answer in HTTP: {error!r}") from error


def without_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without proxies, for a program that has no other setting."""
    return {name: value for name, value in environment.items() if name.lower() not in _PROXIES}


def is_loopback(url: str) -> bool:
    """Tell whether the host of a URL is this one, by its name or number."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
