"""Tests for several gateways over the same instances, with nothing shared: each gets its share."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from pdserve import errors
from pdserve.instances.slot_watches import RESERVED_S
from pdserve.rpc.messages import PrefillRequest
from pdserve.scheduling.request import State
from tests.unit.fake_instances import LATENCY_S, FakeInstance, Gateway, rejections
from tests.unit.inprocess import Site, virtual

if TYPE_CHECKING:
    from pathlib import Path

    from pdserve.scheduling.request import Request

# Two prefills of 4 slots.
SLOTS, HOLD_S = 8, 0.1
CAPACITY = SLOTS / HOLD_S


async def offered(
    gateways: list[Gateway], rates: list[float], seconds: float
) -> list[list[Request]]:
    """Send requests to each gateway at these Poisson rates, each with a limit of 0.3 s."""
    rng = random.Random(1)
    requests: list[list[Request]] = [[] for _ in gateways]
    tasks = []
    ends = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < ends:
        [number] = rng.choices(range(len(gateways)), rates)
        requests[number].append(gateways[number].request(ttft_limit_s=0.3))
        tasks.append(gateways[number].start(requests[number][-1]))
        await asyncio.sleep(rng.expovariate(sum(rates)))
    await asyncio.wait(tasks)
    return requests


@pytest.mark.parametrize("count", [2, 4])
@virtual
async def test_each_gets_its_part_of_what_is_too_little(count: int) -> None:
    """TensorRT-LLM#19399, agentic-pd-hybrid ef4dc81: balanced and bounded at 150 % load."""
    fakes = [FakeInstance(4), FakeInstance(4)]
    gateways = [Gateway(fakes, seed, HOLD_S) for seed in range(count)]
    requests = await offered(gateways, [1.5 * CAPACITY / count] * count, 30.0)
    served = [len(gateway.served) for gateway in gateways]
    success = [len(g.served) / len(r) for g, r in zip(gateways, requests, strict=True)]
    mean = sum(served) / sum(map(len, requests))
    assert sum(served) > 0.97 * CAPACITY * 30, "and no slot is idle"
    assert min(success) > 0.95 * mean, success
    refused = sum(map(rejections, requests))
    assert refused < 4 * sum(served), refused / sum(served)


@virtual
async def test_one_that_asks_for_more_does_not_get_the_others_part() -> None:
    """Gateways take turns, so one that asks for less than its share gets all that it asks for."""
    fakes = [FakeInstance(4), FakeInstance(4)]
    gateways = [Gateway(fakes, seed, HOLD_S) for seed in range(3)]
    requests = await offered(gateways, [CAPACITY * 3, CAPACITY / 5, CAPACITY / 5], 20.0)
    success = [len(g.served) / len(r) for g, r in zip(gateways, requests, strict=True)]
    assert min(success[1:]) > 0.95, success
    assert len(gateways[0].served) > 0.9 * CAPACITY * 20 * 3 / 5


@virtual
async def test_who_has_watched_the_longest_is_told_first() -> None:
    fake = FakeInstance(1)
    fake.fill()
    gateways = [Gateway([fake], seed, hold_s=0.01) for seed in range(4)]
    order = [2, 0, 3, 1]
    tasks = []
    for number in order:
        tasks.append(gateways[number].start(gateways[number].request()))
        await asyncio.sleep(0.01)
    fake.free()
    await asyncio.gather(*tasks)
    served = sorted(range(4), key=lambda number: gateways[number].served[0].forwarded)
    assert served == order


@virtual
async def test_a_newcomer_does_not_overtake_a_gateway_that_waits() -> None:
    """A slot that becomes free is kept for the watching gateway, though another asks first."""
    fake = FakeInstance(1)
    fake.fill()
    waits, comes = Gateway([fake], 0), Gateway([fake], 1)
    first = waits.start(waits.request())
    await asyncio.sleep(0.01)
    fake.free()
    second = comes.start(comes.request())
    await asyncio.sleep(10 * LATENCY_S)
    assert (len(waits.served), len(comes.served)) == (1, 0)
    assert await first
    assert await second


@virtual
async def test_one_that_is_gone_costs_a_moment() -> None:
    """A slot that is kept for a gateway that does not come is given to the next one."""
    fake = FakeInstance(1)
    fake.fill()
    gone, other = Gateway([fake], 0), Gateway([fake], 1)
    lost = gone.start(gone.request())
    await asyncio.sleep(0.01)
    task = other.start(other.request())
    await asyncio.sleep(0.01)
    fake.lose = lambda message: isinstance(message, PrefillRequest) and message.gateway == gone.name
    fake.free()
    await asyncio.sleep(RESERVED_S)
    fake._look()  # as an instance does every millisecond while it is watched
    await asyncio.sleep(6 * LATENCY_S)
    assert len(other.served) == 1
    assert await task
    lost.cancel()


@virtual
async def test_while_there_is_room_few_are_refused() -> None:
    """The instances that other gateways have filled are not known, but refusals are remembered.

    An instance that has refused comes last. With the same order for all gateways, a request would
    be refused by 40 of these instances before it found room.
    """
    fakes = [FakeInstance(1) for _ in range(200)]
    gateways = [Gateway(fakes, seed, hold_s=1.0) for seed in range(4)]
    requests = await offered(gateways, [0.8 * 200 / 4] * 4, 10.0)
    everybody = [one for asked in requests for one in asked]
    assert len([one for one in everybody if one.forwarded]) > 0.99 * len(everybody)
    assert rejections(everybody) < 2 * len(everybody)


@virtual
async def test_four_over_real_prefills(tmp_path: Path) -> None:
    """The same at 150 % load with leases, hand-over and decodes."""
    rng = random.Random(2)
    async with Site(
        tmp_path,
        prefills=2,
        decodes=2,
        profile={"prefill": {"base_ms": 20.0}, "decode": {"base_ms": 2.0}},
        prefill={"slots": 1},
    ) as site:
        sites = [site, *(site.beside() for _ in range(3))]
        requests: list[list[Request]] = [[] for _ in sites]
        tasks = []
        for _ in range(1200):
            number = rng.randrange(4)
            request = sites[number].request(ttft_limit_s=0.2, max_tokens=2, stream=False)
            requests[number].append(request)
            tasks.append(sites[number].start(request))
            await asyncio.sleep(rng.expovariate(1.5 * 2 / 0.02))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(one) for one in results} == {list, errors.Late}
        served = [sum(one.state is State.FINISHED for one in asked) for asked in requests]
        assert sum(served) > 0.95 * 1200 / 1.5
        assert min(served) > 0.95 * sum(served) / 4, served
        rejected = sum(one.total("pdserve_prefill_rejections_total") for one in sites)
        assert rejected < 4 * sum(served), rejected / sum(served)
        await site.idle()
