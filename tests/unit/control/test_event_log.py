"""Tests for the keys of events: their order, and how many there are."""

from __future__ import annotations

import pytest

from pdserve.control import event_log, records
from pdserve.control.events import Event
from pdserve.control.store.protocol import Delete, Put

EVENTS = [Event(1.0, "hold", "chat", f"event {number}") for number in range(3)]


def test_events_are_numbered_on_from_the_last_one() -> None:
    made = event_log.operations([event_log.key(7), event_log.key(8)], EVENTS, 10)
    assert [one.key for one in made] == [event_log.key(number) for number in (9, 10, 11)]
    assert event_log.decoded([(one.key, one.value) for one in made if isinstance(one, Put)]) == [
        (9, EVENTS[0]),
        (10, EVENTS[1]),
        (11, EVENTS[2]),
    ]
    assert sorted(one.key for one in made) == [one.key for one in made]


@pytest.mark.parametrize(("room", "puts", "deletions"), [(20, 3, 8), (5, 3, 2), (2, 2, 0)])
def test_of_too_many_the_oldest_are_deleted_as_far_as_there_is_room(
    monkeypatch: pytest.MonkeyPatch, room: int, puts: int, deletions: int
) -> None:
    monkeypatch.setattr(event_log, "KEPT", 5)
    keys = [event_log.key(number) for number in range(1, 11)]
    made = event_log.operations(keys, EVENTS, room)
    assert sum(isinstance(one, Put) for one in made) == puts
    assert [one.key for one in made if isinstance(one, Delete)] == keys[:deletions]


def test_what_is_no_event_is_left_out() -> None:
    stored = [(f"{records.EVENTS}x", b"{}"), (event_log.key(2), records.encode(EVENTS[0]))]
    assert event_log.decoded([*stored, (event_log.key(3), b"\xff")]) == [(2, EVENTS[0])]
    assert event_log.number(f"{records.EVENTS}x") == 0
