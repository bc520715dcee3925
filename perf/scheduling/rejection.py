"""Measures the cost of a rejection: offers to a prefill whose slots are taken, as a gateway makes
them."""

from __future__ import annotations

import asyncio
import statistics
import time

from tests.servers import Running

from pdctl import keys
from pdserve.rpc.channels.grpc import GrpcChannel
from pdserve.rpc.messages import Accepted, Busy, Prefilled, PrefillRequest, Release, Reply
from pdserve.sampling import Sampling
from pdserve.scheduling.instance import Call, Instance
from pdserve.scheduling.request import Request
from pdserve.scheduling.suspicion import Stay
from pdserve.transfer import key
from perf.budgets import Budget
from perf.processes import cpu_s, ids

PREFILL = "prefill_0"
PROMPT = bytes(4 * 1000)
OFFERS = 500
ANSWER_S = 5.0


def cost(server: Running) -> list[Budget]:
    """Measure one rejection. The server has no other work, and is on one host."""
    return asyncio.run(_cost(server))


async def _cost(server: Running) -> list[Budget]:
    secret = key.load(keys.copy(server.servers[0].folder))
    instance = Instance(PREFILL, GrpcChannel(server.grpc, PREFILL, secret))
    watched = ids(server.servers[0])
    try:
        held = [await _fill(instance) for _ in range(server.deployment.prefill.slots)]
        taken = []
        before, mine = sum(cpu_s(watched).values()), time.process_time()
        for _ in range(OFFERS):
            began = time.perf_counter()
            call, reply = await _offer(instance)
            taken.append(time.perf_counter() - began)
            assert isinstance(reply, Busy), reply
            call.close()
        cpu = sum(cpu_s(watched).values()) - before + time.process_time() - mine
        for call in held:
            call.close()
        # The answer shows that all messages before have arrived: a stream that is closed at once
        # loses what it has not sent, and the slots would be held until their leases expire.
        await instance.ask(Release(instance.new_id()), ANSWER_S)
    finally:
        await instance.close()
    return [
        Budget("a rejection", _ms(statistics.median(taken)), "ms", "at most", None),
        Budget("  CPU, gateway's side included", _ms(cpu / OFFERS), "ms", "at most", None),
    ]


async def _fill(instance: Instance) -> Call:
    """Fill one slot, which stays taken."""
    call, reply = await _offer(instance)
    while isinstance(reply, Accepted):
        reply = await call.reply(ANSWER_S, time.monotonic() + ANSWER_S)
    assert isinstance(reply, Prefilled), reply
    return call


async def _offer(instance: Instance) -> tuple[Call, Reply]:
    asked = PrefillRequest(instance.new_id(), PROMPT, Sampling(), "", deadline_ms=60_000)
    stay = Stay(Request(asked.id, asked.prompt, max_tokens=1), instance, "prefill")
    call = instance.call(asked, stay)
    return call, await call.reply(ANSWER_S, time.monotonic() + ANSWER_S)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
