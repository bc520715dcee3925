"""The events in the store: a bounded number of keys ``events/NUMBER``, the oldest first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from pdserve.control import records
from pdserve.control.events import Event
from pdserve.control.store.protocol import Delete, Put

KEPT = 500
"""Events that are kept; of more than these the oldest are deleted."""
_DIGITS = 12


def key(number: int) -> str:
    """Return the key of an event; keys are in the order of the numbers."""
    return f"{records.EVENTS}{number:0{_DIGITS}}"


def number(of: str) -> int:
    """Return the number in a key; 0: it is none of ours."""
    digits = of.removeprefix(records.EVENTS)
    return int(digits) if digits.isdigit() else 0


def operations(keys: Sequence[str], events: Sequence[Event], room: int) -> list[Put | Delete]:
    """Return what adds events, and deletes as many old ones as there are too many.

    Args:
        keys: of the events that are stored, in their order.
        room: operations at most; events come before deletions, which can wait.
    """
    first = max(map(number, keys), default=0) + 1
    puts: list[Put | Delete] = [
        Put(key(first + place), records.encode(event)) for place, event in enumerate(events[:room])
    ]
    surplus = max(0, len(keys) + len(puts) - KEPT)
    return puts + [Delete(old) for old in keys[: min(surplus, room - len(puts))]]


def decoded(stored: Iterable[tuple[str, bytes]]) -> list[tuple[int, Event]]:
    """Return the numbers and events of keys and values; what is no event is left out."""
    found = []
    for name, value in stored:
        try:
            found.append((number(name), records.decode(value, Event)))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
    return found
