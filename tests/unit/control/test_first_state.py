"""Tests for the state that a deployment begins with."""

from __future__ import annotations

from msgspec.structs import replace

from pdserve.config import Control, Deployment, Group, Scenario, Server
from pdserve.control import first_state
from pdserve.control.assignment import FIRST, Assignment

SERVER = Server("local", prefill=("prefill_0", "prefill_1"), decode=("decode_0",))


def test_every_instance_has_the_group_of_the_file_and_a_spare_none() -> None:
    deployment = Deployment("m", (SERVER,), control=Control("chat", spares=("prefill_1",)))
    assert first_state.assignments(deployment) == {
        "prefill_0": Assignment(FIRST, "prefill", "default"),
        "prefill_1": Assignment(FIRST, "prefill"),
        "decode_0": Assignment(FIRST, "decode", "default"),
    }


def test_a_flexible_spare_has_no_role() -> None:
    server = replace(SERVER, flexible=("prefill_1",))
    deployment = Deployment("m", (server,), control=Control("chat", spares=("prefill_1",)))
    assert first_state.assignments(deployment)["prefill_1"] == Assignment(FIRST, "none")


def test_groups_of_scenarios() -> None:
    groups = (Group("chat_a", ("prefill_0",), ("decode_0",)),)
    deployment = Deployment("m", (SERVER,), scenarios=(Scenario("chat", groups),))
    assert first_state.assignments(deployment)["decode_0"].group == "chat_a"
