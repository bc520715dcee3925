"""The messages of the control plane to instances, each with a time limit."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Collection
from typing import TypeVar

from pdserve.control.assignment import Assignment
from pdserve.errors import InstanceError
from pdserve.rpc.client import Channel
from pdserve.rpc.messages import (
    Assign,
    Drain,
    Inspect,
    Inspected,
    Reply,
    Request,
    Resume,
    Unlink,
    Unlinked,
)

REPLY_S = 5.0
"""Seconds for the answer to a message that changes nothing else."""
UNLINK_S = 10.0
"""Seconds for a decode to close a link, pulls in progress included (`kv_imports.UNLINK_S`)."""
ASSIGN_S = 30.0
"""Seconds in which the memory of one role is given back and that of the other is taken."""
_NO_PROCESS = ("is not found", "is not at ready state", "is not healthy")
"""What Triton says of a model that has none."""

R = TypeVar("R", bound=Reply)


class InstanceCalls:
    """Calls of instances; all raise InstanceError if there is no answer, or another one.

    Args:
        channel: returns a channel to an instance, whatever its assignment
            (`pdserve.control.assignment.ANY`).
        once: returns another one, which is closed after a call.
    """

    def __init__(self, channel: Callable[[str], Channel], once: Callable[[str], Channel]) -> None:
        self._channel = channel
        self._once = once

    async def inspect(self, name: str) -> Inspected:
        return await ask(self._channel(name), Inspect(new_id()), Inspected, REPLY_S)

    async def drain(self, name: str, known: Inspected, within_s: float) -> Inspected:
        drain = Drain(new_id(), known.epoch, known.assignment.number, within_s)
        return await ask(self._channel(name), drain, Inspected, REPLY_S)

    async def resume(self, name: str, known: Inspected) -> Inspected:
        resume = Resume(new_id(), known.epoch, known.assignment.number)
        return await ask(self._channel(name), resume, Inspected, REPLY_S)

    async def assign(self, name: str, known: Inspected, wanted: Assignment) -> Inspected:
        assign = Assign(new_id(), known.epoch, known.assignment.number, wanted)
        return await ask(self._channel(name), assign, Inspected, ASSIGN_S)

    async def unlink(self, prefill: str, known: Inspected, decodes: Collection[str]) -> None:
        """Have decodes close their links to the memory of a prefill.

        Raises:
            InstanceError: some have not said so; the message names each, and why.
        """
        number, memory = known.assignment.number, known.memory
        answers = await asyncio.gather(
            *(self._unlink(name, Unlink(new_id(), prefill, memory, number)) for name in decodes),
            return_exceptions=True,
        )
        silent = []
        for name, answer in zip(decodes, answers, strict=True):
            if isinstance(answer, InstanceError):
                silent.append(f"{name} ({answer})")
            elif isinstance(answer, BaseException):
                raise answer
        if silent:
            raise InstanceError(f"these may have a link to {prefill} still: {', '.join(silent)}")

    async def _unlink(self, decode: str, unlink: Unlink) -> None:
        channel = self._once(decode)
        try:
            await ask(channel, unlink, Unlinked, UNLINK_S)
        except InstanceError as error:
            # The links of a process end with it.
            if not any(said in str(error) for said in _NO_PROCESS):
                raise
        finally:
            await channel.close()


async def ask(channel: Channel, request: Request, wanted: type[R], limit_s: float) -> R:
    """Return the reply to a message.

    Raises:
        InstanceError: it is of another kind, or none came in time.
    """
    replies = channel.open(request.id, request)
    try:
        reply = await replies.get(limit_s)
    finally:
        channel.forget(request.id)
    if not isinstance(reply, wanted):
        raise InstanceError(f"it answered {reply} to {type(request).__name__}")
    return reply


def new_id() -> str:
    """Return an id that no other message has."""
    return uuid.uuid4().hex
