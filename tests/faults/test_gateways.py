"""Tests for a gateway that dies: its clients get an error, others continue, it comes back."""

from __future__ import annotations

import time
from contextlib import ExitStack

import pytest

from tests.clients import Refused, wait_until
from tests.faults.load import Load
from tests.faults.serving import (
    FAULTS,
    RESTARTED_S,
    Fault,
    gateways,
    on_this_machine,
    serves,
)
from tests.servers import Running

pytestmark = [pytest.mark.triton, pytest.mark.alone]

ENDED_S = 2.0
"""Time from the death of a gateway to the end of its streams, with an error."""
BACK_S = 5.0
LOAD_S = 2.0


def serves_now(server: Running) -> bool:
    try:
        return serves(server)
    except (OSError, Refused):
        return False


def break_gateway(running: Running, fault: Fault, back_s: float, number: int = 0) -> list[Load]:
    """Break one gateway under load on all of them; return the loads of the others.

    Its streams end with an error in time, and it serves again in time.
    """
    server = [server for server in running.servers if server.spec.gateway][number]
    others = gateways(running)
    first = others.pop(number)
    with ExitStack() as stack:
        loads = [
            stack.enter_context(Load(one, rate=2, tokens=100, seed=seed))
            for seed, one in enumerate((first, *others))
        ]
        time.sleep(LOAD_S)
        struck = time.monotonic()
        fault.hit(server, "scheduler")
        time.sleep(ENDED_S)
        limit_s = on_this_machine(back_s)
        wait_until(lambda: serves_now(first), limit_s)
        back = time.monotonic() - struck
    theirs = loads[0].open_at(struck)
    after = max(one.ended for one in theirs) - struck
    print(
        f"\n{fault}: {len(theirs)} streams of the gateway ended after {after:.2f} s, it served "
        f"again after {back:.2f} s; longest gap elsewhere "
        f"{max((load.gap for load in loads[1:]), default=0.0):.2f} s"
    )
    assert sum(one.error is not None for one in theirs) >= 2
    assert all(one.error or len(one.ids) == one.wanted for one in theirs)
    assert after < ENDED_S
    assert back < limit_s
    assert not loads[0].wrong
    return loads[1:]


@pytest.mark.parametrize("number", [0])
@pytest.mark.parametrize("fault", [Fault("stub", "kill")], ids=str)
def test_a_dead_gateway_among_others(workers: Running, fault: Fault, number: int) -> None:
    others = break_gateway(workers, fault, BACK_S, number)
    for load in others:
        assert not load.lost
        assert not load.wrong
        assert load.gap < 1


@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_dead_gateway_among_others_again_and_again(workers: Running, fault: Fault) -> None:
    """Gateways fail in turn, so that each has run for a while and is repaired without a pause."""
    for number in range(50):
        test_a_dead_gateway_among_others(workers, fault, number % 2)
        time.sleep(3)


def test_a_dead_gateway_in_the_only_server(one_server: Running) -> None:
    break_gateway(one_server, Fault("stub", "kill"), RESTARTED_S)
