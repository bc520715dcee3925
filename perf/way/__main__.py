"""Traces a prompt to its first token, and a KV cache from its prefill into a decode's pool.

    python -m perf.way [--json]

One request is served in this process: by the gateway's service, its scheduler, a prefill and a
decode, with the emulated engine, shared memory and messages encoded as on the wire. The calls are
printed, module by module with their numbers, with a line for each stretch in one package;
``perf/way/calls.py`` defines what counts. The first trace begins when the gateway takes a prompt
and ends when it yields the first token. The second begins when the prefill's engine is done, with
the hand-over of the KV cache, and ends when the decode's engine is told that its rows are in the
pool.
"""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import aclosing
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from perf.way.calls import Call, Recorder, Way, way
from perf.way.site import Site

WARM, RUNS = 3, 10
"""The first requests find caches empty. Of the others the one with the fewest calls is taken, since
background work, such as the publishing of gauges, falls into some of them."""
PAUSE_S = 0.05
"""Seconds after which no work for a request is in progress any more."""
HAND_OVER = Call("instances.prefill", "_hand_over")
IN_POOL = Call("engines.emulated", "joined")


async def ways() -> tuple[Way, Way]:
    """Trace requests, one after another."""
    prompts: list[list[Call]] = []
    handles: list[list[Call]] = []
    with Recorder() as recorder, tempfile.TemporaryDirectory() as folder:
        site = Site(Path(folder))
        try:
            for number in range(WARM + RUNS):
                with recorder.recording() as calls:
                    first = await _serve(site, f"{number}", calls)
                prompts.append(calls[:first])
                handles.append(calls[calls.index(HAND_OVER) : calls.index(IN_POOL)])
                await asyncio.sleep(PAUSE_S)
        finally:
            await site.close()
    return (
        way("a prompt to its first token", min(prompts[WARM:], key=len)),
        way("a handle from hand-over to pool rows", min(handles[WARM:], key=len)),
    )


async def _serve(site: Site, request_id: str, calls: list[Call]) -> int:
    """Serve a request to its end; return the number of calls until its first token came."""
    first = 0
    async with aclosing(site.ask(request_id)) as parts:
        async for _ in parts:
            first = first or len(calls)
    return first


def table(traced: Way) -> str:
    """Return a trace as text, a line for each stretch."""
    counts = f"{traced.modules} modules, {traced.calls} calls, {traced.crossings} crossings"
    lines = [f"{traced.name}: {counts}, {traced.returns} returns"]
    for stretch in traced.stretches:
        inside = (
            f"{module.partition('.')[2] or module} {calls}"
            for module, calls in stretch.calls.items()
        )
        lines.append(f"  {stretch.package:16} {', '.join(inside)}")
    return "\n".join(lines)


def main(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Trace a prompt to its first token, and a KV cache into a decode's pool."""
    traced = asyncio.run(ways())
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(traced)).decode())
    else:
        print("\n\n".join(map(table, traced)))


if __name__ == "__main__":
    typer.run(main)
