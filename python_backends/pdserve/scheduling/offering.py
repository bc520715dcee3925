"""What an offer to an instance is, and what becomes of its replies."""

from __future__ import annotations

import asyncio
import itertools
import random
import uuid
from typing import NamedTuple

from pdserve import errors
from pdserve.config import Role
from pdserve.rpc import messages
from pdserve.rpc.messages import Busy, Failed, NotConnected
from pdserve.scheduling.instance import Call, Instance
from pdserve.scheduling.request import Answer, Offer, Request
from pdserve.scheduling.suspicion import Stay

# An instance accepts or rejects at once: one that does neither for so long has failed.
ANSWER_S = 2.0
# And one that has kept a request until its limit, for so long: else those with short limits would
# never find out that it is gone.
KEPT_S = 0.25
# Where another gateway's suspect is on trial, ours is not offered for so long.
SUSPECT_S = 0.05


class Offered(NamedTuple):
    """An instance has taken a request."""

    instance: Instance
    call: Call
    reply: messages.Reply
    """Its first."""


class Calls:
    """Names of calls, unique over all gateways: of a request, one for each offer."""

    def __init__(self, rng: random.Random) -> None:
        self.gateway = uuid.UUID(int=rng.getrandbits(128)).hex
        self._count = itertools.count()

    def new(self, request: Request) -> str:
        return f"{self.gateway}-{request.id}-{request.attempts}-{next(self._count)}"


async def offer(
    request: Request, instance: Instance, message: messages.Request, until: float
) -> Offered | None:
    """What an instance says to a request; None: it is busy.

    Raises:
        InstanceError: it failed, or has not answered; whatever it may hold is released.
        Suspected: it has ended, and the request is not tried again.
        Late: ``until`` (``loop.time()``) has come.
    """
    loop = asyncio.get_running_loop()
    began, answer = loop.time(), Answer.FAILED
    role: Role = "prefill" if isinstance(message, messages.PrefillRequest) else "decode"
    call = instance.call(message, Stay(request, instance, role))
    try:
        reply = await call.reply(ANSWER_S, until)
        if isinstance(reply, Busy):
            answer = Answer.BUSY
            if reply.reason == messages.SUSPECT:
                instance.leave_alone(loop.time() + SUSPECT_S)
        elif not isinstance(reply, NotConnected):
            answer = Answer.ACCEPTED
    except BaseException as error:
        if isinstance(error, errors.Late) and loop.time() - began > KEPT_S:
            call.blame()
        call.close()
        raise
    finally:
        request.offers.append(Offer(instance.name, began, loop.time(), answer))
    if answer is Answer.BUSY:
        call.close()
        return None
    return Offered(instance, call, reply)


def failure(reply: messages.Reply) -> errors.PDServeError:
    """What an instance's refusal to go on becomes."""
    if isinstance(reply, Failed):
        for kind in (errors.InvalidRequest, errors.Unavailable, errors.Cancelled):
            if reply.code == kind.code:
                return kind(reply.message)
        return errors.InstanceError(reply.message)
    return errors.InstanceError(f"unexpected {type(reply).__name__} from an instance")
