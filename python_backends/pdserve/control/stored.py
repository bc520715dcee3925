"""What the store holds at one revision, as records."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import Struct

from pdserve.control import records
from pdserve.control.records import (
    DesiredGroup,
    DesiredInstance,
    DrainOrder,
    Lent,
    ObservedAgent,
    ObservedInstance,
    Pin,
)
from pdserve.control.store.election import GENERATION
from pdserve.control.store.protocol import Listing
from pdserve.control.transaction import Transaction

_log = logging.getLogger(__name__)

_KINDS: dict[str, tuple[str, type[Struct]]] = {
    records.DESIRED_INSTANCES: ("desired", DesiredInstance),
    records.DESIRED_GROUPS: ("groups", DesiredGroup),
    records.OBSERVED_INSTANCES: ("observed", ObservedInstance),
    records.OBSERVED_AGENTS: ("agents", ObservedAgent),
    records.TRANSACTIONS: ("transactions", Transaction),
    records.PINS: ("pins", Pin),
    records.DRAINS: ("drains", DrainOrder),
    records.LENT: ("lent", Lent),
}


@dataclass(frozen=True, slots=True)
class Stored:
    """The records of a deployment, each kind by the name of its instance, group or agent."""

    generation: int = 0
    """Generation of the desired state; 0: none has been written yet."""
    desired: dict[str, DesiredInstance] = field(default_factory=dict)
    groups: dict[str, DesiredGroup] = field(default_factory=dict)
    observed: dict[str, ObservedInstance] = field(default_factory=dict)
    """The last reports, also by agents that are gone."""
    agents: dict[str, ObservedAgent] = field(default_factory=dict)
    """The agents that are alive."""
    transactions: dict[str, Transaction] = field(default_factory=dict)
    pins: dict[str, Pin] = field(default_factory=dict)
    drains: dict[str, DrainOrder] = field(default_factory=dict)
    lent: dict[str, Lent] = field(default_factory=dict)
    events: tuple[tuple[str, bytes], ...] = ()
    """Keys and values of the events, the oldest first."""
    invalid: dict[str, str] = field(default_factory=dict)
    """Keys whose values are not used, and why."""


def read(listing: Listing, before: Stored | None = None) -> Stored:
    """Return the records of a listing of everything.

    Args:
        before: the records of the last listing. The last valid value of a key stays until there is
            another valid one or the key is deleted; what was observed of an instance stays even
            then, since an agent's keys end with its lease.
    """
    found = Stored()
    before = before or Stored()
    if before.observed:
        found.observed.update(before.observed)
    generation, events = 0, []
    for entry in listing.entries:
        key = entry.key
        if key.startswith(records.EVENTS):
            events.append((key, entry.value))
            continue
        if key == GENERATION:
            generation = int(entry.value) if entry.value.isdigit() else 0
            continue
        prefix = key[: key.rfind("/") + 1]
        if prefix not in _KINDS:
            continue
        where, kind = _KINDS[prefix]
        name = key.removeprefix(prefix)
        values: dict[str, Any] = getattr(found, where)
        try:
            values[name] = records.decode(entry.value, kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            found.invalid[key] = str(error)[:200]
            if before.invalid.get(key) != found.invalid[key]:
                _log.warning("key %r is not used: %s", key, found.invalid[key])
            if (last := getattr(before, where).get(name)) is not None:
                values[name] = last
    return Stored(
        generation=generation,
        events=tuple(events),
        **{
            name: getattr(found, name)
            for name in (*(where for where, _ in _KINDS.values()), "invalid")
        },
    )
