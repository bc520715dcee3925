"""Tests for the policy that a section ``control`` gives."""

from __future__ import annotations

from pdserve.config import Control, Deployment, Engine, GroupBounds, Hours, Server, Tide
from pdserve.control import policies
from pdserve.control.policy import Bounds, Policy
from pdserve.control.policy import Tide as Decided

SERVER = Server("s", prefill=("p0", "p1", "p2"), decode=("d0",))


def policy(**control: object) -> Policy:
    section = Control("test", **control)  # type: ignore[arg-type]
    return policies.policy(Deployment("m", (SERVER,), Engine(load_s=60), control=section))


def test_defaults() -> None:
    found = policy()
    assert found.ratio == "advise"
    assert found.bounds == {"default": Bounds(2, 1)}, "a group with one decode keeps one"
    assert (found.drain_s, found.load_s, found.budget, found.tides) == (45.0, 60.0, None, ())


def test_bounds_and_tides() -> None:
    night = Hours("22:30", "06:00", ("sat", "sun"))
    found = policy(
        groups={"default": GroupBounds(least_prefill=1, most=4)},
        budget=9,
        tides=(
            Tide("default", "training", (night,), prefill=1),
            Tide("default", "training", volume=True),
        ),
    )
    assert found.bounds == {"default": Bounds(1, 1, 4)}
    assert found.budget == 9
    some, whole = found.tides
    assert (some.prefills, some.decodes, some.volume) == (1, 0, False)
    assert whole == Decided("default", "training", volume=True)
    (window,) = some.windows
    assert (window.start_s, window.end_s, window.days) == (81000.0, 21600.0, frozenset({5, 6}))
    saturday = 86400.0 * 2  # 1970-01-03
    assert window.holds(saturday + 81000.0)
    assert window.holds(saturday + 86400.0 + 3600.0)
    assert not window.holds(saturday + 3600.0)
