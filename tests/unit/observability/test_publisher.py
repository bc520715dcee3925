"""Tests for publishing metrics to Triton, which may refuse some of them."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict
from contextlib import suppress
from weakref import WeakSet

import pytest

from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.observability.publisher import COUNTS_EVERY, PUBLISH_S, Publisher
from tests.unit.inprocess import real, virtual

REQUESTS, SLOTS = "pdserve_requests_total", "pdserve_slots"


class Server:
    """Imitates Triton's ``MetricFamily``: keeps every series except those that it ``refuses``."""

    COUNTER, GAUGE = "counter", "gauge"

    def __init__(self) -> None:
        self.refuses: set[str] = set()
        self.made: list[str] = []
        self.values: defaultdict[str, float] = defaultdict(float)
        self.objects: WeakSet[Series] = WeakSet()
        """Triton shows a series as long as there is an object of it."""

    def __call__(self, name: str, description: str, kind: str) -> Family:
        self.take(f"family {name}")
        self.made.append(f"{kind} {name}: {description}")
        return Family(self, name)

    def take(self, what: str) -> None:
        if what in self.refuses:
            raise RuntimeError(f"no {what}")


class Family:
    def __init__(self, server: Server, name: str) -> None:
        self.server, self.name = server, name

    def Metric(self, labels: dict[str, str]) -> Series:  # noqa: N802 - Triton's name
        series = Series(self.server, self.name, " ".join((self.name, *labels.values())))
        self.server.objects.add(series)
        return series


class Series:
    def __init__(self, server: Server, name: str, text: str) -> None:
        self.server, self.name, self.text = server, name, text

    def increment(self, value: float) -> None:
        self.server.take(self.name)
        self.server.values[self.text] += value

    def set(self, value: float) -> None:
        self.server.take(self.name)
        self.server.values[self.text] = value


async def publish(publisher: Publisher, seconds: float) -> None:
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(publisher.run(), seconds)


def count(registry: Registry) -> None:
    registry.add(catalogue.REQUESTS, 1, scenario="a", outcome="stop")
    registry.set(catalogue.SLOTS, 2, instance="p", state="used")
    registry.observe(catalogue.TTFT, 0.3, scenario="a", group="g")
    registry.add(catalogue.STEPS, 3, instance="p")


def published(server: Server) -> dict[str, float]:
    """Return the published series without the buckets."""
    return {text: value for text, value in server.values.items() if "_bucket" not in text}


ALL = {
    "pdserve_requests_total a stop": 1,
    "pdserve_steps_total p": 3,
    "pdserve_ttft_seconds_count a g": 1,
    "pdserve_ttft_seconds_sum a g": 0.3,
    "pdserve_slots p used": 2,
}


@virtual
async def test_changes_are_published() -> None:
    server, registry = Server(), Registry()
    count(registry)
    await publish(Publisher(registry, server), PUBLISH_S / 2)
    assert published(server) == ALL
    assert f"counter {REQUESTS}: {catalogue.REQUESTS.help_text}" in server.made
    assert f"gauge {SLOTS}: {catalogue.SLOTS.help_text}" in server.made


@virtual
@pytest.mark.parametrize("refused", [REQUESTS, f"family {REQUESTS}", SLOTS, f"family {SLOTS}"])
async def test_a_metric_that_is_not_taken_stops_no_other(
    refused: str, caplog: pytest.LogCaptureFixture
) -> None:
    server, registry = Server(), Registry()
    server.refuses = {refused}
    publisher = Publisher(registry, server)
    name = refused.removeprefix("family ")
    others = {text: value for text, value in ALL.items() if not text.startswith(name)}
    with caplog.at_level(logging.ERROR):
        publishing = asyncio.create_task(publish(publisher, 10 * PUBLISH_S))
        count(registry)
        await asyncio.sleep(PUBLISH_S / 2)
        assert published(server) == others
        registry.add(catalogue.STEPS, 1, instance="p")
        await asyncio.sleep(COUNTS_EVERY * PUBLISH_S)
        steps = others["pdserve_steps_total p"] + 1
        assert published(server) == others | {"pdserve_steps_total p": steps}, (
            "nor does it delay any"
        )
        await publishing
    assert caplog.messages == [f"{name} cannot be published: RuntimeError('no {refused}')"]


@virtual
async def test_what_is_not_taken_is_published_later() -> None:
    """Counters include all increments since, and gauges have their current level."""
    server, registry = Server(), Registry()
    server.refuses = {REQUESTS, SLOTS}
    publishing = asyncio.create_task(publish(Publisher(registry, server), 5 * PUBLISH_S))
    count(registry)
    await asyncio.sleep(2.5 * PUBLISH_S)
    registry.add(catalogue.REQUESTS, 1, scenario="a", outcome="stop")
    registry.set(catalogue.SLOTS, 1, instance="p", state="used")
    await asyncio.sleep(PUBLISH_S)
    server.refuses = set()
    await publishing
    again = {"pdserve_requests_total a stop": 2, "pdserve_slots p used": 1}
    assert published(server) == ALL | again


@virtual
async def test_gauges_of_what_is_gone_vanish() -> None:
    server, registry = Server(), Registry()
    publisher = Publisher(registry, server)

    def shown() -> set[str]:
        return {series.text for series in server.objects if series.name == SLOTS}

    for instance in ("p", "q"):
        registry.set(catalogue.SLOTS, 1, instance=instance, state="used")
        registry.set(catalogue.SLOTS, 3, instance=instance, state="free")
    await publish(publisher, PUBLISH_S / 2)
    assert len(shown()) == 4
    registry.drop(instance="p", state="used")
    await publish(publisher, PUBLISH_S / 2)
    assert shown() == {f"{SLOTS} p free", f"{SLOTS} q used", f"{SLOTS} q free"}
    registry.set(catalogue.SLOTS, 1, instance="p", state="used")
    await publish(publisher, PUBLISH_S / 2)
    assert len(shown()) == 4, "it is shown again once it is set again"
    registry.add(catalogue.STEPS, 2, instance="p")
    await publisher.close()
    assert not shown()
    assert server.values["pdserve_steps_total p"] == 2, "what was counted last is published"


@virtual
async def test_a_look_comes_before_each_publication() -> None:
    server, registry = Server(), Registry()
    waiting = iter(range(1, 100))

    def look() -> None:
        registry.set(catalogue.SLOT_WATCHES, next(waiting), instance="p")

    await publish(Publisher(registry, server, look), 2.5 * PUBLISH_S)
    assert server.values["pdserve_slot_watches p"] == 3


@virtual
async def test_gauges_are_published_more_often_than_the_rest() -> None:
    server, registry = Server(), Registry()
    publishing = asyncio.create_task(publish(Publisher(registry, server), 10 * PUBLISH_S))
    await asyncio.sleep(0.5 * PUBLISH_S)
    count(registry)
    await asyncio.sleep(PUBLISH_S)
    assert published(server) == {"pdserve_slots p used": 2}
    await asyncio.sleep((COUNTS_EVERY - 1) * PUBLISH_S)
    assert published(server) == ALL
    await publishing


@real
async def test_a_publication_that_is_under_way_at_the_end_counts_once() -> None:
    """It goes on in its thread when ``run`` is cancelled, and ``close`` publishes after it."""
    began, go_on = threading.Event(), threading.Event()

    class Slow(Server):
        def take(self, what: str) -> None:
            began.set()
            assert go_on.wait(10)

    server, registry = Slow(), Registry()
    publisher = Publisher(registry, server)
    registry.add(catalogue.STEPS, 3, instance="p")
    running = asyncio.create_task(publisher.run())
    assert await asyncio.to_thread(began.wait, 10)
    running.cancel()
    await asyncio.wait({running})
    registry.add(catalogue.STEPS, 1, instance="p")
    closing = asyncio.create_task(publisher.close())
    await asyncio.sleep(0.05)
    go_on.set()
    await asyncio.wait_for(closing, 10)
    assert published(server) == {"pdserve_steps_total p": 4}
