"""Metrics counted in process: what is drained, once, and that histograms are Prometheus's."""

from __future__ import annotations

import pytest

from pdserve.observability.metrics import COUNTERS, GAUGES, HISTOGRAMS, SECONDS, Change, Registry


def drained(registry: Registry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    changes = list(registry.drain())
    found = {(change.name, change.labels): change.value for change in changes}
    assert len(found) == len(changes), "a series is told once"
    return found


def test_counters_are_drained_as_steps() -> None:
    registry = Registry()
    registry.add("pdserve_requests_total", scenario="a", outcome="stop")
    registry.add("pdserve_requests_total", scenario="a", outcome="stop")
    registry.add("pdserve_requests_total", scenario="b", outcome="stop")
    registry.add("pdserve_kv_transfer_bytes_total", 4096, transport="shm")
    assert drained(registry) == {
        ("pdserve_requests_total", (("scenario", "a"), ("outcome", "stop"))): 2,
        ("pdserve_requests_total", (("scenario", "b"), ("outcome", "stop"))): 1,
        ("pdserve_kv_transfer_bytes_total", (("transport", "shm"),)): 4096,
    }
    assert drained(registry) == {}
    registry.add("pdserve_forward_attempts")
    assert drained(registry) == {("pdserve_forward_attempts", ()): 1}


def test_gauges_are_drained_when_they_change() -> None:
    registry = Registry()
    key = ("pdserve_slots", (("instance", "p"), ("state", "used")))
    registry.set("pdserve_slots", 0, instance="p", state="used")
    assert drained(registry) == {key: 0}, "a first zero is told"
    registry.set("pdserve_slots", 0, instance="p", state="used")
    assert drained(registry) == {}
    registry.set("pdserve_slots", 3, instance="p", state="used")
    registry.set("pdserve_slots", 2, instance="p", state="used")
    assert drained(registry) == {key: 2}
    registry.set("pdserve_slots", 5, instance="p", state="used")
    registry.set("pdserve_slots", 2, instance="p", state="used")
    assert drained(registry) == {}


@pytest.mark.parametrize(
    ("value", "first"),
    [(0.0, 0.001), (0.001, 0.001), (0.0011, 0.0025), (0.3, 0.5), (60.0, 60.0), (61.0, None)],
)
def test_histogram_buckets_are_cumulative(value: float, first: float | None) -> None:
    registry = Registry()
    registry.observe("pdserve_ttft_seconds", value, scenario="a")
    found = drained(registry)
    scenario = ("scenario", "a")
    bounds = [*(bound for bound in SECONDS if first is not None and bound >= first), "+Inf"]
    assert found == {
        **{("pdserve_ttft_seconds_bucket", (scenario, ("le", str(bound)))): 1 for bound in bounds},
        ("pdserve_ttft_seconds_sum", (scenario,)): value,
        ("pdserve_ttft_seconds_count", (scenario,)): 1,
    }


def test_histogram_adds_up() -> None:
    registry = Registry()
    values = [0.0007, 0.004, 0.004, 0.2, 70.0]
    for value in values:
        registry.observe("pdserve_e2e_seconds", value)
    found = drained(registry)
    assert found["pdserve_e2e_seconds_count", ()] == 5
    assert found["pdserve_e2e_seconds_sum", ()] == pytest.approx(sum(values))
    for bound in SECONDS:
        below = sum(value <= bound for value in values)
        assert found.get(("pdserve_e2e_seconds_bucket", (("le", str(bound)),)), 0) == below
    assert found["pdserve_e2e_seconds_bucket", (("le", "+Inf"),)] == 5


def test_no_bucket_is_ahead_of_a_higher_one() -> None:
    """Whenever the page is read, and after whichever step."""
    registry = Registry()
    told = dict.fromkeys([*map(str, SECONDS), "+Inf"], 0.0)
    for values in ([0.3, 0.0007], [0.004, 70.0, 0.0001]):
        for value in values:
            registry.observe("pdserve_e2e_seconds", value)
        for change in registry.drain():
            if change.name == "pdserve_e2e_seconds_bucket":
                told[change.labels[-1][1]] += change.value
                assert list(told.values()) == sorted(told.values())
    assert told["+Inf"] == 5


@pytest.mark.parametrize("name", COUNTERS)
def test_counters_have_help(name: str) -> None:
    registry = Registry()
    registry.add(name)
    assert list(registry.drain()) == [Change("counter", name, COUNTERS[name], (), 1)]


@pytest.mark.parametrize("name", GAUGES)
def test_gauges_have_help(name: str) -> None:
    registry = Registry()
    registry.set(name, 7)
    assert list(registry.drain()) == [Change("gauge", name, GAUGES[name], (), 7)]


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_histograms_have_help(name: str) -> None:
    registry = Registry()
    registry.observe(name, 1.0)
    assert {change.help for change in registry.drain()} == {HISTOGRAMS[name]}


def test_gauges_of_a_former_life_are_nothing() -> None:
    """Those of the instance itself, and no others, and no counters."""
    page = """
# HELP pdserve_slots Slots of an instance
pdserve_slots{instance="decode_0",state="used"} 3
pdserve_slots{instance="decode_1",state="used"} 4
pdserve_steps_total{instance="decode_0"} 5
pdserve_kv_link_latency_seconds{decode="decode_0",detail="a b",prefill="p",transport="shm"} 2e-06
pdserve_kv_link_latency_seconds{decode="decode_1",detail="",prefill="decode_0",transport="shm"} 1
pdserve_kv_link_fallback{decode="decode_0",detail="",prefill="p",transport="nixl"} 0
nv_other{instance="decode_0"} 1
"""
    registry = Registry()
    registry.retire(page, "decode_0")
    registry.set("pdserve_slots", 1, instance="decode_0", state="used")
    levels = [(change.name, dict(change.labels), change.value) for change in registry.drain()]
    link = {"decode": "decode_0", "detail": "a b", "prefill": "p", "transport": "shm"}
    assert levels == [
        ("pdserve_slots", {"instance": "decode_0", "state": "used"}, 1),
        ("pdserve_kv_link_latency_seconds", link, 0),
    ]
