"""Sends many short requests, and measures what they leave behind in the server's processes.

    python -m perf.soak [--requests 20000] [--seconds 300]

Prompts and answers have 1 to 4 tokens from the emulated engine; streams and single responses are
mixed, and one request in a hundred is cancelled at a random moment. After the warm-up and at the
end, with no request open, memory, file descriptors and shared memory are compared. Then follows
load without a gap for ``--seconds`` (`perf.steady`), and the growth of every process per 1,000
responses is bounded.

The prefills' arenas are small, so that the warm-up touches all of them: a page of an arena counts
for every process that has touched it, and would be taken for growth until the last page has been.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated

import grpc.aio
import typer
from msgspec import Struct
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tritonclient.grpc import service_pb2, service_pb2_grpc

from pdserve.connections import GRPC_OPTIONS
from perf import budgets, client, processes, steady
from perf.budgets import Budget
from perf.processes import Usage
from perf.prompts import prompts
from perf.record import Record
from perf.serving import MeasuredServer, deployment, serving

WARM_UP = 2_000
ARENA_MIB = 2
WORKERS = 16
MAX_TOKENS = 4
CANCELLED = 0.01
CANCEL_WITHIN_S = 0.05
SETTLE_S = 5.0
GROWTH = 5.0
STEADY_WARM_S = 20.0
console = Console()


class Snapshot(Struct):
    """The resources that the server holds while it is idle."""

    requests: int
    processes: dict[str, Usage]
    shared_memory_kib: int


def snapshot(server: MeasuredServer, requests: int) -> Snapshot:
    time.sleep(SETTLE_S)
    return Snapshot(requests, processes.usage(server), processes.shared_memory_kib(server))


async def put_load(address: str, requests: int, seed: int, progress: Progress) -> int:
    """Send the requests; return how many were cancelled.

    Raises:
        RuntimeError: the server answered with an error.
    """
    rng = random.Random(seed)
    task = progress.add_task(f"{requests} requests", total=requests)
    connection = grpc.aio.insecure_channel(address, options=GRPC_OPTIONS)
    numbers = iter(range(requests))
    cancelled = await asyncio.gather(
        *(_work(connection, numbers, rng, lambda: progress.advance(task)) for _ in range(WORKERS))
    )
    await connection.close()
    return sum(cancelled)


async def _work(
    connection: grpc.aio.Channel,
    numbers: Iterator[int],
    rng: random.Random,
    done: Callable[[], None],
) -> int:
    """Serve numbers until there are none: one stream for many requests, one for each cancelled."""
    cancelled = 0
    call: _Call | None = None
    for number in numbers:
        (text,) = prompts(1, rng.randint(1, MAX_TOKENS), rng.getrandbits(32))
        request = client.message(
            "pdserve", str(number), text, rng.randint(1, MAX_TOKENS), rng.random() < 0.5
        )
        call = call or _Call(connection)
        call.send(request)
        if rng.random() < CANCELLED:
            await asyncio.sleep(rng.uniform(0, CANCEL_WITHIN_S))
            call.cancel()
            call = None
            cancelled += 1
        else:
            await call.answered()
        done()
    if call:
        call.cancel()
    return cancelled


class _Call:
    """An open gRPC stream."""

    def __init__(self, connection: grpc.aio.Channel) -> None:
        self._outgoing: asyncio.Queue[service_pb2.ModelInferRequest] = asyncio.Queue()
        stub = service_pb2_grpc.GRPCInferenceServiceStub(connection)
        self._call = stub.ModelStreamInfer(self._requests())

    async def _requests(self) -> AsyncIterator[service_pb2.ModelInferRequest]:
        while True:
            yield await self._outgoing.get()

    def send(self, request: service_pb2.ModelInferRequest) -> None:
        self._outgoing.put_nowait(request)

    async def answered(self) -> None:
        """Read up to the last response of the request that was sent."""
        async for reply in self._call:
            if reply.error_message:
                raise RuntimeError(reply.error_message)
            if client.output_tokens(reply.infer_response) is not None:
                return

    def cancel(self) -> None:
        self._call.cancel()


def growth(before: Snapshot, after: Snapshot) -> list[Budget]:
    """Return the percent of growth, the worst process first."""

    def budget(what: str, old: int, new: int) -> Budget:
        percent = round((new / old - 1) * 100, 2) if old else 100.0 * new
        return Budget(f"{what}: {old} to {new}", percent, "%", "at most", GROWTH)

    grown = [budget("/dev/shm KiB", before.shared_memory_kib, after.shared_memory_kib)]
    for name, old in before.processes.items():
        new = after.processes[name]
        grown.append(budget(f"{name} RSS KiB", old.rss_kib, new.rss_kib))
        grown.append(budget(f"{name} PSS KiB", old.pss_kib, new.pss_kib))
        grown.append(budget(f"{name} descriptors", old.descriptors, new.descriptors))
    return sorted(grown, key=lambda one: -one.measured)


def show(snapshots: list[Snapshot]) -> None:
    """Print the RSS in MiB and the descriptors of each process over time."""
    table = Table("after requests", *(f"{one.requests}" for one in snapshots))
    for name in snapshots[0].processes:
        cells = [one.processes[name] for one in snapshots]
        table.add_row(name, *(f"{one.rss_kib / 1024:.1f} / {one.descriptors}" for one in cells))
    table.add_row("/dev/shm MiB", *(f"{one.shared_memory_kib / 1024:.1f}" for one in snapshots))
    console.print("RSS MiB / file descriptors")
    console.print(table)


def run(requests: int, seconds: float) -> list[Budget]:
    """Soak, show, and write ``perf/results/soak.json``."""
    record = Record("soak")
    step = max((requests - WARM_UP) // 4, 1)
    with (
        serving(deployment("instant", arena_mib=ARENA_MIB)) as server,
        Progress(console=console) as progress,
    ):
        snapshots, made, cancelled = [], 0, 0
        while made < requests:
            count = WARM_UP if made == 0 else min(step, requests - made)
            cancelled += asyncio.run(put_load(server.grpc, count, made, progress))
            made += count
            snapshots.append(snapshot(server, made))
    with serving(deployment("token_10ms", arena_mib=ARENA_MIB)) as server:
        without_gap = steady.grown(server, STEADY_WARM_S, seconds)
    grown = growth(snapshots[0], snapshots[-1])
    show(snapshots)
    console.print(budgets.table(grown[:10]))
    console.print(budgets.table(without_gap.budgets()))
    grown += without_gap.budgets()
    results = {
        "cancelled": cancelled,
        "budgets": grown,
        "snapshots": snapshots,
        "without_gap": without_gap,
    }
    console.print(record.write(results))
    return grown


def main(
    requests: Annotated[int, typer.Option(help=f"{WARM_UP} of them are the warm-up")] = 20_000,
    seconds: Annotated[float, typer.Option(help="of load without a gap")] = 300.0,
) -> None:
    """Send many short requests, and measure what they leave behind in the server's processes."""
    run(requests, seconds)


if __name__ == "__main__":
    typer.run(main)
