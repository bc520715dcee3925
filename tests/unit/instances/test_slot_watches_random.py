"""Tests that no wake-up is lost when gateways offer, watch, stop and give up at random moments."""

from __future__ import annotations

import asyncio
import functools
import random
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from pdserve.instances.prefill import LOOK_S
from pdserve.instances.slot_watches import RESERVED_S, SlotWatches
from pdserve.rpc.messages import Busy, Freed, Prefilled, PrefillRequest, Released, Reply, Watch
from pdserve.sampling import Sampling
from tests.unit.inprocess import Site, virtual

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pdserve.instances.protocol import Send

# How often the test checks.
GLANCE_S = 1e-4


@dataclass
class Gateway:
    """A gateway that offers, and when it is refused, watches and offers again."""

    site: Site
    name: str
    rng: random.Random
    late: float = 0.05
    """The probability that it reacts so late to a notification that another gets the slot."""
    served: int = 0
    offers: int = 0

    async def serve(self, requests: int) -> None:
        for number in range(requests):
            call = f"{self.name} {number}"
            while (reply := await self.ask(self.offer(call))) == Busy("slots"):
                assert await self.ask(self.watch(call)) == Freed()
                if self.rng.random() < self.late:
                    await asyncio.sleep(2 * RESERVED_S)
            assert isinstance(reply, Prefilled)
            await asyncio.sleep(self.rng.uniform(0, 0.004))
            assert await self.ask(functools.partial(self.site.p[0].release, call)) == Released()
            self.served += 1

    async def ask(self, submit: Callable[[Send], None]) -> Reply:
        """Return the last reply."""
        heard: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        submit(lambda reply, last: heard.set_result(reply) if last and not heard.done() else None)
        return await heard

    def offer(self, call: str) -> Callable[[Send], None]:
        self.offers += 1
        prompt = self.site.prompt(20)
        request = PrefillRequest(call, prompt, Sampling(), "", 60_000.0, gateway=self.name)
        return functools.partial(self.site.p[0].submit, request)

    def watch(self, call: str) -> Callable[[Send], None]:
        return functools.partial(self.site.p[0].watch, Watch(f"{call} watch", self.name), self.name)


@virtual
@pytest.mark.parametrize("seed", range(8))
async def test_no_slot_is_idle_while_somebody_waits(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    profile = {"prefill": {"base_ms": rng.choice([0.5, 5.0, 20.0])}}
    async with Site(tmp_path, profile=profile, prefill={"slots": rng.randint(1, 3)}) as site:
        prefill, loop = site.p[0], asyncio.get_running_loop()
        gateways = [Gateway(site, name, rng) for name in "abcdef"[: rng.randint(2, 6)]]
        served = asyncio.gather(*(gateway.serve(25) for gateway in gateways))
        since, longest = loop.time(), 0.0
        while not served.done():
            idle = prefill._slots.free() - len(prefill._slots.watches.kept)
            if idle <= 0 or not prefill._slots.watches:
                since = loop.time()
            longest = max(longest, loop.time() - since)
            await asyncio.sleep(GLANCE_S)
        await served
        assert longest <= LOOK_S + 2 * GLANCE_S
        await site.idle()


@virtual
async def test_gateway_that_offers_often_gets_no_more(tmp_path: Path) -> None:
    """Four gateways share a prefill; the first offers seven requests at a time without waiting."""
    async with Site(tmp_path, profile={"prefill": {"base_ms": 10.0}}, prefill={"slots": 1}) as site:
        rng = random.Random(1)
        gateways = [Gateway(site, name, rng, late=0.0) for name in "abcd"]
        impatient = gateways[0]

        async def insist(number: int) -> None:
            while True:
                call = f"{number} {impatient.offers}"
                if isinstance(await impatient.ask(impatient.offer(call)), Prefilled):
                    await asyncio.sleep(rng.uniform(0, 0.004))
                    site.p[0].release(call, lambda *_: None)
                    impatient.served += 1
                await asyncio.sleep(0.001)

        tasks = [asyncio.create_task(gateway.serve(10_000)) for gateway in gateways]
        tasks += [asyncio.create_task(insist(number)) for number in range(6)]
        await asyncio.sleep(10)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        served = [gateway.served for gateway in gateways]
        assert min(served) > 0.95 * sum(served) / 4, served
        assert sum(served) > 0.85 * 10 / 0.012, "and the prefill was busy all the time"


def test_any_history_of_a_line() -> None:
    """Each watch ends once and in turn, and a free slot is either kept or wanted by no gateway."""
    for seed in range(300):
        rng = random.Random(seed)
        watches, ended, line = SlotWatches(), Counter[str](), list[str]()
        now, free = 0.0, 2

        def hear(call: str, ended: Counter[str], reply: Reply, last: bool) -> None:
            assert last
            ended[call] += 1

        for number in range(60):
            now += rng.uniform(0, 0.01)
            gateway = rng.choice("abc")
            match rng.randrange(4):
                case 0:
                    call = f"{gateway}{number}"
                    former = [one for one in line if one[0] == gateway]
                    line = [call if one in former else one for one in line]
                    line += [] if former else [call]
                    watches.add(Watch(call, gateway), gateway, functools.partial(hear, call, ended))
                    assert [ended[one] for one in former] == [1] * len(former)
                case 1 if watches.admits(gateway, free):
                    watches.took(gateway)
                    free -= 1
                case 2:
                    free = min(free + 1, 2)
                case 3 if line:
                    gone = line.pop(rng.randrange(len(line)))
                    watches.release(gone)
                    assert ended[gone] == 1
            watches.tell(free, now)
            told = [one for one in line if ended[one]]
            assert told == line[: len(told)]
            line = line[len(told) :]
            assert len(watches) == len(line)
            assert not line or free == len(watches.kept)
            assert len(watches.kept) <= free
            assert set(ended.values()) <= {1}
