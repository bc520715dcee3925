"""Tests for what the store takes over from the deployment's file, and what it does not."""

from __future__ import annotations

from msgspec.structs import replace

from pdserve.control import records
from pdserve.control.assignment import Assignment
from pdserve.control.reconciling import First, changes
from pdserve.control.records import (
    DesiredGroup,
    DesiredInstance,
    DrainOrder,
    Lent,
    ObservedInstance,
    Pin,
)
from pdserve.control.stored import Stored
from pdserve.control.transaction import Kind, Transaction

P0, D0 = Assignment(1, "prefill", "chat"), Assignment(1, "decode", "chat")
FIRST = First({"chat": DesiredGroup("chat")}, {"p0": P0, "d0": D0})
COMPLETE = Stored(
    desired={"p0": DesiredInstance(P0), "d0": DesiredInstance(D0)},
    groups={"chat": DesiredGroup("chat")},
)


def seen(assignment: Assignment | None) -> ObservedInstance:
    return ObservedInstance("h", "s", "a:1", "flexible", "ready", "e", assignment)


def stored(**changed: object) -> Stored:
    fields = {name: getattr(COMPLETE, name) for name in Stored.__slots__}
    return Stored(**{**fields, **changed})  # type: ignore[arg-type]


def test_an_empty_store_gets_the_first_state() -> None:
    found = changes(FIRST, Stored())
    assert found.writes == {
        "desired/groups/chat": DesiredGroup("chat"),
        "desired/instances/p0": DesiredInstance(P0),
        "desired/instances/d0": DesiredInstance(D0),
    }
    assert "p0, d0" in " ".join(found.why)


def test_nothing_is_written_twice() -> None:
    assert changes(FIRST, COMPLETE).writes == {}


def test_an_assignment_of_the_store_stays_whatever_the_file_says() -> None:
    switched = replace(P0, number=7, role="decode")
    kept = stored(desired={**COMPLETE.desired, "p0": DesiredInstance(switched, "draining")})
    assert changes(FIRST, kept).writes == {}


def test_what_is_not_in_the_file_any_more_is_forgotten() -> None:
    old = stored(
        desired={**COMPLETE.desired, "d1": DesiredInstance(D0)},
        lent={"d1": Lent("chat", "training", "decode"), "d0": Lent("old", "training", "decode")},
        drains={"d1": DrainOrder(1.0)},
        groups={**COMPLETE.groups, "old": DesiredGroup("chat")},
        pins={"old": Pin(2, 2)},
        transactions={"old": Transaction(Kind.RATIO, "old", (), 1.0, "")},
    )
    found = changes(FIRST, old)
    assert found.writes == dict.fromkeys(
        (
            "desired/instances/d1",
            "lent/d1",
            "drains/d1",
            "lent/d0",
            "desired/groups/old",
            "pins/old",
            "transactions/old",
        )
    )
    assert "desired/instances/d1" in " ".join(found.why)


def test_an_instance_of_a_group_that_is_gone_goes_where_the_file_has_it() -> None:
    old = stored(
        desired={**COMPLETE.desired, "p0": DesiredInstance(Assignment(4, "decode", "old"))}
    )
    assert changes(FIRST, old).writes == {
        "desired/instances/p0": DesiredInstance(replace(P0, number=5))
    }


def test_who_says_a_higher_number_than_the_store_is_right() -> None:
    """The store was made anew, or put back from a copy; the instances have run on."""
    own = Assignment(9, "decode", "chat")
    for values in (Stored(observed={"p0": seen(own)}), stored(observed={"p0": seen(own)})):
        assert changes(FIRST, values).writes["desired/instances/p0"] == DesiredInstance(own)
    old = stored(observed={"p0": seen(replace(own, group="old"))})
    assert changes(FIRST, old).writes["desired/instances/p0"] == DesiredInstance(
        replace(P0, number=10)
    )
    assert changes(FIRST, stored(observed={"p0": seen(None)})).writes == {}


def test_a_share_follows_the_file_unless_the_group_is_out_with_the_tide() -> None:
    first = replace_share(0.5)
    assert changes(first, COMPLETE).writes == {"desired/groups/chat": DesiredGroup("chat", 0.5)}
    gone = {"chat": DesiredGroup("chat", 0.0)}
    out = stored(groups=gone, lent={"p0": Lent("chat", "training", "prefill", share=1.0)})
    assert changes(first, out).writes == {}
    moving = Transaction(Kind.OUT, "chat", (), 1.0, "", whole=True)
    assert changes(first, stored(groups=gone, transactions={"chat": moving})).writes == {}
    one = stored(groups=gone, lent={"p0": Lent("chat", "training", "prefill")})
    assert changes(first, one).writes == {"desired/groups/chat": DesiredGroup("chat", 0.5)}


def replace_share(share: float) -> First:
    return First({"chat": DesiredGroup("chat", share)}, FIRST.instances)


def test_desired_state_that_cannot_be_read_is_written_again() -> None:
    broken = stored(invalid={"desired/instances/p0": "", "transactions/chat": "", "pins/chat": ""})
    assert changes(FIRST, broken).writes == {
        "desired/instances/p0": DesiredInstance(P0),
        "transactions/chat": None,
    }
    lost = {name: one for name, one in COMPLETE.desired.items() if name != "p0"}
    never = stored(desired=lost, invalid={"desired/instances/p0": ""})
    assert changes(FIRST, never).writes == {"desired/instances/p0": DesiredInstance(P0)}
    assert records.PINS == "pins/"
