"""What the store lacks of the deployment's file, and has too much; pure.

The file has the first state and the bounds, the store the assignments. What the file adds is taken
up with its first assignment, and what it has no more is forgotten; an assignment in the store stays
as it is, whatever the file has of that instance. An instance that says that it has a higher number
than the store is right: the store was made anew, or put back from a copy. A value of the desired
state that cannot be read is written again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from msgspec import Struct
from msgspec.structs import replace

from pdserve.control import records
from pdserve.control.assignment import FIRST, Assignment
from pdserve.control.records import DesiredGroup, DesiredInstance, ObservedInstance
from pdserve.control.stored import Stored


@dataclass(frozen=True, slots=True)
class First:
    """The state that the deployment's file gives."""

    groups: Mapping[str, DesiredGroup]
    instances: Mapping[str, Assignment]


@dataclass(frozen=True, slots=True)
class Changes:
    """The records to write, by key (None: deleted), and why, in sentences."""

    writes: dict[str, Struct | None] = field(default_factory=dict)
    why: list[str] = field(default_factory=list)


def changes(first: First, stored: Stored) -> Changes:
    """Return what makes the store agree with the file; nothing once it does."""
    found = Changes()
    _groups(first, stored, found)
    new = []
    for name, given in first.instances.items():
        wanted = _assignment(given, stored.desired.get(name), stored.observed.get(name), first)
        if wanted is not None:
            state = stored.desired[name].state if name in stored.desired else "serving"
            found.writes[records.DESIRED_INSTANCES + name] = DesiredInstance(wanted, state)
            new.append(name)
    if new:
        found.why.append(f"desired state of {', '.join(new)}")
    for prefix, values in (
        (records.DESIRED_INSTANCES, stored.desired),
        (records.DESIRED_GROUPS, stored.groups),
        (records.TRANSACTIONS, stored.transactions),
        (records.LENT, stored.lent),
    ):
        for key in stored.invalid:
            if key.startswith(prefix) and key not in found.writes:
                found.writes[key] = values.get(key.removeprefix(prefix))
                found.why.append(f"{key} could not be read")
    _gone(first, stored, found)
    return found


def _groups(first: First, stored: Stored, found: Changes) -> None:
    out = {one.home for one in stored.lent.values() if one.share}
    out |= {one.group for one in stored.transactions.values() if one.whole}
    for name, wanted in first.groups.items():
        known = stored.groups.get(name)
        if known is not None and name in out:
            wanted = replace(wanted, share=known.share)  # noqa: PLW2901 - it comes back with its own
        if known != wanted:
            found.writes[records.DESIRED_GROUPS + name] = wanted
            found.why.append(f"group {name}: share {wanted.share:g} of scenario {wanted.scenario}")


def _assignment(
    given: Assignment,
    desired: DesiredInstance | None,
    seen: ObservedInstance | None,
    first: First,
) -> Assignment | None:
    """Return another assignment for an instance; None: the one in the store is right."""
    known = desired.assignment if desired is not None else None
    own = seen.assignment if seen is not None else None
    if own is not None and own.number > (known.number if known else FIRST):
        if own.group in ("", *first.groups):
            return own
        return replace(given, number=own.number + 1)
    if known is None:
        return given if own in (None, given) else replace(given, number=FIRST + 1)
    if known.group not in ("", *first.groups):
        return replace(given, number=known.number + 1)
    return None


def _gone(first: First, stored: Stored, found: Changes) -> None:
    """Add the deletion of everything that is about an instance or a group that is gone."""
    gone = list(_keys_of_gone(first, stored))
    found.writes.update(dict.fromkeys(gone))
    if gone:
        found.why.append(f"not in the file any more: {', '.join(gone)}")


def _keys_of_gone(first: First, stored: Stored) -> Iterator[str]:
    instances, groups = first.instances, first.groups
    for prefix, names in (
        (records.DESIRED_INSTANCES, stored.desired),
        (records.LENT, stored.lent),
        (records.DRAINS, stored.drains),
    ):
        yield from (prefix + name for name in names if name not in instances)
    for name, one in stored.lent.items():
        if name in instances and one.home not in groups:
            yield records.LENT + name
    for prefix, named in ((records.DESIRED_GROUPS, stored.groups), (records.PINS, stored.pins)):
        yield from (prefix + name for name in named if name not in groups)
    for name, transaction in stored.transactions.items():
        if name not in groups or (transaction.other and transaction.other not in groups):
            yield records.TRANSACTIONS + name
