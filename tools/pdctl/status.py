"""What a deployment is doing, as plain data."""

from __future__ import annotations

import re
from typing import Any

from pdctl import ports, watchers
from pdctl.errors import ServerError
from pdctl.repository import models
from pdctl.server import Server
from pdserve import connections

_SAMPLE = re.compile(r"^(pdserve_\w+)(\{[^}]*\})? (\S+)$", re.MULTILINE)


def status(server: Server) -> dict[str, Any]:
    """A server's state: stopped, starting, ready, or unhealthy (some of its models are not ready).

    One of another host is asked at its ports, and ready, unhealthy or unreachable.

    Keys: server, state, pid, watchdog (what it knows; None: there is none), http, grpc, metrics,
    models (name to state), values (the pdserve_* series without the buckets of histograms).
    """
    pid = server.pid
    found: dict[str, Any] = {
        "server": server.spec.name,
        "state": "stopped",
        "pid": pid,
        "watchdog": watchers.reported(server.folder),
        "http": server.http,
        "grpc": server.grpc,
        "metrics": server.metrics,
        "models": {name: "-" for name, _ in models(server.spec)},
        "values": {},
    }
    if pid is None and ports.is_here(server.spec):
        return found
    try:
        found["models"] |= _asked(server) if pid is None else server.index()
        found["values"] = scrape(server)
    except (ServerError, OSError):
        silent = "unreachable" if pid is None else "starting"
        return found | {"state": "unhealthy" if server.ready() else silent}
    healthy = all(state == "READY" for state in found["models"].values())
    return found | {"state": "ready" if healthy else "unhealthy"}


def _asked(server: Server) -> dict[str, str]:
    """What `Server.index` tells of a server on this host, of which the key is known."""
    return {
        name: "READY" if server.ready(name) else "UNAVAILABLE" for name, _ in models(server.spec)
    }


def scrape(server: Server) -> dict[str, float]:
    """`values` of a running server, on this host or another. Raises: OSError."""
    with connections.urlopen(server.metrics, 5) as answer:
        return values(answer.read().decode())


def values(text: str) -> dict[str, float]:
    """The ``pdserve_*`` series of a metrics page, buckets left out."""
    return {
        name + labels: float(value)
        for name, labels, value in _SAMPLE.findall(text)
        if not name.endswith("_bucket")
    }
