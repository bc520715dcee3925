"""Gauges that a former process of an instance has left in its server."""

from __future__ import annotations

import re

from pdserve import config, connections
from pdserve.observability.catalogue import METRICS
from pdserve.observability.metrics import Gauge, Registry

TIMEOUT_S = 1.0
_OWNERS = ("instance", "decode")
"""Labels that name the owner of a gauge."""
_SERIES = re.compile(r"^(pdserve_\w+)\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def page(deployment: config.Deployment, instance: str) -> str:
    """Return the metrics of an instance's own server; empty: it does not answer, or not yet."""
    server = (deployment.instances("prefill") | deployment.instances("decode")).get(instance)
    if server is None:
        return ""
    url = f"http://{server.host}:{server.metrics_port}/metrics"
    try:
        return connections.read(url, TIMEOUT_S).decode()
    except (OSError, UnicodeDecodeError):
        return ""


def retire(metrics: Registry, page: str, instance: str) -> None:
    """Set to 0 the gauges that a former process of an instance has left on a page of metrics.

    Triton keeps the last values of a stub that has died, and the new process may never set the same
    gauges: it may reach others over another transport, or not at all.
    """
    for name, text, value in _SERIES.findall(page):
        labels = dict(_LABEL.findall(text))
        if instance not in map(labels.get, _OWNERS) or not float(value):
            continue
        gauge = METRICS.get(name)
        # An earlier release may have had other labels.
        if isinstance(gauge, Gauge) and labels.keys() == {*gauge.label_names}:
            metrics.set(gauge, 0, **labels)
