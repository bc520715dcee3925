"""Tests for the matrix of `pdctl links`, which is read from the metrics of decodes."""

from __future__ import annotations

from rich.console import Console

from pdctl import links
from pdctl.status import values
from pdserve.config import Deployment, Server

DEPLOYMENT = Deployment(
    model="model",
    servers=(Server("a", prefill=("p_0", "p_1")), Server("b", decode=("d_0", "d_1"))),
)
PAGE = """
pdserve_kv_link_bytes_per_second{prefill="p_0",decode="d_0",transport="shm",detail="mapped"} 0
pdserve_kv_link_bytes_per_second{prefill="p_0",decode="d_0",transport="nixl",detail="tcp"} 2e9
pdserve_kv_link_latency_seconds{prefill="p_0",decode="d_0",transport="shm",detail="mapped"} 0
pdserve_kv_link_latency_seconds{prefill="p_0",decode="d_0",transport="nixl",detail="tcp"} 0.000125
pdserve_kv_link_fallback{prefill="p_0",decode="d_0",transport="nixl",detail="tcp"} 1
pdserve_kv_link_bytes_per_second{prefill="p_1",decode="d_1",transport="shm",detail="mapped"} 1e10
pdserve_kv_link_fallback{prefill="p_1",decode="d_1",transport="shm",detail="mapped"} 0
pdserve_kv_link_bytes_per_second{prefill="gone",decode="d_1",transport="shm",detail="mapped"} 1e10
pdserve_slots{instance="d_0",state="free"} 64
"""


def test_every_pair_of_the_deployment_and_no_other() -> None:
    found = links.links(DEPLOYMENT, [values(PAGE)])

    assert [(link.prefill, link.decode) for link in found] == [
        *(("p_0", "d_0"), ("p_0", "d_1"), ("p_1", "d_0"), ("p_1", "d_1")),
    ]
    assert [link.transport for link in found] == ["nixl", "", "", "shm"]
    assert found[0] == links.Link("p_0", "d_0", "nixl", "tcp", 2e9, 0.000125, True)
    assert not found[3].fallback
    assert links.rows(found)[0]["bytes_per_second"] == 2e9


def test_a_fallback_and_a_pair_without_link_are_seen() -> None:
    console = Console(width=80, record=True)
    console.print(links.table(links.links(DEPLOYMENT, [values(PAGE)])))
    text = console.export_text()

    assert "nixl (tcp)" in text
    assert "1.86 GiB/s, 125 us, no RDMA" in text
    assert text.count(" - ") == 2


def test_without_metrics_of_a_decode_no_pair_is_linked() -> None:
    assert not any(link.transport for link in links.links(DEPLOYMENT, []))


def test_links_of_an_instance_that_is_gone_are_ignored() -> None:
    found = links.links(DEPLOYMENT, [values(PAGE)], gone={"p_0"})
    assert [link.transport for link in found] == ["", "", "", "shm"]
    found = links.links(DEPLOYMENT, [values(PAGE)], gone={"d_1"})
    assert [link.transport for link in found] == ["nixl", "", "", ""]
