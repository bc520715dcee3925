"""Tests for what a gateway knows of links of instances that change roles."""

from __future__ import annotations

from typing import Any, cast

from pdserve.observability.metrics import Registry
from pdserve.rpc.messages import Connected
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.kv_links import KVLinks
from pdserve.transfer.reports import LinkReport
from tests.unit.inprocess import virtual

CONNECTED = Connected("a", LinkReport("shm", "", 1e-6, 1e9, {}, False), 128)


def instance(name: str) -> Instance:
    return Instance(name, cast("Any", None))


@virtual
async def test_links_of_the_former_role_are_forgotten_when_it_joins_again() -> None:
    """It leaves for a while, since it has no role then."""
    a, b, c = (instance(name) for name in "abc")
    links = KVLinks([a, c], [b], None, "gateway", Registry())
    links.table.made(("a", "b"), b"endpoint", CONNECTED)
    links.update([c], [b])
    assert set(links.table.others("a")) == {"b"}, "KV caches of it may still wait"
    links.update([c], [b, instance("a")])
    assert not links.table.others("a")
    assert "a" not in links.table.others("b")


@virtual
async def test_links_of_one_that_comes_back_as_it_was_are_kept() -> None:
    a, b, c = (instance(name) for name in "abc")
    links = KVLinks([a, c], [b], None, "gateway", Registry())
    links.table.made(("a", "b"), b"endpoint", CONNECTED)
    links.update([c], [b])
    links.update([a, c], [b])
    assert set(links.table.others("a")) == {"b"}
