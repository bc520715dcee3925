"""Sends a short request through every gateway, to test them from end to end.

It takes the path of a client's request, where the watchdog's probes go past the gateways, so it is
counted in their metrics.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from pdctl import questions
from pdctl.server import Server
from pdserve.errors import DeploymentError, InstanceError


def probe(servers: Sequence[Server], within_s: float) -> list[dict[str, Any]]:
    """Ask the gateways among some servers, all at once; return the result of each.

    Keys: server, grpc, ok, ms (until the answer was complete, or given up), prefill and
    decode (which made the answer; empty if there is none), error (empty if there is none).

    Raises:
        DeploymentError: there is no gateway among them.
    """
    gateways = [server for server in servers if server.spec.gateway]
    if not gateways:
        names = ", ".join(server.spec.name for server in servers)
        raise DeploymentError(f"no gateway to probe: {names} has gateway: false")

    async def ask_all() -> list[dict[str, Any]]:
        return await asyncio.gather(*(_ask(server, within_s) for server in gateways))

    return asyncio.run(ask_all())


def line(found: dict[str, Any]) -> str:
    """Describe the result of one gateway."""
    if not found["ok"]:
        return f"{found['server']} ({found['grpc']}): {found['error']}"
    pair = " and ".join(filter(None, (found["prefill"], found["decode"])))
    return f"{found['server']} answers: {found['ms']:.0f} ms, {pair}"


async def _ask(server: Server, within_s: float) -> dict[str, Any]:
    stats, error = {"prefill": "", "decode": ""}, ""
    begin = time.monotonic()
    try:
        stats = await asyncio.wait_for(questions.answer(server.grpc, within_s), within_s)
    except asyncio.TimeoutError:
        error = f"no answer within {within_s:g} s"
    except InstanceError as raised:
        error = str(raised)
    return {
        "server": server.spec.name,
        "grpc": server.grpc,
        "ok": not error,
        "ms": round((time.monotonic() - begin) * 1e3, 3),
        "prefill": stats["prefill"],
        "decode": stats["decode"],
        "error": error,
    }
