"""Measures whether arriving KV caches disturb running decode streams.

    python -m perf.arrivals [--quick]

One prefill, one decode, emulated compute, real KV bytes. Streams decode during the whole
measurement; in every second phase, prompts of 1,000 tokens (45 MB each) arrive at the same decode,
at a steady rate. The measured value is the time between two responses of the streams, which carry
one token each.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Annotated, Literal

import grpc.aio
import msgspec
import numpy as np
import typer
from msgspec import Struct
from rich.console import Console

from pdserve import config
from pdserve.connections import GRPC_OPTIONS
from perf import budgets
from perf.budgets import Budget
from perf.client import message, one_stream
from perf.prompts import prompts
from perf.record import Record
from perf.serving import deployment, serving

STREAMS = 8
ARRIVALS_PER_S = 4.0
ARRIVING_TOKENS = 1000
# Seconds until the first answers' text has come and the batch has formed.
SETTLE_S = 1.0
console = Console()


class Phase(Struct):
    """Times between two responses of the streams, in milliseconds."""

    arrivals: int
    mib_arrived: float
    p50: float
    p99: float
    most: float


async def _phase(address: str, seconds: float, arriving: bool, seed: int) -> Phase:
    async with grpc.aio.insecure_channel(address, options=GRPC_OPTIONS) as channel:
        tokens = int((seconds + SETTLE_S) * 50)
        texts = prompts(STREAMS, 64, seed)
        streams = [
            asyncio.create_task(
                one_stream(channel, [message("pdserve", f"s{seed}-{n}", text, tokens, True)])
            )
            for n, text in enumerate(texts)
        ]
        await asyncio.sleep(SETTLE_S)
        began = time.perf_counter()
        arrivals = []
        if arriving:
            for n, text in enumerate(prompts(int(seconds * ARRIVALS_PER_S), ARRIVING_TOKENS, seed)):
                await asyncio.sleep(began + n / ARRIVALS_PER_S - time.perf_counter())
                request = message("pdserve", f"a{seed}-{n}", text, 2, False)
                arrivals.append(asyncio.create_task(one_stream(channel, [request])))
        await asyncio.sleep(began + seconds - time.perf_counter())
        ended = time.perf_counter()
        await asyncio.gather(*arrivals)
        answers = [answer for task in streams for answer in await task]
    gaps = [
        (after - before) * 1e3
        for answer in answers
        for before, after in zip(answer.responses, answer.responses[1:], strict=False)
        if before >= began and after <= ended
    ]
    mib = len(arrivals) * ARRIVING_TOKENS * 46080 / 2**20
    p50, p99, most = (round(float(value), 2) for value in np.percentile(gaps, [50, 99, 100]))
    return Phase(len(arrivals), round(mib), p50, p99, most)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="short phases")] = False,
) -> None:
    """Measure whether arriving KV caches disturb running decode streams."""
    record = Record("arrivals-quick" if quick else "arrivals")
    seconds, turns = (3.0, 1) if quick else (10.0, 4)
    made = deployment("kv_45kib", each=1, arena_mib=1024)
    # One response per token, since the decode's steps are measured.
    decode = config.Decode(blocks=4096, response_cost_ms=0.0)
    made = msgspec.structs.replace(made, decode=decode)
    phases: dict[Literal["without", "with"], list[Phase]] = {"without": [], "with": []}
    with serving(made) as server:
        asyncio.run(_phase(server.grpc, 2.0, True, 99))
        for turn in range(turns):
            for n, name in enumerate(phases):
                with console.status(f"{name} arrivals, {turn + 1} of {turns}"):
                    phase = _phase(server.grpc, seconds, name == "with", 2 * turn + n)
                    phases[name].append(asyncio.run(phase))
    p99 = {name: statistics.median(p.p99 for p in some) for name, some in phases.items()}
    limit = Budget(
        f"ITL p99 with {ARRIVALS_PER_S:g} arrivals of {ARRIVING_TOKENS} tokens a second",
        round(p99["with"] / p99["without"], 3),
        "x",
        "at most",
        1.2,
    )
    console.print(phases)
    console.print(budgets.table([limit]))
    console.print(record.write({"budgets": [limit], "phases": phases}))


if __name__ == "__main__":
    typer.run(main)
