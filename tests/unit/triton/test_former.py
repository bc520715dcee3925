"""Tests for metrics that an earlier process of an instance has left."""

from __future__ import annotations

from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.triton import former

PAGE = """
# HELP pdserve_slots The instance has this many slots in this state: used or free.
pdserve_slots{instance="decode_0",state="used"} 3
pdserve_slots{instance="decode_1",state="used"} 4
pdserve_slots{instance="decode_0",colour="red"} 5
pdserve_steps_total{instance="decode_0"} 5
pdserve_no_more{instance="decode_0"} 5
pdserve_kv_link_latency_seconds{decode="decode_0",detail="a b",prefill="p",transport="shm"} 2e-06
pdserve_kv_link_latency_seconds{decode="decode_1",detail="",prefill="decode_0",transport="shm"} 1
pdserve_kv_link_fallback{decode="decode_0",detail="",prefill="p",transport="nixl"} 0
nv_other{instance="decode_0"} 1
"""


def test_gauges_of_a_former_life_are_nothing() -> None:
    """Only the gauges of that instance become zero, no counters and no gauges of other releases."""
    registry = Registry()
    former.retire(registry, PAGE, "decode_0")
    registry.set(catalogue.SLOTS, 1, instance="decode_0", state="used")
    levels = [(change.name, dict(change.labels), change.value) for change in registry.drain()]
    link = {"decode": "decode_0", "detail": "a b", "prefill": "p", "transport": "shm"}
    assert levels == [
        ("pdserve_slots", {"instance": "decode_0", "state": "used"}, 1),
        ("pdserve_kv_link_latency_seconds", link, 0),
    ]
