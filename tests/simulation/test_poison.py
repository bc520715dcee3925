"""A request that ends each instance which computes it ends two, and no other request is lost."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from pdserve import config, errors
from pdserve.scheduling import scheduler, suspicion
from pdserve.scheduling.request import State
from tests.simulation import faults
from tests.simulation.endings import POISON
from tests.simulation.faults import Fault
from tests.simulation.invariants import Broken
from tests.simulation.layouts import Names, whole
from tests.simulation.plan import Plan, draw
from tests.simulation.workers import Workers
from tests.simulation.world import World, simulate

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.simulation.channels import Worker

STREAMS = 64
REPAIRED_S = 0.5


def plan(seed: int) -> Plan:
    """Plan 64 requests at once, half of which are at their first tokens when the poison comes."""
    drawn = draw(seed)
    fields = {"stream": True, "ignore_eos": True, "ttft_limit_ms": 60_000}
    requests = [
        replace(
            drawn.requests[number % len(drawn.requests)],
            number=number,
            at=0.02 * (number % 8),
            gateway=number % 2,
            max_tokens=20,
            fields=fields,
            cancels_after=math.inf,
            leaves_after=0,
            stops_after=0,
            reads_s=0.0,
        )
        for number in range(STREAMS)
    ]
    requests = [replace(one, prompt=one.prompt[: 4 * 60]) for one in requests]
    poison = replace(requests[0], number=STREAMS, at=0.07, prompt=POISON + requests[0].prompt)
    return replace(
        drawn,
        calm=False,
        gateways=2,
        prefills=2,
        decodes=2,
        layouts=(whole(Names(2, 2)),),
        prefill=config.Prefill(slots=16, batch=8, lease_s=10.0),
        decode=config.Decode(slots=64, blocks=1024),
        gateway=config.Gateway(stall_s=4.0),
        arena_bytes=64 * drawn.longest_bytes,
        bytes_per_s=1e8,
        timeout_s=10.0,
        delay_s=2e-4,
        tail=0.0,
        loss=0.0,
        retries=(256.0, 0.2),
        requests=tuple(sorted((*requests, poison), key=lambda one: one.at)),
        faults=(),
    )


class Poisoned:
    """Worlds in which the engines of one role end their process when they get the poison."""

    def __init__(self, role: str) -> None:
        self.ended: list[str] = []
        self._role = role
        self._world: World | None = None

    def live(self, plan: Plan) -> World:
        start, begun = Workers.start, World._begun

        def started(workers: Workers, worker: Worker) -> None:
            start(workers, worker)
            if worker.name.startswith(self._role):
                assert worker.life is not None
                engine: Any = worker.life.instance._engine
                name = "prefill" if self._role == "prefill" else "step"
                setattr(engine, name, self._deadly(getattr(engine, name), worker.name))

        def known(world: World, life: Any) -> None:
            self._world = world
            begun(world, life)

        with (
            mock.patch.object(Workers, "start", started),
            mock.patch.object(World, "_begun", known),
        ):
            return simulate(plan)

    def _deadly(self, works: Callable[[Any], Any], name: str) -> Callable[[Any], Any]:
        async def call(batch: Any) -> Any:
            for one in batch:
                prompt = one.tokens if self._role == "prefill" else one.prompt
                if POISON in prompt.tobytes():
                    loop = asyncio.get_running_loop()
                    loop.call_soon(self._end, name, context=contextvars.Context())
                    await asyncio.sleep(math.inf)
            return await works(batch)

        return call

    def _end(self, name: str) -> None:
        assert self._world is not None
        self.ended.append(name)
        fault = Fault(self._world.loop.time(), "kill", name, lasts=REPAIRED_S)
        self._playing = asyncio.get_running_loop().create_task(faults.play(self._world, fault))


@pytest.fixture(params=["decode", "prefill"])
def poisoned(request: pytest.FixtureRequest) -> Poisoned:
    return Poisoned(request.param)


@pytest.mark.parametrize("seed", range(6))
def test_a_request_that_ends_instances_ends_two(poisoned: Poisoned, seed: int) -> None:
    world = poisoned.live(plan(seed))
    (culprit,) = (one for one in world.clients if POISON in one.asked.prompt)
    assert isinstance(culprit.error, errors.Suspected)
    assert culprit.ended_in is State.FAILED
    assert len(poisoned.ended) == 2
    assert " and ".join(poisoned.ended) in str(culprit.error)
    assert f"request {culprit.request.id} was open on " in str(culprit.error)
    others = [one for one in world.clients if one is not culprit]
    assert len(others) >= STREAMS
    assert {one.ended_in for one in others} == {State.FINISHED}
    assert all(one.heard == one.expected for one in others)
    assert all(one.request.attempts < scheduler.ATTEMPTS for one in others)


def test_the_rule_is_what_bounds_it(poisoned: Poisoned) -> None:
    """Without the rule, the request ends more than two instances."""
    with mock.patch.object(suspicion, "ENDS", 99), contextlib.suppress(Broken):
        poisoned.live(plan(0))
    assert len(poisoned.ended) > 2
