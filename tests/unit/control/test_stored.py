"""Tests for reading the store: what is kept of values that are gone or cannot be read."""

from __future__ import annotations

from pdserve.control import records
from pdserve.control.assignment import Assignment
from pdserve.control.records import DesiredInstance, ObservedAgent, ObservedInstance
from pdserve.control.store.protocol import Entry, Listing
from pdserve.control.stored import read

WANTED = DesiredInstance(Assignment(3, "decode", "chat"))
SEEN = ObservedInstance("h", "s", "a:1", "decode", "ready", "e", WANTED.assignment)


def listing(**values: bytes) -> Listing:
    entries = sorted((key.replace("__", "/"), value) for key, value in values.items())
    return Listing(9, tuple(Entry(key, value, 1, 1) for key, value in entries))


def test_each_key_becomes_a_record_of_its_kind() -> None:
    found = read(
        listing(
            control__generation=b"12",
            desired__instances__d0=records.encode(WANTED),
            observed__instances__d0=records.encode(SEEN),
            observed__agents__h=records.encode(ObservedAgent(1, ("s",))),
            events__000000000001=b"anything",
            other__key=b"anything",
        )
    )
    assert (found.generation, found.desired, found.observed) == (12, {"d0": WANTED}, {"d0": SEEN})
    assert found.agents["h"].servers == ("s",)
    assert [key for key, _ in found.events] == ["events/000000000001"]
    assert not found.invalid


def test_what_an_agent_reported_stays_when_its_lease_has_ended() -> None:
    agent = records.encode(ObservedAgent(1, ("s",)))
    before = read(listing(observed__instances__d0=records.encode(SEEN), observed__agents__h=agent))
    after = read(listing(), before)
    assert after.observed == {"d0": SEEN}
    assert after.agents == {}


def test_the_last_valid_value_stays_and_a_deleted_order_goes() -> None:
    before = read(
        listing(
            desired__instances__d0=records.encode(WANTED), pins__chat=b'{"prefills":2,"decodes":2}'
        )
    )
    after = read(listing(desired__instances__d0=b'{"assignment": 1}'), before)
    assert after.desired == {"d0": WANTED}
    assert list(after.invalid) == ["desired/instances/d0"]
    assert after.pins == {}
    never = read(listing(desired__instances__d0=b"\xff"))
    assert never.desired == {}
    assert list(never.invalid) == ["desired/instances/d0"]
