"""The state of a deployment, as plain data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pdctl import ports, watchers
from pdctl.endpoint import state_of
from pdctl.errors import ServerError
from pdctl.repository import models
from pdctl.server import Server
from pdserve import connections
from pdserve.node.health import State

_SAMPLE = re.compile(r"^(pdserve_\w+)(\{[^}]*\})? (\S+)$", re.MULTILINE)


def status(server: Server) -> dict[str, Any]:
    """Return a server's state: stopped, starting, ready, or unhealthy (a model is not ready).

    One whose process is gone is unhealthy as long as a watchdog repairs it.

    A server of another host is asked at its ports, and is ready, unhealthy or unreachable.

    Keys: server, state, pid, model and engine (by which it runs), watchdog (its report; None: there
    is none), unwatched (it is meant to run without), http, grpc, metrics, models (name to state;
    ``absent``: it is not to be there),
    versions (of a model that has several, each one's state), values (the pdserve_* series without
    the buckets of histograms).
    """
    pid, started, running = server.pid, server.started, server.running
    watchdog = _watchdog(server.folder)
    found: dict[str, Any] = {
        "server": server.spec.name,
        "state": "stopped" if watchdog is None else "unhealthy",
        "pid": pid,
        "model": running.model,
        "engine": running.engine.kind,
        "watchdog": watchdog,
        "unwatched": started is not None and not started.watched,
        "http": server.http,
        "grpc": server.grpc,
        "metrics": server.metrics,
        "models": {name: "-" for name, _ in models(server.actual)},
        "versions": {},
        "values": {},
    }
    if pid is None and ports.is_here(server.spec):
        return found
    try:
        if pid is None:
            found["models"] |= _asked(server)
        else:
            versions = server.versions()
            found["models"] |= {name: state_of(states) for name, states in versions.items()}
            found["versions"] = {
                name: states for name, states in versions.items() if len(states) > 1
            }
        found["values"] = scrape(server)
    except (ServerError, OSError):
        silent = "unreachable" if pid is None else "starting"
        return found | {"state": "unhealthy" if server.ready() else silent}
    things = (watchdog or {}).get("things", {})
    for name, state in found["models"].items():
        if state != "READY" and things.get(name, {}).get("state") == State.ABSENT.value:
            found["models"][name] = "absent"
    healthy = all(state in ("READY", "absent") for state in found["models"].values())
    return found | {"state": "ready" if healthy else "unhealthy"}


def looked_after(entry: dict[str, Any]) -> bool:
    """Tell whether a running server of this host has a watchdog, if it is meant to have one."""
    return entry["pid"] is None or entry["watchdog"] is not None or entry["unwatched"]


def _watchdog(folder: Path) -> dict[str, Any] | None:
    """Return a watchdog's report; only its process id, if it could not write one."""
    found = watchers.reported(folder)
    if found is None and (pid := watchers.pid(folder)) is not None:
        return {"pid": pid, "at": None, "things": {}}
    return found


def _asked(server: Server) -> dict[str, str]:
    """Return `Endpoint.index` of a server on this host, whose key is known."""
    return {
        name: "READY" if server.ready(name) else "UNAVAILABLE" for name, _ in models(server.spec)
    }


def scrape(server: Server) -> dict[str, float]:
    """Return `values` of a running server, on this host or another. Raises: OSError."""
    return values(connections.read(server.metrics, 5).decode(errors="replace"))


def values(text: str) -> dict[str, float]:
    """Return the ``pdserve_*`` series of a metrics page, without buckets."""
    return {
        name + labels: float(value)
        for name, labels, value in _SAMPLE.findall(text)
        if not name.endswith("_bucket")
    }
