"""Whatever happens, and whoever decides: what is decided keeps its promises and comes to rest."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.control.advance import MOVE_WRITES
from pdserve.control.decide import MOST_WRITES
from pdserve.control.memory import Memory
from pdserve.control.policy import Tide
from pdserve.control.records import PINS, Phase, Pin
from pdserve.control.transaction import Step, Transaction
from tests.unit.control.fleets import GROUP, Fleet
from tests.unit.control.test_tide import NIGHT

if TYPE_CHECKING:
    from collections.abc import Callable


def fail(fleet: Fleet, rng: random.Random) -> None:
    name = rng.choice(list(fleet.seen))
    if fleet.desired(name).state != "absent":
        fleet.observe(name, state="failed", phase=Phase.UNASSIGNED, reason="killed")
        fleet.facts[name] = {"failed_since": fleet.now}


def lose_host(fleet: Fleet, rng: random.Random) -> None:
    name = rng.choice(list(fleet.seen))
    fleet.facts[name] = {"agent": False, "silent_since": fleet.now}


def lose_agents(fleet: Fleet, rng: random.Random) -> None:
    """An etcd that was stopped has deleted every lease; probes are answered."""
    for name in fleet.seen:
        fleet.facts.setdefault(name, {"agent": False})


def mend(fleet: Fleet, rng: random.Random) -> None:
    for name in list(fleet.facts):
        fleet.facts.pop(name)
        fleet.obey(name)


def drain(fleet: Fleet, rng: random.Random) -> None:
    fleet.facts.setdefault(rng.choice(list(fleet.seen)), {"drain": True})


def obey_some(fleet: Fleet, rng: random.Random) -> None:
    for name in rng.sample(list(fleet.seen), 5):
        if name not in fleet.facts:
            fleet.obey(name)


def empty_slowly(fleet: Fleet, rng: random.Random) -> None:
    for name in fleet.seen:
        if fleet.desired(name).state == "draining" and name not in fleet.facts:
            fleet.observe(name, phase=Phase.DRAINING)


def restart_controller(fleet: Fleet, rng: random.Random) -> None:
    fleet.memory = Memory()


def fail_to_write(fleet: Fleet, rng: random.Random) -> None:
    store = dict(fleet.store)
    fleet.decide()
    fleet.store = store


def pin(fleet: Fleet, rng: random.Random) -> None:
    prefills = rng.randrange(2, 8)
    fleet.store[PINS + GROUP] = Pin(prefills, 10 - prefills)


def work(fleet: Fleet, rng: random.Random) -> None:
    fleet.store.pop(PINS + GROUP, None)
    rates = rng.choice([(6.0, 7.0), (3.0, 12.0), (12.0, 3.0)])
    for _ in range(14):
        fleet.work(*rates)
        fleet.decide(5)


def wait(fleet: Fleet, rng: random.Random) -> None:
    fleet.now += rng.choice([1, 10, 50, 200, 40_000])


ACTIONS: list[Callable[[Fleet, random.Random], None]] = [
    fail,
    lose_host,
    lose_agents,
    mend,
    drain,
    obey_some,
    obey_some,
    empty_slowly,
    restart_controller,
    fail_to_write,
    pin,
    work,
    wait,
]


def promises(fleet: Fleet, numbers: dict[str, int]) -> None:
    """Check what holds after every decision."""
    for name in fleet.seen:
        number = fleet.desired(name).assignment.number
        assert number >= numbers[name], "a number only grows"
        numbers[name] = number
    moving = [
        move.instance
        for record in fleet.store.values()
        if isinstance(record, Transaction)
        for move in record.moves
        if not move.step.over
    ]
    assert len(moving) == len(set(moving)), "one transaction moves an instance"
    for record in fleet.store.values():
        if isinstance(record, Transaction):
            for move in record.moves:
                if move.step is Step.DRAIN:
                    wanted = fleet.desired(move.instance)
                    assert (wanted.state, wanted.assignment) == ("draining", move.was.assignment)
                if move.step in (Step.START, Step.CHANGE):
                    assert fleet.desired(move.instance) == move.to


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1 << 32), actions=st.lists(st.sampled_from(ACTIONS), max_size=40))
def test_it_comes_to_rest_in_a_state_that_another_controller_would_choose_again(
    seed: int, actions: list[Callable[[Fleet, random.Random], None]]
) -> None:
    rng = random.Random(seed)
    fleet = Fleet(5, 5, 1, 1, tides=(Tide(GROUP, "training", (NIGHT,), decodes=1),))
    numbers = dict.fromkeys(fleet.seen, 1)
    for act in actions:
        act(fleet, rng)
        fleet.decide(rng.choice([0.2, 1, 5]))
        promises(fleet, numbers)
    noon = 86_400 * (fleet.now // 86_400 + 1) + 43_200
    fleet.now = noon
    fleet.store.pop(PINS + GROUP, None)
    fleet.group["load"] = None
    fleet.facts.clear()
    for _ in range(60):
        fleet.obey()
        fleet.decide(10)
        promises(fleet, numbers)
    assert not any(isinstance(record, Transaction) for record in fleet.store.values())
    assert sum(fleet.roles()) == 10, "nobody has been lost from the group, or was added to it"
    assert min(fleet.roles()) >= 1
    fleet.memory = Memory()
    assert not fleet.decide(5).writes
    assert all(member.serving or not member.group for member in fleet.cluster().members.values())


@pytest.mark.parametrize("instances", [100, 200])
def test_a_write_has_a_bounded_size(instances: int) -> None:
    """A store takes 128 operations; a group that leaves has more members than that."""
    fleet = Fleet(instances // 2, instances // 2, tides=(Tide(GROUP, "training", (NIGHT,)),))
    fleet.now += 10 * 3600
    for _ in range(40):
        assert len(fleet.decide(1).writes) <= MOST_WRITES
        fleet.obey()
    assert fleet.roles() == (0, 0)
    assert MOVE_WRITES < MOST_WRITES
