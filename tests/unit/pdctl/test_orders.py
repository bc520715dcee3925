"""Tests for an operator's orders: what is written, and errors that name what is allowed."""

from __future__ import annotations

from typing import Literal

import pytest

from pdctl import orders
from pdserve.config import Control, Deployment, GroupBounds, Server
from pdserve.control import records
from pdserve.control.assignment import Assignment
from pdserve.control.records import DesiredInstance, DrainOrder, ObservedInstance, Pin
from pdserve.control.store.protocol import Delete, Put
from pdserve.control.stored import Stored
from pdserve.errors import DeploymentError

PREFILLS, DECODES = ("p0", "p1", "p2"), ("d0", "d1", "d2")
SERVER = Server("local", prefill=PREFILLS, decode=DECODES)


def deployment(**bounds: int) -> Deployment:
    control = Control("chat", groups={"default": GroupBounds(**bounds)})
    return Deployment("m", (SERVER,), control=control)


def stored(kind: Literal["flexible", "prefill"] = "flexible") -> Stored:
    desired = {
        name: DesiredInstance(Assignment(1, role, "default"))
        for role, names in (("prefill", PREFILLS), ("decode", DECODES))
        for name in names
    }
    observed = {name: ObservedInstance("h", "s", "a:1", kind, "ready") for name in PREFILLS}
    pins, drains = {"default": Pin(2, 4)}, {"d0": DrainOrder(1.0)}
    return Stored(desired=desired, observed=observed, pins=pins, drains=drains)


def test_a_pin_is_a_key_of_its_own() -> None:
    put = orders.pin(deployment(), stored(), "default", "4:2")
    assert put == Put("pins/default", records.encode(Pin(4, 2)))
    assert orders.unpin(stored(), "default") == Delete("pins/default")


@pytest.mark.parametrize(
    ("group", "ratio", "named"),
    [
        ("chat", "4:2", "there is no group 'chat'; there are: default"),
        ("default", "4", "'4': allowed is PREFILLS:DECODES, such as 7:6"),
        ("default", "4:2:1", "allowed is PREFILLS:DECODES"),
        ("default", "-4:10", "allowed is PREFILLS:DECODES"),
        ("default", "4:3", "ratio 4:3: 7 instances; group default has 6"),
        ("default", "5:1", "ratio 5:1: 1 decodes; allowed: at least 2"),
    ],
)
def test_a_pin_that_cannot_be_is_refused(group: str, ratio: str, named: str) -> None:
    with pytest.raises(DeploymentError) as raised:
        orders.pin(deployment(), stored(), group, ratio)
    assert named in str(raised.value)


def test_a_pin_keeps_to_bounds_and_fixed_roles() -> None:
    orders.pin(deployment(least_decode=1), stored(), "default", "5:1")
    with pytest.raises(DeploymentError, match="2 prefills; allowed: at least 3 "):
        orders.pin(deployment(least_prefill=3), stored(), "default", "2:4")
    with pytest.raises(DeploymentError, match="and 3 of group default have this role for ever"):
        orders.pin(deployment(), stored("prefill"), "default", "2:4")


def test_a_drain_is_a_key_of_its_own() -> None:
    put = orders.drain(deployment(), "d1")
    assert put.key == "drains/d1"
    assert records.decode(put.value, DrainOrder).since > 1e9
    assert orders.undrain(stored(), "d0") == Delete("drains/d0")
    with pytest.raises(DeploymentError, match="there is no instance 'd9'; there are: d0, d1"):
        orders.drain(deployment(), "d9")
    with pytest.raises(DeploymentError, match="no drained instance 'd1'; there are: d0"):
        orders.undrain(stored(), "d1")
    with pytest.raises(DeploymentError, match="no pinned group 'x'; there are: none"):
        orders.unpin(Stored(), "x")
