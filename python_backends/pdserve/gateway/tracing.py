"""Tracing of a gateway's requests.

A gateway passes on the trace context that a client brings. Where the deployment names a collector,
it also makes spans of each request.
"""

from __future__ import annotations

from pdserve.errors import DeploymentError
from pdserve.gateway.trace_context import Log, Traces


def start(endpoint: str | None, gateway: str, log: Log) -> Traces:
    """Return a gateway's traces, with spans if there is a collector.

    Args:
        endpoint: URL of an OTLP/HTTP collector; None: no spans are made.

    Raises:
        DeploymentError: OpenTelemetry is not installed.
    """
    if endpoint is None:
        return Traces(gateway, log)
    try:
        from pdserve.gateway import spans  # noqa: PLC0415 - an extra, and only needed here
    except ImportError as error:
        raise DeploymentError(
            f"gateway.traces: {endpoint}: OpenTelemetry is not installed "
            f"(pip install 'pdserve[traces]'): {error}"
        ) from error
    return spans.exported(endpoint, gateway, log)
