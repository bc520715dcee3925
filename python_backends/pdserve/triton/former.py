"""What a former life of an instance has left in its server."""

from __future__ import annotations

from pdserve import config, connections

TIMEOUT_S = 1.0


def page(deployment: config.Deployment, instance: str) -> str:
    """The metrics of an instance's own server; empty: it does not answer, or not yet."""
    server = (deployment.instances("prefill") | deployment.instances("decode")).get(instance)
    if server is None:
        return ""
    url = f"http://{server.host}:{server.metrics_port}/metrics"
    try:
        return connections.read(url, TIMEOUT_S).decode()
    except (OSError, UnicodeDecodeError):
        return ""
