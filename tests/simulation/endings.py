"""Checks of how a request ends, and with which answer or error."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

from pdserve import errors
from pdserve.scheduling.request import FINAL, State
from tests.simulation.clients import Left
from tests.simulation.deployments import served_as

if TYPE_CHECKING:
    from pdserve.scheduling.request import Request
    from tests.simulation.clients import Client
    from tests.simulation.world import World

# At most this many pairs may take a request. The number is not the scheduler's, which
# `mechanisms` replaces.
ATTEMPTS = 4
PAGE = 4096
POISON = (1).to_bytes(4, "little")
"""The token that ends the process of an instance: no prompt that is drawn contains it."""
EXPECTED = 12
"""A first token may be expected to take this many times as long as the longest forward."""


def wrong(client: Client, world: World) -> str:
    """Return what is wrong with how a request has ended; empty: nothing."""
    request, error = client.request, client.error
    if request is None:
        refused = client.deployment and served_as(client, client.deployment) is None
        return "" if refused and isinstance(error, errors.NotFound) else "it was not begun"
    if request.state not in FINAL:
        return "its state is not final"
    if (error is None) != (request.state is State.FINISHED):
        return "state and error do not match"
    plan, now = world.plan, world.loop.time()
    match error:
        case None:
            return _wrong_answer(client, request, world)
        case asyncio.CancelledError() | Left():
            return _wrong_leave(client)
        case errors.Late():
            # A waiting request leaves when its first token is expected too late. The expectation
            # is the more careful, the more the prefills' times differ.
            takes = EXPECTED * (world.invariants.bounds.forward + world.invariants.bounds.message)
            limit = min(request.deadline, request.arrived + request.ttft_limit_s)
            early = plan.calm and now < limit - takes
            return "too early to be late" if early else ""
        case errors.InvalidRequest():
            nbytes = len(request.prompt) // 4 * 128 * plan.profile["layers"]
            return "" if nbytes > plan.arena_bytes - PAGE else "it is not too large"
        case errors.Unavailable():
            return _wrong_refusal(error, calm=plan.calm)
        case errors.InstanceError() | errors.Suspected():
            return _wrong_failure(client, request, world)
    return "no error that a client may see"


def _wrong_refusal(error: errors.Unavailable, *, calm: bool) -> str:
    if "have left" in f"{error}":
        return "it has been moved too often"
    return "all was well" if calm else ""


def _wrong_leave(client: Client) -> str:
    if isinstance(client.error, Left):
        return "" if client.asked.leaves_after else "its client has not left"
    return "" if client.asked.cancels_after < math.inf else "nobody has cancelled it"


def _wrong_failure(client: Client, request: Request, world: World) -> str:
    if isinstance(client.error, errors.Suspected):
        # Its gateway cannot tell whether the request has caused the ends of two processes.
        shared = world.invariants.shared[client.gateway, request.id]
        return "" if POISON in request.prompt or len(shared) > 1 else "it has ended nothing"
    if world.plan.calm:
        return "all was well"
    assert client.scheduler is not None
    spent = client.scheduler._budget._left < 1
    return "" if request.attempts >= ATTEMPTS or spent else "it was not tried again"


def _wrong_answer(client: Client, request: Request, world: World) -> str:
    if client.heard != client.expected:
        return f"the answer is {client.heard} and not {client.expected}"
    text = client.expected_text if client.asked.in_text or client.stop else ""
    if client.text != text:
        return f"the answer is {client.text!r} and not {text!r}"
    if request.finish_reason != client.reason:
        return f"it ended by {request.finish_reason} and not by {client.reason}"
    told = client.stats["output_tokens"], client.stats["scenario"], client.stats["group"]
    if told != (len(client.expected), request.scenario, request.group):
        return f"its statistics are {client.stats}"
    if world.plan.calm and request.attempts != 1:
        return "it took several attempts"
    return ""
