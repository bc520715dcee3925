"""Tests for metrics that are counted in process: each change is drained once; histogram format."""

from __future__ import annotations

import pytest

from pdserve.observability import catalogue
from pdserve.observability.catalogue import METRICS, SECONDS
from pdserve.observability.metrics import (
    Change,
    Counter,
    Gauge,
    Histogram,
    Metric,
    Registry,
    Summary,
)


def drained(registry: Registry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    changes = list(registry.drain())
    found = {(change.name, change.labels): change.value for change in changes}
    assert len(found) == len(changes), "a series is drained once"
    return found


def test_counters_are_drained_as_steps() -> None:
    registry = Registry()
    registry.add(catalogue.REQUESTS, 1, scenario="a", outcome="stop")
    registry.add(catalogue.REQUESTS, 1, scenario="a", outcome="stop")
    registry.add(catalogue.REQUESTS, 1, scenario="b", outcome="stop")
    registry.add(catalogue.KV_TRANSFER_BYTES, 4096, transport="shm")
    assert drained(registry) == {
        ("pdserve_requests_total", (("scenario", "a"), ("outcome", "stop"))): 2,
        ("pdserve_requests_total", (("scenario", "b"), ("outcome", "stop"))): 1,
        ("pdserve_kv_transfer_bytes_total", (("transport", "shm"),)): 4096,
    }
    assert drained(registry) == {}
    registry.add(catalogue.FORWARD_ATTEMPTS, 1)
    assert drained(registry) == {("pdserve_forward_attempts_total", ()): 1}


def test_gauges_are_drained_when_they_change() -> None:
    registry = Registry()
    key = ("pdserve_slots", (("instance", "p"), ("state", "used")))
    registry.set(catalogue.SLOTS, 0, instance="p", state="used")
    assert drained(registry) == {key: 0}, "a first zero is drained"
    registry.set(catalogue.SLOTS, 0, instance="p", state="used")
    assert drained(registry) == {}
    registry.set(catalogue.SLOTS, 3, instance="p", state="used")
    registry.set(catalogue.SLOTS, 2, instance="p", state="used")
    assert drained(registry) == {key: 2}
    registry.set(catalogue.SLOTS, 5, instance="p", state="used")
    registry.set(catalogue.SLOTS, 2, instance="p", state="used")
    assert drained(registry) == {}


def test_gauges_that_are_dropped_end_once() -> None:
    registry = Registry()
    for instance in ("p", "q"):
        registry.set(catalogue.SLOTS, 1, instance=instance, state="used")
        registry.set(catalogue.SLOT_WATCHES, 0, instance=instance)
    assert len(drained(registry)) == 4
    registry.drop(instance="p", state="used")
    registry.drop(instance="r")
    [change] = registry.drain()
    assert change[:2] == ("gone", "pdserve_slots")
    assert change.labels == (("instance", "p"), ("state", "used"))
    assert not list(registry.drain())
    registry.set(catalogue.SLOTS, 1, instance="p", state="used")
    assert [change.kind for change in registry.drain()] == ["gauge"], "it is there again"
    registry.drop()
    assert [change.kind for change in registry.drain()] == ["gone"] * 4


@pytest.mark.parametrize(
    ("value", "first"),
    [(0.0, 0.001), (0.001, 0.001), (0.0011, 0.0025), (0.3, 0.5), (60.0, 60.0), (61.0, None)],
)
def test_histogram_buckets_are_cumulative(value: float, first: float | None) -> None:
    registry = Registry()
    registry.observe(catalogue.TTFT, value, scenario="a", group="g")
    found = drained(registry)
    labels = ("scenario", "a"), ("group", "g")
    bounds = [*(bound for bound in SECONDS if first is not None and bound >= first), "+Inf"]
    assert found == {
        **{("pdserve_ttft_seconds_bucket", (*labels, ("le", str(bound)))): 1 for bound in bounds},
        ("pdserve_ttft_seconds_sum", labels): value,
        ("pdserve_ttft_seconds_count", labels): 1,
    }


def test_histogram_adds_up() -> None:
    registry = Registry()
    labels = ("scenario", "a"), ("group", "g")
    values = [0.0007, 0.004, 0.004, 0.2, 70.0]
    for value in values:
        registry.observe(catalogue.E2E, value, scenario="a", group="g")
    found = drained(registry)
    assert found["pdserve_e2e_seconds_count", labels] == 5
    assert found["pdserve_e2e_seconds_sum", labels] == pytest.approx(sum(values))
    for bound in SECONDS:
        below = sum(value <= bound for value in values)
        assert found.get(("pdserve_e2e_seconds_bucket", (*labels, ("le", str(bound)))), 0) == below
    assert found["pdserve_e2e_seconds_bucket", (*labels, ("le", "+Inf"))] == 5


def test_no_bucket_is_ahead_of_a_higher_one() -> None:
    """This holds whenever the page is read, and after each step of an update."""
    registry = Registry()
    told = dict.fromkeys([*map(str, SECONDS), "+Inf"], 0.0)
    for values in ([0.3, 0.0007], [0.004, 70.0, 0.0001]):
        for value in values:
            registry.observe(catalogue.E2E, value, scenario="a", group="g")
        for change in registry.drain():
            if change.name == "pdserve_e2e_seconds_bucket":
                told[change.labels[-1][1]] += change.value
                assert list(told.values()) == sorted(told.values())
    assert told["+Inf"] == 5


def test_a_histogram_has_buckets_of_its_own() -> None:
    registry = Registry()
    sizes = Histogram("pdserve_test_bytes", lambda: (), "bytes", "Sizes are tested.", (10.0, 20.0))
    for value in (10.0, 15.0, 30.0):
        registry.observe(sizes, value)
    found = drained(registry)
    buckets = {
        labels[0][1]: count
        for (name, labels), count in found.items()
        if name == "pdserve_test_bytes_bucket"
    }
    assert buckets == {"10.0": 1, "20.0": 2, "+Inf": 3}


def labels_of(metric: Metric[...]) -> dict[str, str]:
    return {name: f"a {name}" for name in metric.label_names}


@pytest.mark.parametrize("metric", METRICS.values(), ids=repr)
def test_what_is_told_of_a_metric(metric: Metric[...]) -> None:
    """The name, the help and the labels are given, the labels in the declared order."""
    registry, labels = Registry(), labels_of(metric)
    given = dict(reversed(labels.items()))
    if isinstance(metric, Histogram):
        registry.observe(metric, 1.0, **given)
        told = list(registry.drain())
        assert {change.help_text for change in told} == {metric.help_text}
        assert {change.kind for change in told} == {"counter"}
        parts = {"_sum", "_count"} if isinstance(metric, Summary) else {"_bucket", "_sum", "_count"}
        assert {change.name.removeprefix(metric.name) for change in told} == parts
        assert all(change.labels[: len(labels)] == (*labels.items(),) for change in told)
    elif isinstance(metric, Counter):
        registry.add(metric, 7, **given)
        change = Change("counter", metric.name, metric.help_text, (*labels.items(),), 7)
        assert list(registry.drain()) == [change]
    else:
        assert isinstance(metric, Gauge)
        registry.set(metric, 7, **given)
        change = Change("gauge", metric.name, metric.help_text, (*labels.items(),), 7)
        assert list(registry.drain()) == [change]


@pytest.mark.parametrize("metric", METRICS.values(), ids=repr)
def test_labels_are_those_that_are_declared(metric: Metric[...]) -> None:
    registry, labels = Registry(), labels_of(metric)
    counts = {
        Counter: registry.add,
        Gauge: registry.set,
        Histogram: registry.observe,
        Summary: registry.observe,
    }
    count = counts[type(metric)]
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        count(metric, 1, **labels, colour="red")
    for name in labels:
        others = {other: value for other, value in labels.items() if other != name}
        with pytest.raises(TypeError, match=f"missing .* '{name}'"):
            count(metric, 1, **others)
    assert list(registry.drain()) == [], "and no series is counted"


@pytest.mark.parametrize("metric", METRICS.values(), ids=repr)
def test_names_and_help_are_as_prometheus_has_them(metric: Metric[...]) -> None:
    assert metric.name.endswith("_total") == isinstance(metric, Counter)
    if metric.unit in ("seconds", "bytes", "bytes per second"):
        unit = metric.unit.replace(" ", "_")
        assert metric.name.removesuffix("_total").endswith(f"_{unit}")
    assert metric.unit
    assert metric.help_text[0].isupper()
    assert metric.help_text.endswith(".")
    if isinstance(metric, Histogram):
        assert list(metric.buckets) == sorted(set(metric.buckets))
