"""The transport from each prefill to each decode, read from the decodes' metrics."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from pdserve.config import Deployment

_LABELS = re.compile(r'(\w+)="([^"]*)"')
_RATE = "pdserve_kv_link_bytes_per_second"
_LATENCY = "pdserve_kv_link_latency_seconds"
_FALLBACK = "pdserve_kv_link_fallback"


@dataclass
class Link:
    """A pair of instances; `transport` is empty if they have no link."""

    prefill: str
    decode: str
    transport: str = ""
    detail: str = ""
    bytes_per_second: float = 0.0
    latency_seconds: float = 0.0
    fallback: bool = False
    """A network without RDMA."""

    def __str__(self) -> str:
        if not self.transport:
            return "-"
        over = f" ({self.detail})" if self.detail else ""
        rate = f"{self.bytes_per_second / 2**30:.3g} GiB/s"
        warning = ", no RDMA" if self.fallback else ""
        latency = microseconds(self.latency_seconds)
        return f"{self.transport}{over}\n{rate}, {latency}{warning}"


def microseconds(seconds: float) -> str:
    """Format a latency: whole microseconds, or two digits if it is below one."""
    value = seconds * 1e6
    return f"{value:.0f} us" if value >= 1 else f"{value:.2g} us"


def links(
    deployment: Deployment, pages: Iterable[dict[str, float]], gone: Collection[str] = ()
) -> list[Link]:
    """Return every pair of a deployment, from its servers' series (`pdctl.status.values`).

    Args:
        gone: instances that are out of service; metrics about them are of a former process.
    """
    pairs = {
        (prefill, decode): Link(prefill, decode)
        for prefill in deployment.instances("prefill")
        for decode in deployment.instances("decode")
    }
    for series, value in (item for page in pages for item in page.items()):
        name, _, text = series.partition("{")
        labels = dict(_LABELS.findall(text))
        pair = pairs.get((labels.get("prefill", ""), labels.get("decode", "")))
        if pair is None or not value or pair.prefill in gone or pair.decode in gone:
            continue
        if name == _RATE:
            pair.transport, pair.detail = labels["transport"], labels["detail"]
            pair.bytes_per_second = value
        elif name == _LATENCY:
            pair.latency_seconds = value
        elif name == _FALLBACK:
            pair.fallback = True
    return list(pairs.values())


def table(found: list[Link]) -> Table:
    """Return a table with a row for each prefill and a column for each decode."""
    decodes = list(dict.fromkeys(link.decode for link in found))
    made = Table("", *decodes)
    for prefill in dict.fromkeys(link.prefill for link in found):
        made.add_row(prefill, *(str(link) for link in found if link.prefill == prefill))
    return made


def rows(found: list[Link]) -> list[dict[str, Any]]:
    """Return the pairs for JSON."""
    return [asdict(link) for link in found]
