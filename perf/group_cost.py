"""Measures the cost of a request in a gateway as its group grows.

    python -m perf.group_cost [--quick]

Everything is in one process: the scheduler and its KV links, and instances that answer at once over
a channel in memory. So only the gateway's own work is measured, without that of a channel: the CPU
milliseconds of a request of three tokens, the seconds until all planned KV links of a new group are
made, and memory. The group has as many prefills as decodes.
"""

from __future__ import annotations

import asyncio
import random
import time
import tracemalloc
from collections.abc import Callable
from contextlib import aclosing
from typing import Annotated, Literal, get_args

import typer
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from pdserve.config import Decode, Gateway, Prefill
from pdserve.observability.metrics import Registry
from pdserve.rpc import messages
from pdserve.rpc.client import Replies
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.kv_links import KVLinks
from pdserve.scheduling.request import Request
from pdserve.scheduling.scheduler import Scheduler
from pdserve.transfer.reports import NO_TRANSFER, LinkReport
from perf.record import Record

SIZES = (2, 32, 500, 1000, 2000)
"""Numbers of instances, prefills and decodes together."""
REQUESTS, QUICK_REQUESTS, ROUNDS = 2000, 300, 5
PROMPT = bytes(4 * 128)
SLOTS = 8
LINKED_S = 60.0
State = Literal["idle", "half full", "half busy"]
"""All instances are idle; this gateway has filled half of them; other gateways have."""
ROOM = messages.Room(SLOTS, 1 << 12)
console = Console()


class Memory:
    """A channel to an instance that answers at once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.busy = False
        self.refuses = False
        """True if it refuses all links."""

    def open(self, call: str, request: messages.Request) -> Replies:
        replies = Replies(call)
        for reply in self._replies(request):
            replies.put(reply)
        return replies

    def _replies(self, request: messages.Request) -> list[messages.Reply]:
        match request:
            case messages.Describe():
                return [messages.Described(self.name.encode())]
            case messages.Connect() if self.refuses:
                return [messages.Failed("INTERNAL", f"{self.name} reaches nothing")]
            case messages.Connect(endpoint=prefill):
                link = LinkReport("shm", "", 1e-6, 4e9, {}, fallback=False)
                return [messages.Connected(prefill.decode(), link, 46080, ROOM)]
            case messages.PrefillRequest() | messages.DecodeRequest() if self.busy:
                return [messages.Busy("slots")]
            case messages.PrefillRequest():
                return [messages.Prefilled(7, False, b"handle", 0, 1.0)]
            case messages.DecodeRequest():
                tokens = bytes(8)
                return [messages.Tokens(1, tokens, "length", NO_TRANSFER, ROOM)]
            case _:
                return []

    def forget(self, call: str) -> None:
        """Do nothing: no call is kept."""

    def lose(self, epoch: bytes) -> None:
        """Do nothing: the instance is never lost."""

    async def close(self) -> None:
        """Do nothing: there is no connection."""


class Cost(Struct):
    """The costs of one size of a group."""

    instances: int
    request_ms: dict[State, float]
    """CPU time; the median of ROUNDS rounds."""
    links: int
    usable_s: float
    """Seconds from its creation until all its planned links are made."""
    mib: float
    """Memory that Python allocated for all of it."""


class Site:
    """A gateway's group of one size.

    Args:
        channel: makes the channel to an instance of this name.
    """

    def __init__(self, instances: int, channel: Callable[[str], Memory] = Memory) -> None:
        half = instances // 2
        self.channels = [channel(f"prefill_{i}") for i in range(half)]
        self.channels += [channel(f"decode_{i}") for i in range(half)]
        every = [Instance(one.name, one) for one in self.channels]
        self.prefills, self.decodes = every[:half], every[half:]
        metrics = Registry()
        self.links = KVLinks(self.prefills, self.decodes, None, "scheduler", metrics)
        self.scheduler = Scheduler(
            self.prefills,
            self.decodes,
            self.links,
            metrics,
            gateway=Gateway(),
            prefill=Prefill(slots=SLOTS),
            decode=Decode(slots=SLOTS),
            rng=random.Random(1),
        )
        self._served = 0

    async def linked(self) -> float:
        """Make the planned links, and return the seconds that it took."""
        began = time.monotonic()
        running = asyncio.create_task(self.links.run())
        while self.links.table.counts()["unknown"]:
            assert time.monotonic() < began + LINKED_S
            await asyncio.sleep(0.01)
        took = time.monotonic() - began
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return took

    async def serve(self) -> None:
        self._served += 1
        request = Request(id=f"{self._served}", prompt=PROMPT, max_tokens=3)
        async with aclosing(self.scheduler.run(request)) as chunks:
            async for _ in chunks:
                pass
        assert request.output_tokens == 3

    def put(self, state: State) -> None:
        """Put every second instance into a state."""
        for channel, instance in zip(self.channels, (*self.prefills, *self.decodes), strict=True):
            odd = int(channel.name.rpartition("_")[2]) % 2 == 1
            channel.busy = odd and state == "half busy"
            instance.load.add((SLOTS if odd and state == "half full" else 0) - instance.load.open)


async def measure(instances: int, requests: int) -> Cost:
    """Build a group and send it requests, one after another, in each state."""
    tracemalloc.start()
    site = Site(instances)
    await site.linked()
    mib = tracemalloc.get_traced_memory()[0] / 2**20
    tracemalloc.stop()
    usable_s = await Site(instances).linked()
    costs = {}
    for state in get_args(State):
        site.put(state)
        rounds = []
        for _ in range(ROUNDS):
            began = time.process_time()
            for _ in range(requests // ROUNDS):
                await site.serve()
            rounds.append((time.process_time() - began) / (requests // ROUNDS) * 1e3)
        costs[state] = round(sorted(rounds)[ROUNDS // 2], 4)
    return Cost(instances, costs, len(site.links.table), round(usable_s, 3), round(mib, 1))


def table(costs: list[Cost]) -> Table:
    """Return a table of the costs, and their ratios to those of the smallest group."""
    made = Table("instances", *(f"{state}: ms" for state in get_args(State)), "links", "usable: s")
    made.add_column("MiB")
    for cost in costs:
        first = costs[0].request_ms
        times = [f"{ms:.3f} ({ms / first[state]:.2f} x)" for state, ms in cost.request_ms.items()]
        made.add_row(
            f"{cost.instances}", *times, f"{cost.links}", f"{cost.usable_s}", f"{cost.mib}"
        )
    return made


def main(quick: Annotated[bool, typer.Option("--quick", help="few requests")] = False) -> None:
    """Measure the cost of a request in a gateway as its group grows."""
    record = Record("group_cost-quick" if quick else "group_cost")
    costs = []
    for size in SIZES:
        console.print(f"{size} instances", style="dim")
        costs.append(asyncio.run(measure(size, QUICK_REQUESTS if quick else REQUESTS)))
    console.print(table(costs))
    console.print(f"{record.write(costs)}")


if __name__ == "__main__":
    typer.run(main)
