"""Offers of requests to instances, and the meaning of their replies."""

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

# An instance accepts or rejects at once: one that does neither for this long has failed.
ANSWER_S = 2.0
# An instance that has kept a request this long until the request's limit has failed, too: otherwise
# requests with short limits would never find out that it is gone.
KEPT_S = 0.25
# Where another gateway's suspect is on trial, ours is not offered for this long.
SUSPECT_S = 0.05


class Offered(NamedTuple):
    """A request that an instance has accepted."""

    instance: Instance
    call: Call
    reply: messages.Reply
    """The instance's first reply."""


class Calls:
    """Makes ids of calls, unique over all gateways, one for each offer of a request."""

    def __init__(self, rng: random.Random) -> None:
        self.gateway = uuid.UUID(int=rng.getrandbits(128)).hex
        self._count = itertools.count()

    def new(self, request: Request) -> str:
        return f"{self.gateway}-{request.id}-{request.attempts}-{next(self._count)}"


async def offer(
    request: Request, instance: Instance, message: messages.Request, until: float
) -> Offered | None:
    """Offer a request to an instance; None: it is busy.

    Raises:
        InstanceError: the instance failed or did not answer; whatever it may hold is released.
        Drained: it serves nothing under this assignment any more.
        Suspected: the instance has ended, and the request is not retried.
        Late: ``until`` (``loop.time()``) has passed.
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
        if isinstance(error, errors.Drained):
            answer = Answer.REASSIGNED
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
    """Return the error for a reply by which an instance refuses to go on."""
    if isinstance(reply, Failed):
        for kind in (errors.InvalidRequest, errors.Unavailable, errors.Cancelled):
            if reply.code == kind.code:
                return kind(reply.message)
        if reply.code == errors.Drained.code:
            return errors.Drained(reply.message)
        return errors.InstanceError(reply.message)
    return errors.InstanceError(f"unexpected {type(reply).__name__} from an instance")
